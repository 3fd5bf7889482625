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


class MarkerTokens:
    """A `MarkerTokens` holds the positions in an answer at which tokens begin that are markers."""

    def __init__(self) -> None:
        self._positions: set[int] = set()  # for each token that is a marker, the number of characters before the token
        self._num_chars = 0

    def expect(self, position: int) -> None:
        """Note that a token which is a marker begins after `position` characters of the answer."""
        self._positions.add(position)

    def add_text(self, text: str) -> None:
        """Add the next piece of the answer's text."""
        self._num_chars += len(text)

    def is_marker(self, marker: Marker, after: str) -> bool:
        """Return True if the text of `marker` that stands directly before `after`, the end of the answer, is a marker.

        The text of a marker with a `token_id` is a marker only where `expect` noted a token.
        """
        return marker.token_id is None or self._num_chars - len(after) - len(marker.text) in self._positions
