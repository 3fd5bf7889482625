"""A `CountedChars` limits how many characters the grammar of one request counts, for lengths and repetitions.

A grammar's lexer has a few states for each character that the grammar counts, and a limited number of states. The sum
is therefore checked first, so that no answer fails halfway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from services.engine.contract.sampling_params import MAX_COUNTED_CHARS
from services.gateway.schema.errors import UnsupportedKeyword

TEXT_KEYWORDS = ("pattern", "format", "contentEncoding", "minLength", "maxLength")


class CountedChars:
    """A `CountedChars` holds the number `num` of characters that one request's grammar counts so far."""

    def __init__(self, num: int = 0) -> None:
        self.num = num
        self._known: set[str] = set()

    def add(self, schema: Mapping[str, Any], num: int, path: str) -> None:
        """Count the `num` characters that the keyword at `path` of `schema` counts.

        Strings with equal constraints share their states, and are counted once. Raises UnsupportedKeyword if all
        strings together count too many characters.
        """
        texts = {keyword: schema[keyword] for keyword in TEXT_KEYWORDS if keyword in schema}
        key = json.dumps([path.rpartition(".")[2], texts])
        if key in self._known:
            return
        if self.num + num > MAX_COUNTED_CHARS:
            most = f"all lengths and repetitions of a request together may count {MAX_COUNTED_CHARS}"
            raise UnsupportedKeyword(path, f"counts {num} characters, but {most}, of which {self.num} are used")
        self._known.add(key)
        self.num += num
