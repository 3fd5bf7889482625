"""A `CallParser` parses one section of tool calls in an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from services.gateway.chat.markers import Marker
from services.gateway.chat.tool_call_delta import ToolCallDelta

# Returns True if the text of a marker, which stands directly before the second argument in the answer, is the marker.
# The second argument is the end of the text that was pushed.
IsMarker = Callable[[Marker, str], bool]


class CallParser(ABC):
    """A `CallParser` parses one section of tool calls. The marker that begins the section is not pushed.

    - `start`: the text of this marker, with which the section's raw text begins.
    - `index`: the number of calls in the answer before the section.

    | attribute   | meaning                                                                  |
    |-------------|--------------------------------------------------------------------------|
    | `is_whole`  | True: the section has ended.                                             |
    | `is_broken` | True: the text after the last complete call cannot become another call.  |
    | `num_calls` | number of complete calls in the section up to now                        |
    """

    def __init__(self, start: str, index: int) -> None:
        self.is_whole = self.is_broken = False
        self.num_calls = 0
        self._index = index
        self._raw: list[str] = [start]
        self._deltas: list[ToolCallDelta] = []

    @property
    def raw(self) -> str:
        """Return the text after the last complete call; without a complete call, return the whole section up to now."""
        return "".join(self._raw)

    def push(self, text: str) -> str:
        """Add `text` up to the end of the next call or of the section, and return the rest of `text`.

        If neither a call nor the section ends in `text`, the rest is "".
        """
        before = self.num_calls
        rest = self._parse(text)
        self._raw.append(text[: len(text) - len(rest)])
        if self.num_calls > before:
            self._raw = []
        return rest

    @abstractmethod
    def _parse(self, text: str) -> str:
        """Parse `text` up to the end of a call or of the section, and return the rest.

        If the text cannot become a valid call, `is_broken` becomes True and the rest is empty.
        """

    def take(self) -> list[ToolCallDelta]:
        """Return the piece of the current call that was parsed since the last `take`, as a list of one or no delta."""
        deltas, self._deltas = self._deltas, []
        arguments = "".join(delta.arguments for delta in deltas)
        if not deltas or not (deltas[0].id or arguments):
            return []
        return [ToolCallDelta(deltas[0].index, deltas[0].id, deltas[0].name, arguments)]
