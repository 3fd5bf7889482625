"""A `Marker` is a string, such as `</think>`, at which reasoning or a tool call in an answer begins or ends."""

from __future__ import annotations

from dataclasses import dataclass

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Marker:
    """A `Marker` is a string that begins or ends a section of an answer, and may be a special token."""

    text: str
    special_id: int | None  # id of the special token; None: the tokenizer treats the string like any other text
