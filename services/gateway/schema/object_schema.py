"""An `ObjectSchema` is the schema of a tool's arguments, with `$ref` and `allOf` at its top resolved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.references import MAX_DEPTH, SchemaRoot, Types

# keywords that constrain several arguments together, which the grammar of calls cannot express
NOT_AT_THE_TOP = (
    *("anyOf", "oneOf", "not", "if", "patternProperties", "propertyNames", "minProperties", "maxProperties"),
    *("dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"),
)


@dataclass(frozen=True)
class ObjectSchema:
    """An `ObjectSchema` holds the schemas of an object's properties, and says which properties are required.

    `schema` is the whole schema. Null stands for a missing keyword, because clients in some languages send null.
    """

    schema: Mapping[str, Any]

    @cached_property
    def root(self) -> SchemaRoot:
        return SchemaRoot(self.schema)

    @cached_property
    def parts(self) -> tuple[Mapping[str, Any], ...]:
        """Return the schemas that all hold for the object: the schema itself, and those behind `$ref` and `allOf`."""
        return tuple(self._parts_of(self.schema, 0))

    def _parts_of(self, schema: Any, depth: int) -> Iterator[Mapping[str, Any]]:
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
            return
        try:
            self.root.count_read("parameters")
            yield schema
            if schema.get("$ref") is not None:
                yield from self._parts_of(self.root.resolve(schema["$ref"]), depth + 1)
        except UnsupportedKeyword:
            return
        for part in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
            yield from self._parts_of(part, depth + 1)

    @cached_property
    def required(self) -> tuple[str, ...]:
        """Return the names of the required properties."""
        lists = [part["required"] for part in self.parts if isinstance(part.get("required"), list)]
        return tuple(dict.fromkeys(name for names in lists for name in names if isinstance(name, str)))

    @cached_property
    def properties(self) -> dict[str, Any]:
        """Return the schemas of the properties by name, with the required properties that the schema only names."""
        found: dict[str, list[Any]] = {}
        for part in self.parts:
            properties = part.get("properties")
            for name, schema in properties.items() if isinstance(properties, Mapping) else ():
                found.setdefault(name, []).append(schema)
        for name in self.required:
            found.setdefault(name, [self.additional])
        return {name: schemas[0] if len(schemas) == 1 else {"allOf": schemas} for name, schemas in found.items()}

    @cached_property
    def additional(self) -> Any:
        """Return the schema of properties that the schema does not name; an empty schema allows any."""
        keywords = ("additionalProperties", "unevaluatedProperties")
        given = [part[keyword] for part in self.parts for keyword in keywords if part.get(keyword) is not None]
        return next((schema for schema in given if schema is False), given[0] if given else bool(self.schema))

    def types_of(self, name: str) -> Types | None:
        """Return the JSON types that the property `name` may have, or None if it may have any type."""
        if name not in self._types:
            self._types[name] = self.root.types(self.properties.get(name, self.additional))
        return self._types[name]

    @cached_property
    def _types(self) -> dict[str, Types | None]:
        return {}

    def check_strict(self, path: str) -> None:
        """Raise UnsupportedKeyword if the grammar of calls cannot express a keyword at the top of the schema."""
        for part in self.parts:
            for keyword in NOT_AT_THE_TOP:
                if part.get(keyword) is not None:
                    raise UnsupportedKeyword(
                        f"{path}.{keyword}", "is not supported at the top of a strict tool's schema"
                    )
            if part.get("$ref") is not None:
                self.root.resolve(part["$ref"], f"{path}.$ref")
