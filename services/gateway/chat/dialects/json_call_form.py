"""A `JsonCallForm` holds the markers and the words around tool calls whose arguments are a JSON object."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from services.gateway.chat.markers import Marker

# markers of DeepSeek's formats
CALLS_START, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_START, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
CALL_TYPE = "function"  # the type of all tools, which stands before the name in the fenced form
FENCE, FENCE_END = "```json", "```"


class Slot(Enum):
    """A `Slot` is a place in a form that each call fills with other text."""

    NAME = 0  # the name of the function
    ARGUMENTS = 1  # the JSON object with the arguments


Part = Marker | str | Slot


@dataclass(frozen=True)
class JsonCallForm:
    """A `JsonCallForm` is the form of the calls in one chat format.

    - `calls_start`: the marker that begins a section of calls.
    - `call`: the parts of a call, in the order in which models write the parts. If `calls_end` is None, a section holds
      one call, and `calls_start` is not among the parts.
    - `calls_end`: the marker that ends a section of several calls.
    - `between`: the text between two calls.
    - `others`: other orders of the parts that some models write, too. All orders begin with the same character, and no
      grammar allows the other orders.
    """

    calls_start: Marker
    call: tuple[Part, ...]
    calls_end: Marker | None = None
    between: str = ""
    others: tuple[tuple[Part, ...], ...] = ()
