"""A `StopMatcher` finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """A `StopMatcher` passes text on until a stop string is complete, and never passes on a part of that string.

    There is one Knuth-Morris-Pratt automaton per stop string. The time is linear in the length of the text, and the
    result does not depend on how the text is cut into pieces. Text is held back only while it is the beginning of a
    stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.stop = ""  # the stop string that was found

    def push(self, text: str) -> tuple[str, bool]:
        """Add `text`, and return the text that may be shown now and whether a stop string was found.

        If one was found, `flush` returns the text that follows it.
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
        """Return the length of the longest stop string that ends with this character, or 0 if none ends."""
        ended = [automaton.advance(char) for automaton in self._automata]
        return max((len(a.pattern) for a, end in zip(self._automata, ended, strict=True) if end), default=0)

    def flush(self) -> str:
        """Return the text that was held back, and hold nothing back any more."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """An `_Automaton` matches one pattern, one character after the other (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.matched = pattern, 0
        self._borders = [0]  # for each prefix, the length of its longest proper prefix that is also its suffix
        for char in pattern[1:]:
            self._borders.append(self._next(self._borders[-1], char))

    def _next(self, matched: int, char: str) -> int:
        while matched and self.pattern[matched] != char:
            matched = self._borders[matched - 1]
        return matched + (self.pattern[matched] == char)

    def advance(self, char: str) -> bool:
        """Add one character, and return True if the text now ends with the pattern."""
        self.matched = self._next(self.matched, char)
        return self.matched == len(self.pattern)
