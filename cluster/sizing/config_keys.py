"""`ConfigKeys` read values from a `config.json` and check each value when it is read.

A missing or wrong value raises ValueError with the key, the value and the allowed values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LISTED = {str: "names", int: "integers"}


@dataclass(frozen=True)
class ConfigKeys:
    """`ConfigKeys` are the keys of a parsed `config.json`, whose values are checked when they are read."""

    raw: Mapping[str, Any]

    def need(self, key: str) -> int:
        """Return the value of the required key `key`, a positive integer."""
        value = self.raw.get(key)
        if value is None:
            raise ValueError(f"config.json lacks the key {key}")
        if not _is_whole(value) or value < 1:
            raise ValueError(f"config.json has {key} = {value!r}; allowed is a positive integer")
        return int(value)

    def whole(self, key: str, default: int) -> int:
        """Return the value of `key`, an integer of at least 0, or `default` if the key is missing or null."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not _is_whole(value) or value < 0:
            raise ValueError(f"config.json has {key} = {value!r}; allowed is an integer from 0 up")
        return int(value)

    def upto(self, key: str, default: int, most: int) -> int:
        """Return the value of `key`, an integer from 0 to `most`, or `default` if the key is missing or null."""
        value = self.whole(key, default)
        if value > most:
            raise ValueError(f"config.json has {key} = {value}; supported are 0 to {most}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return the value of `key`, a boolean, or `default` if the key is missing or null."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"config.json has {key} = {value!r}; allowed are true and false")
        return default if value is None else value

    def items(self, key: str, kind: type[str] | type[int]) -> list[Any]:
        """Return the value of `key`, a list with items of type `kind`; empty if the key is missing or null."""
        values = self.raw.get(key)
        if values is None:
            return []
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"config.json has {key} = {values!r}; allowed is a list of {LISTED[kind]}")
        return values


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
