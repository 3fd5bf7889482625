"""A `Marker` is a string, such as `</think>`, at which reasoning or a tool call in an answer begins or ends."""

from __future__ import annotations

from dataclasses import dataclass

THINK_START, THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class Marker:
    """A `Marker` is a string that begins or ends a section of an answer, and may be one token of the vocabulary.

    A marker with a `token_id` is only the token with this id. The same string in other tokens is ordinary text.
    """

    text: str
    token_id: int | None  # id of the added token; None: the tokenizer treats the string like any other text
