"""`negate` returns a schema for all values that another schema refuses, where JSON Schema can say that exactly.

A keyword such as `required` says something only about objects. Its negation therefore demands an object, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.references import ALL_TYPES, MAX_DEPTH, SchemaRoot, type_of

BOUNDS = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}
# For each keyword: the keyword of the negation, what to add to the number, and the type that the keyword is about.
LENGTHS = {
    "minLength": ("maxLength", -1, "string"),
    "maxLength": ("minLength", 1, "string"),
    "minItems": ("maxItems", -1, "array"),
    "maxItems": ("minItems", 1, "array"),
}
COST = 64  # schemas as which a negated schema counts in `count_read`, because references are resolved in place
ANNOTATIONS = {"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"}


def negate(schema: Any, base: Any, root: SchemaRoot, path: str, depth: int = 0) -> Any:
    """Return a schema that, among the values that `base` allows, allows exactly the values that `schema` refuses.

    Raises UnsupportedKeyword if there is no such schema; the message begins with `path`.
    """
    root.count_read(path, COST)
    if depth > MAX_DEPTH:
        raise UnsupportedKeyword(path, "is nested too deep")
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, Mapping):
        raise UnsupportedKeyword(path, "must be a schema")
    options = [
        _negate_keyword(keyword, schema, base, root, path, depth + 1)
        for keyword in schema
        if keyword not in ANNOTATIONS
    ]
    options = [option for option in options if option is not False]
    return {"anyOf": options} if options else False


def _negate_keyword(keyword: str, schema: Mapping[str, Any], base: Any, root: SchemaRoot, path: str, depth: int) -> Any:
    value = schema[keyword]
    match keyword:
        case "$ref":
            return negate(root.resolve(value, path), base, root, path, depth)
        case "not":
            return value
        case "anyOf" if isinstance(value, list):
            return {"allOf": [negate(option, base, root, path, depth) for option in value]}
        case "allOf" if isinstance(value, list):
            return {"anyOf": [negate(option, base, root, path, depth) for option in value]}
        case "const":
            return _other_values([value], base, root, path)
        case "enum" if isinstance(value, list):
            return _other_values(value, base, root, path)
        case "type":
            return _other_types(value, path)
        case "required" if isinstance(value, list):
            return {"type": "object", "anyOf": [{"properties": {name: False}} for name in value]} if value else False
        case "properties" if isinstance(value, Mapping):
            known = base.get("properties", {}) if isinstance(base, Mapping) else {}
            options = [
                {
                    "type": "object",
                    "required": [name],
                    "properties": {name: negate(one, known.get(name), root, path, depth)},
                }
                for name, one in value.items()
            ]
            return {"anyOf": options} if options else False
    if keyword in BOUNDS and isinstance(value, int | float) and not isinstance(value, bool):
        return {"type": "number", BOUNDS[keyword]: value}
    if keyword in LENGTHS and isinstance(value, int) and not isinstance(value, bool):
        opposite, more, about = LENGTHS[keyword]
        return {"type": about, opposite: value + more} if value + more >= 0 else False
    raise UnsupportedKeyword(path, f"is not supported with {keyword!r:.100}")


def _other_values(values: list[Any], base: Any, root: SchemaRoot, path: str) -> Any:
    allowed = finite_values(base, root)
    if allowed is None:
        raise UnsupportedKeyword(path, "is supported with enum or const only for a property that has an enum itself")
    refused = {json.dumps(value) for value in values}
    left = [value for value in allowed if json.dumps(value) not in refused]
    return {"enum": left} if left else False


def _other_types(named: Any, path: str) -> Any:
    names = set(named if isinstance(named, list) else [named])
    if "integer" in names and "number" not in names:
        raise UnsupportedKeyword(path, "is not supported with the type 'integer'")
    left = ALL_TYPES - names - ({"integer"} if "number" in names else set())
    return {"type": sorted(left - {"integer"} if "number" in left else left)} if left else False


def finite_values(schema: Any, root: SchemaRoot, depth: int = 0) -> list[Any] | None:
    """Return a list that holds all values that `schema` allows, or None if no such list is known."""
    if not isinstance(schema, Mapping) or depth > 8:
        return None
    root.count_read("$ref")
    if isinstance(schema.get("enum"), list):
        return _of_type(schema["enum"], schema)
    if "const" in schema:
        return _of_type([schema["const"]], schema)
    if isinstance(schema.get("$ref"), str):
        return finite_values(root.resolve(schema["$ref"]), root, depth + 1)
    for keyword in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(keyword), list):
            found = [finite_values(option, root, depth + 1) for option in options]
            return None if None in found else [value for values in found for value in values or ()]
    kinds: dict[str, list[Any]] = {"boolean": [False, True], "null": [None]}
    return kinds.get(schema["type"]) if isinstance(schema.get("type"), str) else None


def _of_type(values: list[Any], schema: Mapping[str, Any]) -> list[Any]:
    named = schema.get("type", sorted(ALL_TYPES))
    names = set(named if isinstance(named, list) else [named])
    return [value for value in values if {type_of(value), "number" if type_of(value) == "integer" else ""} & names]
