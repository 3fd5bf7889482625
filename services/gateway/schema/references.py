"""A `SchemaRoot` is a whole JSON schema, and finds the schemas to which `$ref` refers, and the types of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from services.gateway.schema.errors import UnsupportedKeyword

Types = frozenset[str]
ALL_TYPES: Types = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
MAX_DEPTH = 64  # `$ref` and nested schemas that are followed from one schema
MAX_NESTING = 150  # schemas that are converted below one another; Python's stack has room for four times as many
MAX_VISITS = 10_000  # schemas that one search for types reads; the largest schemas of a grammar have 4,096 nodes
MAX_READS = 20_000  # schemas that are read for one grammar; a reference that is resolved in place counts each time
MAX_ROUNDS = 8  # rounds in which the types of schemas that refer to one another may grow


class SchemaRoot:
    """A `SchemaRoot` resolves the references of one whole JSON schema, `root`."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self._types: dict[str, Types] = {}  # types by reference, as far as the types are known
        self._done: set[str] = set()  # references whose types are complete in this round
        self._num_left, self._num_reads_left = 0, MAX_READS

    def count_read(self, path: str, num: int = 1) -> None:
        """Count `num` schemas that are read at `path`. Raises UnsupportedKeyword after too many."""
        self._num_reads_left -= num
        if self._num_reads_left < 0:
            raise UnsupportedKeyword(path, "refers to too many other schemas")

    def resolve(self, reference: Any, path: str = "$ref") -> Any:
        """Return the schema to which `reference` refers. `path` is the place of the reference, for the error message.

        Raises UnsupportedKeyword if the reference does not begin with `#`, or if there is no such schema.
        """
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise UnsupportedKeyword(path, f"must begin with '#/' and refer to the same schema, not {reference!r:.100}")
        found = self.root
        for part in reference[2:].split("/") if len(reference) > 2 else ():
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and len(key) < 7 and int(key) < len(found):
                found = found[int(key)]
            else:
                raise UnsupportedKeyword(path, f"refers to {reference!r:.100}, which does not exist")
        return found

    def types(self, schema: Any) -> Types | None:
        """Return the JSON types that `schema` allows, or None if the schema does not limit the types.

        The types are taken from `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf` and `$ref`. Schemas that refer to
        themselves have the smallest set of types that fulfils the references: the search is repeated with the types
        found so far until no set of types grows.
        """
        self._types, self._num_left = {}, MAX_VISITS
        for _ in range(MAX_ROUNDS):
            before, self._done = dict(self._types), set()
            found = self._types_of(schema, 0)
            if self._types == before:
                break
        if not found or found >= ALL_TYPES or self._num_left < 0:
            return None
        return found - {"integer"} if "number" in found else found

    def _types_of(self, schema: Any, depth: int) -> Types:
        self._num_left -= 1
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH or self._num_left < 0:
            return ALL_TYPES if schema is not False else frozenset()
        found = named_types(schema)
        if isinstance(reference := schema.get("$ref"), str):
            found &= self._types_behind(reference, depth)
        for keyword in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(keyword), list) and options:
                found &= frozenset().union(*self._each(options, depth))
        if isinstance(parts := schema.get("allOf"), list):
            for types in self._each(parts, depth):
                found &= types
        if isinstance(refused := schema.get("not"), Mapping) and refused.keys() == {"type"}:
            found -= named_types(refused)
        return found

    def _each(self, schemas: list[Any], depth: int) -> Iterable[Types]:
        return [self._types_of(schema, depth + 1) for schema in schemas]

    def _types_behind(self, reference: str, depth: int) -> Types:
        if reference in self._done:
            return self._types[reference]
        try:
            target = self.resolve(reference)
        except UnsupportedKeyword:
            return ALL_TYPES
        self._done.add(reference)
        self._types.setdefault(reference, frozenset())
        self._types[reference] |= self._types_of(target, depth + 1)
        return self._types[reference]


def named_types(schema: Mapping[str, Any]) -> Types:
    """Return the types that the keywords `type`, `enum` and `const` of `schema` allow, with "integer" for "number"."""
    found = ALL_TYPES
    named = schema.get("type")
    names = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    if names and set(names) <= ALL_TYPES:
        found = frozenset(names) | ({"integer"} if "number" in names else set())
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values:
        found &= frozenset(name for value in values for name in _types_of_value(value))
    return found


def _types_of_value(value: object) -> tuple[str, ...]:
    is_whole = isinstance(value, float) and value.is_integer()
    return (type_of(value), "integer") if is_whole else (type_of(value),)


def type_of(value: object) -> str:
    """Return the JSON type of a value, with "integer" for whole numbers that are written without a point."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def wrong_type(name: object) -> str:
    """Return the rest of a sentence that says that `name` is no type."""
    return f"must be one or more of {', '.join(sorted(ALL_TYPES))}, not {name!r:.100}"
