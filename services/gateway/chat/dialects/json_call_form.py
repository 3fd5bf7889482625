"""A `JsonCallForm` holds the markers and the words around tool calls whose arguments are a JSON object."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.chat.markers import Marker

CALLS_START, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_START, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
CALL_TYPE = "function"  # the type of all tools, which stands before the name in the fenced form
FENCE, FENCE_END = "```json", "```"


@dataclass(frozen=True)
class JsonCallForm:
    """A `JsonCallForm` is the fenced or the unfenced form of calls in DeepSeek's formats.

    A section of calls begins with `calls_start` and ends with `calls_end`. Each call stands between `call_start` and
    `call_end`:

    | form     | call                                                      | between calls |
    |----------|-----------------------------------------------------------|---------------|
    | fenced   | function `separator` NAME, a line with ```json, then the  | line end      |
    |          | arguments, and a line with ```                            |               |
    | unfenced | NAME `separator` arguments                                | nothing       |
    """

    calls_start: Marker
    calls_end: Marker
    call_start: Marker
    separator: Marker
    call_end: Marker
    is_fenced: bool

    @property
    def between(self) -> str:
        """Return the text between two calls of a section."""
        return "\n" if self.is_fenced else ""
