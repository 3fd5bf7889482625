"""A `UniqueArrays` lists all arrays that a `uniqueItems` allows, for an enum, because llguidance lacks the keyword."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from typing import Any

from services.gateway.schema.errors import UnsupportedKeyword

MAX_ARRAYS = 512  # arrays that one `uniqueItems` may become
MAX_CHARS = 2**16  # characters of all such arrays of one schema


class UniqueArrays:
    """A `UniqueArrays` makes the arrays for one schema, and limits the characters of all arrays together."""

    def __init__(self) -> None:
        self._num_chars = 0

    def of(self, values: Sequence[Any], shortest: int, longest: int | None, path: str) -> list[Any]:
        """Return all arrays of `shortest` to `longest` of the `values`, each value at most once.

        Raises UnsupportedKeyword, whose message begins with `path`, if there are no such arrays or too many.
        """
        values = list({json.dumps(value): value for value in values}.values())
        sizes = [len(json.dumps(value)) for value in values]
        longest = len(values) if longest is None else min(longest, len(values))
        arrays: list[Any] = []
        for length in range(shortest, longest + 1):
            for arranged in permutations(range(len(values)), length):
                self._num_chars += sum(sizes[index] for index in arranged)
                if len(arrays) == MAX_ARRAYS or self._num_chars > MAX_CHARS:
                    raise UnsupportedKeyword(path, f"is supported only where at most {MAX_ARRAYS} short arrays match")
                arrays.append([values[index] for index in arranged])
        if not arrays:
            raise UnsupportedKeyword(path, "allows no array, because minItems is larger than the number of values")
        return arrays
