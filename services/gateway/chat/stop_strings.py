"""A `StopMatcher` finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """A `StopMatcher` passes text on until a stop string is complete. No part of the stop string is passed on.

    Each stop string has its own Knuth-Morris-Pratt automaton. Matching takes time linear in the length of the text, and
    the result does not depend on how the text is cut into pieces. Text is held back only while the text may be the
    beginning of a stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.stop = ""  # the stop string that was found

    def push(self, text: str) -> tuple[str, bool]:
        """Add `text`, and return the pair (text that may now be shown, True if a stop string was found).

        After a stop string was found, `flush` returns the text that follows the stop string.
        """
        if not self._automata:
            return text, False
        self._held += text
        first_new = len(self._held) - len(text)
        for position, char in enumerate(text, first_new + 1):
            if stop_len := self._advance(char):
                shown, self.stop = self._held[: position - stop_len], self._held[position - stop_len : position]
                self._held = self._held[position:]
                return shown, True
        num_shown = len(self._held) - max(automaton.matched for automaton in self._automata)
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return shown, False

    def _advance(self, char: str) -> int:
        """Add the character `char`, and return the length of the longest stop string that ends with `char`.

        Returns 0 if no stop string ends with `char`.
        """
        ended = [automaton.advance(char) for automaton in self._automata]
        return max((len(a.pattern) for a, end in zip(self._automata, ended, strict=True) if end), default=0)

    def flush(self) -> str:
        """Return the text that the matcher holds back, and remove the text from the matcher."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """An `_Automaton` finds one pattern in a text, character by character (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.matched = pattern, 0
        # For each prefix of the pattern, the length of the prefix's longest border. A border is a shorter prefix that
        # is also a suffix.
        self._borders = [0]
        for char in pattern[1:]:
            self._borders.append(self._next(self._borders[-1], char))

    def _next(self, matched: int, char: str) -> int:
        while matched and self.pattern[matched] != char:
            matched = self._borders[matched - 1]
        return matched + (self.pattern[matched] == char)

    def advance(self, char: str) -> bool:
        """Add the character `char` to the text, and return True if the text now ends with the pattern."""
        self.matched = self._next(self.matched, char)
        return self.matched == len(self.pattern)
