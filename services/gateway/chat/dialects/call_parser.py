"""A `CallParser` parses the tool calls of an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from services.gateway.chat.tool_call_delta import ToolCallDelta


class CallParser(ABC):
    """A `CallParser` parses one section of tool calls, beginning with the text after the marker of the section.

    `is_broken` becomes True as soon as the text cannot become a valid call, and `is_whole` at the end of the section.
    `num_calls` counts the whole calls up to now.
    """

    def __init__(self, start: str, index: int) -> None:
        self.is_whole = self.is_broken = False
        self.num_calls = 0
        self._index = index
        self._raw: list[str] = [start]
        self._deltas: list[ToolCallDelta] = []

    @property
    def raw(self) -> str:
        """Return the text since the end of the last whole call; before the first, with the marker of the section."""
        return "".join(self._raw)

    def push(self, text: str) -> str:
        """Add `text`, up to the end of a call, and return the rest of `text`.

        Without such an end in `text`, the rest is empty.
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
        """Return a list with the piece of the call that is new since the last `take`; the list may be empty."""
        deltas, self._deltas = self._deltas, []
        arguments = "".join(delta.arguments for delta in deltas)
        if not deltas or not (deltas[0].id or arguments):
            return []
        return [ToolCallDelta(deltas[0].index, deltas[0].id, deltas[0].name, arguments)]
