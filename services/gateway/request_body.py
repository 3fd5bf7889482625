"""JSON bodies of requests: parsing, and one sentence about the first mistake in them."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from services.gateway.errors import ApiError, invalid

OBJECT = "a JSON object"


class BaseBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def only(*allowed: object) -> AfterValidator:
    """A field of OpenAI's that may be sent as long as it asks for nothing: any other value is refused by name."""
    values = " or ".join("null" if value is None else repr(value) for value in allowed)

    def check(value: object) -> object:
        if value is not None and value not in allowed:
            raise ValueError(f"must be {values}, because nothing else is supported yet, not {value!r:.100}")
        return value

    return AfterValidator(check)


AnyBody = TypeVar("AnyBody", bound=BaseBody)


def parse_body(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Raises ApiError with one sentence about the first mistake."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _explain(kind, error.errors(include_url=False)) from error


def _explain(kind: type[BaseBody], errors: list[ErrorDetails]) -> ApiError:
    error, expected = _most_telling(kind, errors)
    place = _locate(kind, error["loc"])
    path = place.path
    match error["type"]:
        case "json_invalid":
            return invalid(f"The body is not valid JSON: {error['ctx']['error']}.")
        case "model_type" if not path:
            return invalid("The body must be a JSON object.")
        case "extra_forbidden":
            allowed = ", ".join(sorted(place.fields))
            return invalid(f"Unknown field {path!r:.100}; the allowed fields are {allowed}.", path, "unknown_parameter")
        case "missing":
            return invalid(f"{path} is missing, but required.", path)
        case "value_error":
            reason = str(error["ctx"]["error"])
            return invalid(f"{path} {reason}." if path else reason, path or reason.split()[0])
        case "model_type" if expected == OBJECT:
            return invalid(f"{path} must be {OBJECT}.", path)
    return invalid(f"{path} must be {expected}, not {error['input']!r:.100}.", path)


def _most_telling(kind: type[BaseBody], errors: list[ErrorDetails]) -> tuple[ErrorDetails, str]:
    """The first error and what was expected; where a value may have several forms, of the form it fails deepest in."""
    first = errors[0]
    if not _locate(kind, first["loc"]).is_form:
        return first, _expected(first)
    forms = [error for error in errors if error["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    deepest = max(forms, key=lambda error: len(error["loc"]))
    if len(deepest["loc"]) > len(first["loc"]):
        return deepest, _expected(deepest)
    return first, " or ".join(map(_expected, forms))


def _expected(error: ErrorDetails) -> str:
    if error["type"] in ("model_type", "dict_type"):
        return OBJECT
    return error["msg"].removeprefix("Input should be ")


@dataclass(frozen=True)
class _FieldLocation:
    """Where a mistake is: `fields` are those of the object that the last part of `path` is in; `is_form` says that
    pydantic ended the place with its own name of one form that the value may have."""

    path: str
    fields: tuple[str, ...]
    is_form: bool


def _locate(kind: type[BaseBody], loc: tuple[int | str, ...]) -> _FieldLocation:
    here: list[Any] = [kind]
    path, fields, is_form = "", tuple[str, ...](), False
    for part in loc:
        is_form = len(here) > 1
        if is_form:
            here = [form for form in here if getattr(form, "__name__", "") == part] or [Any]
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
        if isinstance(here[0], type) and issubclass(here[0], BaseBody):
            known = {field.alias or name: field.annotation for name, field in here[0].model_fields.items()}
            fields, here = tuple(known), _union_members(known.get(str(part), Any))
        else:
            here = _union_members((*get_args(here[0]), Any)[-2 if get_args(here[0]) else 0])  # of a list or an object
    return _FieldLocation(path.lstrip("."), fields, is_form)


def _union_members(annotation: Any) -> list[Any]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return [form for form in get_args(annotation) if form is not NoneType] if is_union else [annotation]
