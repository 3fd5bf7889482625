"""A `StopMatcher` finds the strings of a `StopStrings` in text that arrives in pieces."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class StopStrings:
    """A `StopStrings` holds stop strings with the tables to find them, and may be shared by any number of matchers."""

    def __init__(self, stops: Iterable[str]) -> None:
        self.patterns = [_Pattern(stop) for stop in stops]


class StopMatcher:
    """A `StopMatcher` passes text on until a stop string is complete. No part of the stop string is passed on.

    Matching takes time linear in the length of the text, and the result does not depend on how the text is cut into
    pieces. Text is held back only while the text may be the beginning of a stop string.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._patterns = stops.patterns
        self._matched = [0] * len(self._patterns)  # length of each stop string's prefix at the end of the text
        self._held = ""
        self.stop = ""  # the stop string that was found

    def push(self, text: str) -> tuple[str, bool]:
        """Add `text`, and return the pair (text that may now be shown, True if a stop string was found).

        After a stop string was found, `flush` returns the text that follows the stop string.
        """
        if not self._patterns:
            return text, False
        self._held += text
        first_new = len(self._held) - len(text)
        for position, char in enumerate(text, first_new + 1):
            if stop_len := self._advance(char):
                shown, self.stop = self._held[: position - stop_len], self._held[position - stop_len : position]
                self._held = self._held[position:]
                return shown, True
        num_shown = len(self._held) - max(self._matched)
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return shown, False

    def _advance(self, char: str) -> int:
        """Add the character `char`, and return the length of the longest stop string that ends with `char`.

        Returns 0 if no stop string ends with `char`.
        """
        longest = 0
        for n, pattern in enumerate(self._patterns):
            matched = self._matched[n] = pattern.advance(self._matched[n], char)
            if matched == len(pattern.text):
                longest = max(longest, matched)
        return longest

    def flush(self) -> str:
        """Return the text that the matcher holds back, and remove the text from the matcher."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """A `_Pattern` finds one string in a text, character by character (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        # For each prefix of the string, the length of the prefix's longest border. A border is a shorter prefix that
        # is also a suffix.
        self._borders = array("L", [0])
        for char in text[1:]:
            self._borders.append(self.advance(self._borders[-1], char))

    def advance(self, matched: int, char: str) -> int:
        """Return the length of the longest prefix of the string with which a text ends, after `char` is added.

        Before `char`, the text ended with the first `matched` characters of the string.
        """
        if matched == len(self.text):
            matched = self._borders[matched - 1]
        while matched and self.text[matched] != char:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == char)
