"""An `Alternatives` says whether the options of a `oneOf` exclude one another. Then the `oneOf` equals an `anyOf`.

llguidance, which enforces schemas, does not resolve references in a `oneOf` and refuses most uses of `oneOf`. Options
exclude one another if they have different types, different values, or a required property with different values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.negation import finite_values
from services.gateway.schema.references import ALL_TYPES, MAX_DEPTH, SchemaRoot, Types, named_types

Values = frozenset[str] | None  # values as JSON; None: the number of values is not known to be limited


@dataclass(frozen=True)
class _Facts:
    """A `_Facts` holds what every value that matches a schema has in common."""

    types: Types = ALL_TYPES
    values: Values = None
    properties: Mapping[str, Values] = field(default_factory=dict)  # properties with a limited number of values
    required: frozenset[str] = frozenset()

    def and_also(self, other: _Facts) -> _Facts:
        """Return the facts of the values that match both schemas."""
        values = other.values if self.values is None else self.values
        properties = {**other.properties, **self.properties}
        return _Facts(self.types & other.types, values, properties, self.required | other.required)

    def or_else(self, other: _Facts) -> _Facts:
        """Return the facts of the values that match one of the two schemas."""
        both = self.properties.keys() & other.properties.keys()
        properties = {name: _union(self.properties[name], other.properties[name]) for name in both}
        required = self.required & other.required
        return _Facts(self.types | other.types, _union(self.values, other.values), properties, required)


class Alternatives:
    """An `Alternatives` compares options whose references it resolves in `root`, each reference once."""

    def __init__(self, root: SchemaRoot) -> None:
        self._root = root
        self._behind: dict[str, _Facts] = {}  # facts by reference; empty facts for a reference to itself

    def are_exclusive(self, options: Sequence[Any]) -> bool:
        """Return True if it is certain that no value matches two of the schemas `options`."""
        found = [self._facts(option, 0) for option in options]
        return all(_differ([facts for facts in found if kind in facts.types], kind) for kind in ALL_TYPES)

    def are_told_apart_by(self, tag: Any, options: Sequence[Any]) -> bool:
        """Return True if no two of the schemas `options` allow the same value of the property `tag`."""
        return _are_distinct([self._facts(option, 0).properties.get(tag) for option in options])

    def demands(self, name: str, option: Any) -> bool:
        """Return True if the schema `option` requires the property `name`."""
        return name in self._facts(option, 0).required

    def _facts(self, schema: Any, depth: int) -> _Facts:
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
            return _Facts()
        self._root.count_read("oneOf")
        found = self._own(schema)
        if isinstance(reference := schema.get("$ref"), str):
            found = found.and_also(self._facts_behind(reference, depth))
        for part in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
            found = found.and_also(self._facts(part, depth + 1))
        for keyword in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(keyword), list) and options:
                first, *others = (self._facts(option, depth + 1) for option in options)
                for other in others:
                    first = first.or_else(other)
                found = found.and_also(first)
        return found

    def _facts_behind(self, reference: str, depth: int) -> _Facts:
        if reference not in self._behind:
            self._behind[reference] = _Facts()
            try:
                self._behind[reference] = self._facts(self._root.resolve(reference), depth + 1)
            except UnsupportedKeyword:
                return _Facts()
        return self._behind[reference]

    def _own(self, schema: Mapping[str, Any]) -> _Facts:
        given, names = schema.get("properties"), schema.get("required")
        known = {name: self._values(one) for name, one in given.items()} if isinstance(given, Mapping) else {}
        properties = {name: values for name, values in known.items() if values is not None}
        required = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        own = {key: value for key, value in schema.items() if key in ("enum", "const", "type")}
        return _Facts(named_types(schema), self._values(own), properties, frozenset(required))

    def _values(self, schema: Any) -> Values:
        try:
            values = finite_values(schema, self._root)
        except UnsupportedKeyword:
            return None
        if values is None or any(isinstance(value, list | dict) for value in values):
            return None
        return frozenset(_key(value) for value in values)


def _union(one: Values, other: Values) -> Values:
    return None if one is None or other is None else one | other


def _key(value: Any) -> str:
    """Return `value` as JSON, with one form for equal numbers such as 1 and 1.0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return json.dumps(float(value) if is_number and abs(value) < 2**53 else value)


def _are_distinct(sets: Sequence[Values]) -> bool:
    """Return True if no value is in two of the `sets`."""
    known = [values for values in sets if values is not None]
    return len(known) == len(sets) and sum(map(len, known)) == len(frozenset().union(*known))


def _differ(options: Sequence[_Facts], kind: str) -> bool:
    """Return True if no value of the type `kind` matches two of the `options`, which all allow this type."""
    if len(options) <= 1 or _are_distinct([facts.values for facts in options]):
        return True
    tags = frozenset.intersection(*(facts.required for facts in options)) if kind == "object" else ()
    return any(_are_distinct([facts.properties.get(tag) for facts in options]) for tag in tags)
