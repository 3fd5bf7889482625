"""A `SchemaBudget` limits the size of the JSON schemas of one request, before anything is built from the schemas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 128  # levels to which a schema may be nested
# keywords that no grammar reads, and whose texts do not count towards the budget
NOT_COUNTED = frozenset({"title", "description", "default", "examples", "$comment", "$schema", "$id"})


@dataclass(frozen=True)
class SchemaBudget:
    """A `SchemaBudget` holds the largest number of objects and lists, and of bytes, of a request's JSON schemas."""

    max_nodes: int
    max_bytes: int

    def check(self, schemas: list[tuple[str, Any]]) -> None:
        """Raise ValueError if the pairs (parameter, schema) together are larger than the budget.

        Titles, descriptions, defaults and examples do not count. The message names the parameter that is too large.
        """
        num_nodes = num_bytes = 0
        for param, schema in schemas:
            waiting: list[tuple[Any, int]] = [(schema, 1)]
            while waiting:
                value, depth = waiting.pop()
                if isinstance(value, dict):
                    counted = [key for key in value if key not in NOT_COUNTED or not isinstance(value[key], str)]
                    num_bytes += sum(map(_size, counted))
                    waiting += [(value[key], depth + 1) for key in counted]
                elif isinstance(value, list):
                    waiting += [(item, depth + 1) for item in value]
                else:
                    num_bytes += _size(value)
                    continue
                num_nodes += 1
                if num_nodes > self.max_nodes:
                    raise ValueError(f"{param} is too large: JSON schemas may hold {self.max_nodes} objects and lists.")
                if num_bytes > self.max_bytes:
                    raise ValueError(f"{param} is too large: JSON schemas may hold {self.max_bytes} bytes of text.")
                if depth > MAX_DEPTH:
                    raise ValueError(f"{param} is nested too deep: at most {MAX_DEPTH} levels are allowed.")
        if num_bytes > self.max_bytes:
            raise ValueError(f"{param} is too large: JSON schemas may hold {self.max_bytes} bytes of text.")


def _size(value: Any) -> int:
    return len(value.encode()) if isinstance(value, str) else 8
