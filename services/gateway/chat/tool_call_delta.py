"""A `ToolCallDelta` is a piece of a tool call in an answer; `new_call` begins a call."""

from __future__ import annotations

import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCallDelta:
    """A `ToolCallDelta` is a piece of a tool call; all pieces of a call joined in order make the whole call.

    Only the first piece of a call holds the call's id and name. The `arguments` of all pieces joined are the text of
    one JSON object.
    """

    index: int  # number of the call in the answer, from 0
    id: str
    name: str
    arguments: str


def new_call(index: int, name: str) -> ToolCallDelta:
    """Return the first piece of a call of the function `name`, with a new id and without arguments."""
    return ToolCallDelta(index, f"call_{uuid.uuid4().hex[:24]}", name, "")
