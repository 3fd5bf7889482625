"""`parse_body` parses a JSON request body, and explains the first mistake of the body in one sentence."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError
from pydantic_core.core_schema import NoInfoWrapValidatorFunction, no_info_wrap_validator_function

from services.gateway.errors import ApiError, invalid
from services.gateway.limits import GatewayLimits
from services.gateway.schema.json_size import check_size
from services.gateway.schema.json_text import mend_body

OBJECT = "a JSON object"  # replaces pydantic's class name in error messages
WITHIN = ("value_error", "unknown_field")  # errors of a value that has the right type
DEFAULT_LIMITS = GatewayLimits()
# Matches the beginning of every JSON number that a float cannot hold, and of some other numbers. The pattern
# begins with a digit, so a search skips all other text quickly and takes time linear in the length of the text.
MAYBE_HUGE = re.compile(rb"[0-9](?:[eE]\+?[0-9]{3}|(?<![0-9]{2})[0-9]{199})")
BLOCK, OVERLAP = 1 << 16, 256  # bytes that are searched at once, because a search holds Python's global lock
MAX_LISTED_FIELDS = 16  # maximum number of allowed fields in an error message


def _stop_at_first_item(schema: Any) -> None:
    """Make every list in pydantic's `schema` stop at its first bad item, and leave unknown fields to `_check_names`."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        if schema.get("type") == "model-fields":
            schema["extra_behavior"] = "ignore"
        for part in schema.values():
            _stop_at_first_item(part)
    elif isinstance(schema, list):
        for part in schema:
            _stop_at_first_item(part)


def _checked_fields(schema: Any, check: NoInfoWrapValidatorFunction) -> CoreSchema:
    """Return pydantic's `schema` of a model with `check` around its fields, and inside the model's own validators."""
    if schema["type"] != "model":
        return {**schema, "schema": _checked_fields(schema["schema"], check)}
    return no_info_wrap_validator_function(check, schema)


@cache
def _field_types(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the types of all fields of `kind` by the names that clients use."""
    return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}


class RequestModel(BaseModel):
    """A `RequestModel` is a JSON object in a request that refuses values of a wrong type.

    The validation stops at the first bad item of a list and at the first unknown field. A body with thousands of
    mistakes therefore costs no more than a body with one.
    """

    model_config = ConfigDict(strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _stop_at_first_item(schema)
        return _checked_fields(schema, cls._check_names) if cls.model_config.get("extra") == "forbid" else schema

    @classmethod
    def _check_names(cls, value: object, check_fields: ValidatorFunctionWrapHandler) -> object:
        """Return the model for `value` after `check_fields` has checked its fields. Refuse the first unknown field."""
        model, known = check_fields(value), _field_types(cls)
        for name in value if isinstance(value, dict) else ():
            if name not in known:
                raise PydanticCustomError("unknown_field", "must be a known field", {"name": name, "known": known})
        return model


class BaseBody(RequestModel):
    """A `BaseBody` is a JSON object that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class LenientBody(RequestModel):
    """A `LenientBody` is a JSON object whose unknown fields have no effect."""

    model_config = ConfigDict(extra="ignore")


def _integral(value: object) -> object:
    """Return the integer that is equal to `value` if there is one, because JSON does not tell 3.0 and 3 apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]


def _check_metadata(value: object) -> object:
    """Return `value` if it is null or an object of strings. Raises ValueError for the first value that is no string."""
    for key, one in value.items() if isinstance(value, dict) else ():
        if not isinstance(one, str):
            raise ValueError(f"must hold a string for each key, not {shown(one)} for {key!r:.100}")
    return value


Metadata = Annotated[dict[str, str], BeforeValidator(_check_metadata)]


def only(*allowed: object) -> AfterValidator:
    """Return a validator for a field that the gateway does not support.

    Clients may send the field with null or one of the values `allowed`, which have no effect. The validator refuses
    every other value.
    """
    values = " or ".join(map(json.dumps, [*(value for value in allowed if value is not None), None]))

    def check(value: object) -> object:
        if value is not None and value not in allowed:
            raise ValueError(f"must be {values}, because nothing else is supported yet, not {shown(value)}")
        return value

    return AfterValidator(check)


def shown(value: object) -> str:
    """Return a short form of `value` for an error message. The cost does not depend on the size of `value`."""
    return f"{_REPR.repr(value):.100}"


_REPR = Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 100


AnyBody = TypeVar("AnyBody", bound=BaseBody)


def parse_body(kind: type[AnyBody], data: bytes, limits: GatewayLimits = DEFAULT_LIMITS) -> AnyBody:
    """Return the JSON text `data` as an object of the class `kind`.

    Raises ApiError with one sentence about the first mistake in the body.
    """
    return validate(kind, parse_json(data, limits))


def parse_json(data: bytes, limits: GatewayLimits = DEFAULT_LIMITS) -> Any:
    """Return the value of the JSON text `data`, which is the body of a request.

    Raises ApiError if `data` is no JSON, or if its values are too many or nested too deep.
    """
    try:
        check_size(data, limits.json_depth, limits.json_values, limits.json_items)
    except ValueError as error:
        raise invalid(f"The JSON of the body {error}.") from error
    try:
        value = pydantic_core.from_json(mend_body(data), allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}.") from error
    blocks = range(0, len(data), BLOCK)
    if any(MAYBE_HUGE.search(data, start, start + BLOCK + OVERLAP) for start in blocks) and _holds_infinity(value):
        raise invalid("The body must hold only numbers below 1.8e308, because a larger number has no 64-bit form.")
    return value


def _holds_infinity(value: Any) -> bool:
    """Return True if a number in the JSON value `value` became infinite when it was read."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, float) and math.isinf(part):
            return True
        if isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part
    return False


def validate(kind: type[AnyBody], value: object) -> AnyBody:
    """Return the JSON value `value` as an object of the class `kind`. Raises ApiError for the first mistake."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explain(kind, error.errors(include_url=False)) from error


def _explain(kind: type[BaseBody], errors: list[ErrorDetails]) -> ApiError:
    error, expected = _most_specific(kind, errors)
    location = _locate(kind, error["loc"])
    path = location.path
    match error["type"]:
        case "model_type" if not path:
            return invalid("The body must be a JSON object.")
        case "unknown_field":
            return _unknown_field(path, error["ctx"]["name"], sorted(error["ctx"]["known"]))
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
    return invalid(f"{path} must be {expected}, not {shown(error['input'])}.", path)


def _unknown_field(owner: str, name: str, known: list[str]) -> ApiError:
    """Return the error for the unknown field `name` of the object at the path `owner`, which has the `known` fields."""
    path = f"{owner}.{name:.100}" if owner else f"{name:.100}"
    if nearest := get_close_matches(name[:100], known, n=1):
        advice = f"the nearest allowed field is {nearest[0]!r}."
    elif len(known) <= MAX_LISTED_FIELDS:
        advice = f"the allowed fields are {', '.join(known)}."
    else:
        advice = "docs/api.md lists the allowed fields."
    return invalid(f"Unknown field {path!r}; {advice}", path, "unknown_parameter")


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
    deepest = max(members, key=lambda error: (len(error["loc"]), error["type"] in WITHIN))
    if len(deepest["loc"]) > len(first["loc"]) or deepest["type"] in WITHIN:
        return deepest, _expected(deepest)
    return first, " or ".join(map(_expected, members))


def _expected(error: ErrorDetails) -> str:
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return OBJECT
    if error["type"] == "list_type":
        return "a valid array"
    return error["msg"].removeprefix("Input should be ")


@dataclass(frozen=True)
class _FieldLocation:
    """A `_FieldLocation` says where in a body a mistake is."""

    path: str  # path of the mistake in the body, such as "messages[0].role"
    is_in_union: bool  # True: pydantic's location ends with the name of one type of a union


def _locate(kind: type[BaseBody], loc: tuple[int | str, ...]) -> _FieldLocation:
    """Return the location of an error, given pydantic's `loc` and the class `kind` of the body."""
    types: list[Any] = [kind]  # possible types of the value at `path`: several if the field is a union
    path, is_in_union = "", False
    for part in loc:
        is_in_union = len(types) > 1
        if is_in_union:  # pydantic puts the name of the union's type between the parts of the path
            types = [type_ for type_ in types if _type_name(str(part)) in _names(type_)] or [Any]
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
        if isinstance(types[0], type) and issubclass(types[0], RequestModel):
            types = _union_members(_field_types(types[0]).get(str(part), Any))
        else:  # the value at `path` is a list or a dictionary
            types = _union_members((*get_args(types[0]), Any)[-2 if get_args(types[0]) else 0])
    return _FieldLocation(path.lstrip("."), is_in_union)


def _type_name(label: str) -> str:
    """Return the type's name in pydantic's `label` for it, such as "list[str]" or "function-after[check(), Name]"."""
    return label.rpartition(", ")[2].partition("[")[0].rstrip("]")


def _names(type_: Any) -> set[object]:
    """Return the names by which pydantic may call the type `type_` of a union in the location of an error.

    The names are the name of the type, and the values of the field `type` if that field tells the union's types apart.
    """
    name = str(getattr(type_, "__name__", ""))
    fields = type_.model_fields if isinstance(type_, type) and issubclass(type_, RequestModel) else {}
    return {name, *(get_args(fields["type"].annotation) if "type" in fields else ())}


def _union_members(annotation: Any) -> list[Any]:
    """Return the types of the union `annotation` except None; if `annotation` is not a union, return only it."""
    if get_origin(annotation) is Annotated:  # a union whose types are told apart by a field
        annotation = get_args(annotation)[0]
    is_union = get_origin(annotation) in (Union, UnionType)
    return [member for member in get_args(annotation) if member is not NoneType] if is_union else [annotation]
