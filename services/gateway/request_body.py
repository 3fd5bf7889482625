"""`parse_body` parses a JSON request body, and explains the first mistake of the body in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from services.gateway.errors import ApiError, invalid
from services.gateway.schema.json_text import mend_body

OBJECT = "a JSON object"  # replaces pydantic's class name in error messages


class BaseBody(BaseModel):
    """A `BaseBody` is a JSON object that refuses unknown fields and values of a wrong type."""

    model_config = ConfigDict(extra="forbid", strict=True)


def only(*allowed: object) -> AfterValidator:
    """Return a validator for a field of OpenAI's API that the gateway does not support.

    Clients may send the field with null or one of the values `allowed`, which have no effect. The validator refuses
    every other value.
    """
    values = " or ".join("null" if value is None else repr(value) for value in allowed)

    def check(value: object) -> object:
        if value is not None and value not in allowed:
            raise ValueError(f"must be {values}, because nothing else is supported yet, not {value!r:.100}")
        return value

    return AfterValidator(check)


AnyBody = TypeVar("AnyBody", bound=BaseBody)


def parse_body(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Return the JSON text `data` as an object of the class `kind`.

    Raises ApiError with one sentence about the first mistake in the body.
    """
    try:
        return kind.model_validate_json(mend_body(data))
    except ValidationError as error:
        raise _explain(kind, error.errors(include_url=False)) from error


def _explain(kind: type[BaseBody], errors: list[ErrorDetails]) -> ApiError:
    error, expected = _most_specific(kind, errors)
    location = _locate(kind, error["loc"])
    path = location.path
    match error["type"]:
        case "json_invalid":
            return invalid(f"The body is not valid JSON: {error['ctx']['error']}.")
        case "model_type" if not path:
            return invalid("The body must be a JSON object.")
        case "extra_forbidden":
            allowed = ", ".join(sorted(location.fields))
            return invalid(f"Unknown field {path!r:.100}; the allowed fields are {allowed}.", path, "unknown_parameter")
        case "union_tag_not_found":
            return invalid(f"{path}.type is missing, but required.", f"{path}.type")
        case "union_tag_invalid":
            allowed, tag = error["ctx"]["expected_tags"], error["ctx"]["tag"]
            return invalid(f"{path}.type must be one of {allowed}, not {tag!r:.100}.", f"{path}.type")
        case "missing":
            return invalid(f"{path} is missing, but required.", path)
        case "value_error":
            reason = str(error["ctx"]["error"])
            return invalid(f"{path} {reason}." if path else reason, path or reason.split()[0])
        case "model_type" | "model_attributes_type" if expected == OBJECT:
            return invalid(f"{path} must be {OBJECT}.", path)
    return invalid(f"{path} must be {expected}, not {error['input']!r:.100}.", path)


def _most_specific(kind: type[BaseBody], errors: list[ErrorDetails]) -> tuple[ErrorDetails, str]:
    """Return the pair (error to report to the client, description of the values that the field may have).

    For a field that is a union, pydantic reports one error for each type of the union. The function chooses the
    error at the deepest path of the body, because the client most probably meant the type of that error. If all errors
    have the same depth, the description names every type of the union.
    """
    first = errors[0]
    if not _locate(kind, first["loc"]).is_in_union:
        return first, _expected(first)
    members = [error for error in errors if error["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    deepest = max(members, key=lambda error: len(error["loc"]))
    if len(deepest["loc"]) > len(first["loc"]):
        return deepest, _expected(deepest)
    return first, " or ".join(map(_expected, members))


def _expected(error: ErrorDetails) -> str:
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return OBJECT
    return error["msg"].removeprefix("Input should be ")


@dataclass(frozen=True)
class _FieldLocation:
    """A `_FieldLocation` says where in a body a mistake is."""

    path: str  # path of the mistake in the body, such as "messages[0].role"
    fields: tuple[str, ...]  # field names that are allowed in the object with the mistake
    is_in_union: bool  # True: pydantic's location ends with the name of one type of a union


def _locate(kind: type[BaseBody], loc: tuple[int | str, ...]) -> _FieldLocation:
    """Return the location of an error, given pydantic's `loc` and the class `kind` of the body."""
    types: list[Any] = [kind]  # possible types of the value at `path`: several if the field is a union
    path, fields, is_in_union = "", tuple[str, ...](), False
    for part in loc:
        is_in_union = len(types) > 1
        if is_in_union:  # pydantic puts the name of the union's type, as "list[str]", between the parts of the path
            part = str(part).partition("[")[0]
            types = [type_ for type_ in types if part in _names(type_)] or [Any]
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
        if isinstance(types[0], type) and issubclass(types[0], BaseBody):
            known = {field.alias or name: field.annotation for name, field in types[0].model_fields.items()}
            fields, types = tuple(known), _union_members(known.get(str(part), Any))
        else:  # the value at `path` is a list or a dictionary
            types = _union_members((*get_args(types[0]), Any)[-2 if get_args(types[0]) else 0])
    return _FieldLocation(path.lstrip("."), fields, is_in_union)


def _names(type_: Any) -> set[object]:
    """Return the names by which pydantic may call the type `type_` of a union in the location of an error.

    The names are the name of the type, and the values of the field `type` if that field tells the union's types apart.
    """
    name = str(getattr(type_, "__name__", ""))
    fields = type_.model_fields if isinstance(type_, type) and issubclass(type_, BaseBody) else {}
    return {name, *(get_args(fields["type"].annotation) if "type" in fields else ())}


def _union_members(annotation: Any) -> list[Any]:
    """Return the types of the union `annotation` except None; if `annotation` is not a union, return only it."""
    if get_origin(annotation) is Annotated:  # a union whose types are told apart by a field
        annotation = get_args(annotation)[0]
    is_union = get_origin(annotation) in (Union, UnionType)
    return [member for member in get_args(annotation) if member is not NoneType] if is_union else [annotation]
