"""Strings that structure the answers of this model family."""

from __future__ import annotations

from dataclasses import dataclass

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Marker:
    """A string that structures answers, and the single special token it is, where the tokenizer has it as one."""

    text: str
    special_id: int | None
