"""Markers are the strings with which models mark reasoning and tool calls in an answer."""

from __future__ import annotations

from dataclasses import dataclass

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Marker:
    """A `Marker` is a string that structures answers, which may be a special token of the tokenizer."""

    text: str
    special_id: int | None  # id of the special token; None: the string is tokenized like any text
