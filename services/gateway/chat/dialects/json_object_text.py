"""A `JsonObjectText` finds the end of a JSON object in text that arrives in pieces."""

from __future__ import annotations

import math
import re

from services.gateway.schema.json_text import mend_escapes, nearest_float

STRING_RUN = re.compile(r'[^"\\]+')  # text inside a string, up to its end or an escape
RUN = re.compile(r'[^"{}\[\]\-0-9]+')  # text outside of strings and numbers that changes no nesting
NUMBER_STARTS, NUMBER_RUN = "-0123456789", re.compile(r"[0-9.eE+-]*")
ESCAPE_LEN, UNICODE_LEN, PAIR_LEN = 2, 6, 12  # characters of \n, of \u0041, and of a surrogate pair
HIGH_SURROGATE = re.compile(r"\\u[dD][89abAB]")


class JsonObjectText:
    """A `JsonObjectText` passes on the text of one JSON object, which begins with `{`, until the object ends.

    The text is passed on unchanged, with two exceptions, because parsers of clients refuse such values: the escape of
    half a surrogate pair becomes the escape of U+FFFD, and a number that is too large for a float becomes the largest
    float. Text is held back only while it may be part of an escape or of a number. The time is linear in the length of
    the text. Brackets are counted, and nothing else is checked.
    """

    def __init__(self) -> None:
        self.is_whole = False
        self._depth, self._is_in_string = 0, False
        self._held = ""  # the beginning of an escape
        self._number: list[str] = []  # the pieces of a number that may go on; empty outside of numbers

    def push(self, text: str) -> tuple[str, str]:
        """Add `text`, and return the pair (text that may now be shown, text after the end of the object)."""
        text, self._held = self._held + text, ""
        shown: list[str] = []
        position = 0
        while position < len(text) and not self.is_whole:
            if (found := self._next(text, position)) is None:
                self._held = text[position:]
                break
            piece, position = found
            shown.append(piece)
        return "".join(shown), text[position:] if self.is_whole else ""

    def _next(self, text: str, position: int) -> tuple[str, int] | None:
        """Return the next piece to show and the position after the piece, or None if an escape is not complete."""
        if self._is_in_string:
            return self._in_string(text, position)
        if self._number or text[position] in NUMBER_STARTS:
            return self._in_number(text, position)
        return self._outside(text, position)

    def _in_string(self, text: str, position: int) -> tuple[str, int] | None:
        if run := STRING_RUN.match(text, position):
            return run[0], run.end()
        if text[position] == '"':
            self._is_in_string = False
            return '"', position + 1
        length = UNICODE_LEN if text.startswith("\\u", position) else ESCAPE_LEN
        following = text[position + UNICODE_LEN : position + UNICODE_LEN + 2]
        if HIGH_SURROGATE.match(text, position) and "\\u".startswith(following):
            length = PAIR_LEN
        escape = text[position : position + length]
        return (mend_escapes(escape), position + length) if len(escape) == length else None

    def _in_number(self, text: str, position: int) -> tuple[str, int]:
        """Add a piece to the number, which is shown only when it has ended."""
        run = NUMBER_RUN.match(text, position)
        assert run is not None
        self._number.append(run[0])
        if run.end() == len(text):
            return "", run.end()
        number, self._number = "".join(self._number), []
        return _finite(number), run.end()

    def _outside(self, text: str, position: int) -> tuple[str, int]:
        char = text[position]
        if char in '"{}[]':
            self._is_in_string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            self.is_whole = not self._depth
            return char, position + 1
        run = RUN.match(text, position)
        assert run is not None
        return run[0], run.end()


def _finite(number: str) -> str:
    try:
        is_infinite = not number.lstrip("-").isdecimal() and math.isinf(float(number))
    except ValueError:
        return number  # text that is no number is passed on unchanged
    return repr(nearest_float(number)) if is_infinite else number
