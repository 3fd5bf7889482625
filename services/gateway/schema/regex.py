"""`whole_match` converts a pattern of JSON Schema to a regular expression that a grammar can use.

A pattern is a regular expression of ECMA-262 with the flag u, and may match anywhere in a string. The result is in the
syntax of Rust's regex crate, matches a whole string, and consists of printable ASCII characters without a slash.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.engine.contract.sampling_params import MAX_COUNTED_CHARS

MAX_PATTERN = 4096  # characters of a pattern
MAX_DEPTH = 50  # nested groups of a pattern
MAX_REPEAT = MAX_COUNTED_CHARS
CHARS_PER_PROPERTY = 8  # a Unicode property such as \p{L} takes as many lexer states as 8 other characters
MAX_BRANCHES = 64  # branches into which a pattern is divided to find its anchors
ANY_TEXT = "(?s:.*)"

LINE_ENDS = r"\x{a}\x{d}\x{2028}\x{2029}"
SPACES = r"\x{9}-\x{d}\x{20}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
CLASSES = {  # the sets of ECMA-262, which has ASCII digits and letters only
    "d": "0-9",
    "w": "A-Za-z0-9_",
    "s": SPACES,
}
CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "v": "\v", "f": "\f", "0": "\0"}


class UnsupportedPattern(ValueError):
    """An `UnsupportedPattern` says which part of a pattern a grammar cannot express."""


@dataclass(frozen=True)
class _Text:
    """A `_Text` is a part of a pattern that is already converted, and holds no anchor.

    `num_counted` is the number of characters that its repetitions count.
    """

    text: str
    num_counted: int = 1


@dataclass(frozen=True)
class _Anchor:
    """An `_Anchor` is `^` (the start of the text) or `$` (the end of the text)."""

    is_start: bool


@dataclass(frozen=True)
class _Sequence:
    """A `_Sequence` is the parts of a pattern that follow one another."""

    parts: tuple[_Node, ...]


@dataclass(frozen=True)
class _Choice:
    """A `_Choice` is the branches of a pattern of which one must match."""

    branches: tuple[_Node, ...]


_Node = _Text | _Anchor | _Sequence | _Choice


def whole_match(pattern: str) -> str:
    """Return a regular expression for all texts in which `pattern` matches.

    Raises UnsupportedPattern, whose message completes a sentence such as "The pattern ...".
    """
    if len(pattern) > MAX_PATTERN:
        raise UnsupportedPattern(f"is longer than {MAX_PATTERN} characters")
    return _anchored(_Parser(pattern).parse())


def num_counted(pattern: str) -> int:
    """Return how many characters a grammar counts for `pattern`, which `whole_match` can convert."""
    return _num_counted(_Parser(pattern).parse())


def literal(text: str) -> str:
    """Return a regular expression that matches exactly `text`."""
    return "".join(map(_char, text))


def _char(char: str) -> str:
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}"


class _Parser:
    """A `_Parser` reads a pattern of ECMA-262 by recursive descent."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at = pattern, 0

    def parse(self) -> _Node:
        node = self._choice(0)
        if self._at < len(self._pattern):
            raise UnsupportedPattern("has a ')' without '('")
        return node

    def _peek(self, text: str) -> bool:
        return self._pattern.startswith(text, self._at)

    def _take(self, text: str) -> bool:
        is_there = self._peek(text)
        self._at += len(text) if is_there else 0
        return is_there

    def _next(self) -> str:
        if self._at >= len(self._pattern):
            raise UnsupportedPattern("ends too early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _choice(self, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise UnsupportedPattern(f"nests more than {MAX_DEPTH} groups")
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))
        return _Choice(tuple(branches)) if len(branches) > 1 else branches[0]

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._at < len(self._pattern) and not self._peek("|") and not self._peek(")"):
            parts.append(self._repeated(self._atom(depth)))
        return _Sequence(tuple(parts))

    def _atom(self, depth: int) -> _Node:
        match char := self._next():
            case "^" | "$":
                return _Anchor(char == "^")
            case ".":
                return _Text(f"[^{LINE_ENDS}]")
            case "(":
                return self._group(depth)
            case "[":
                return _with_count(self._class())
            case "\\":
                return _with_count(self._escape())
            case "*" | "+" | "?":
                raise UnsupportedPattern(f"has a {char!r} that repeats nothing")
        return _Text(_char(char))

    def _group(self, depth: int) -> _Node:
        for name, meaning in [
            ("?=", "looks ahead"),
            ("?!", "looks ahead"),
            ("?<=", "looks behind"),
            ("?<!", "looks behind"),
        ]:
            if self._peek(name):
                raise UnsupportedPattern(f"{meaning} with '({name}'")
        if self._take("?<"):
            while self._next() != ">":
                pass
        elif self._take("?") and not self._take(":"):
            raise UnsupportedPattern("has a group with flags")
        node = self._choice(depth + 1)
        if not self._take(")"):
            raise UnsupportedPattern("has a '(' without ')'")
        return node

    def _repeated(self, node: _Node) -> _Node:
        quantifier = self._quantifier()
        if not quantifier:
            return node
        self._take("?")  # a lazy quantifier matches the same texts
        numbers = [int(number) for number in quantifier.strip("{}").split(",") if number.isdecimal()]
        return _Text(f"(?:{_plain(node)}){quantifier}", _num_counted(node) * max([1, *numbers]))

    def _quantifier(self) -> str:
        for quantifier in ("*", "+", "?"):
            if self._take(quantifier):
                return quantifier
        end = self._pattern.find("}", self._at)
        least, comma, most = (
            self._pattern[self._at + 1 : end].partition(",") if self._peek("{") and end > 0 else ("", "", "")
        )
        if not least.isdecimal() or not (most.isdecimal() or not most) or not (least + most).isascii():
            return ""
        self._at = end + 1
        if len(least + most) > 10 or int(least) > MAX_REPEAT or int(most or 0) > MAX_REPEAT:
            raise UnsupportedPattern(f"repeats a part more than {MAX_REPEAT} times")
        if most and int(most) < int(least):
            raise UnsupportedPattern("has numbers of repetitions in the wrong order")
        return f"{{{int(least)}{comma}{int(most) if most else ''}}}"

    def _escape(self) -> str:
        """Return the regular expression of an escape outside a class; the backslash has been read."""
        char = self._next()
        if (char.isdecimal() and char != "0") or char == "k":
            raise UnsupportedPattern("refers back to a group")
        if char in "bB":
            raise UnsupportedPattern(f"has a word boundary '\\{char}'")
        return self._set(char) or _char(self._escaped(char))

    def _set(self, char: str) -> str:
        """Return the class that the escape with the letter `char` stands for, or "" if the escape is one character."""
        if char.lower() in CLASSES:
            return f"[{'^' if char.isupper() else ''}{CLASSES[char.lower()]}]"
        if char in "pP":
            name = ""
            if self._take("{"):
                while not self._take("}"):
                    name += self._next()
            if not name or not name.replace("_", "").replace("=", "").isalnum():
                raise UnsupportedPattern("has a '\\p' without a Unicode property")
            return f"\\{char}{{{name}}}"
        return ""

    def _escaped(self, char: str) -> str:
        """Return the character that an escape with the letter `char` stands for."""
        if char in CONTROLS:
            return CONTROLS[char]
        if char == "c":
            return chr(ord(self._next()) % 32)
        if char == "x":
            return chr(self._hex(2))
        if char == "u":
            return self._unicode()
        if char.isalnum():
            raise UnsupportedPattern(f"has an unknown escape '\\{char}'")
        return char

    def _unicode(self) -> str:
        if self._take("{"):
            end = self._pattern.find("}", self._at)
            code = self._hex(end - self._at)
            self._at += 1
        else:
            code = self._hex(4)
            if 0xD800 <= code < 0xDC00 and self._take("\\u"):
                code = 0x10000 + ((code - 0xD800) << 10) + (self._hex(4) - 0xDC00)
        if 0xD800 <= code < 0xE000 or not 0 <= code < 0x110000:
            raise UnsupportedPattern("has an escape that is no Unicode character")
        return chr(code)

    def _hex(self, num: int) -> int:
        digits = "".join(self._next() for _ in range(num)) if 0 < num <= 8 else ""
        if not digits or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
            raise UnsupportedPattern("has an escape without hexadecimal digits")
        return int(digits, 16)

    def _class(self) -> str:
        """Return a class of characters; its '[' has been read."""
        is_negated, members = self._take("^"), list[str]()
        while not self._take("]"):
            first, is_set = self._member()
            if self._peek("-") and not self._peek("-]") and not is_set:
                self._at += 1
                last, is_set = self._member()
                if is_set:
                    members += [_char(first), _char("-"), last]
                elif first > last:
                    raise UnsupportedPattern("has a range of characters in the wrong order")
                else:
                    members.append(f"{_char(first)}-{_char(last)}")
            else:
                members.append(first if is_set else _char(first))
        if not members:
            if is_negated:
                return "(?s:.)"
            raise UnsupportedPattern("has an empty class '[]'")
        return f"[{'^' if is_negated else ''}{''.join(members)}]"

    def _member(self) -> tuple[str, bool]:
        """Return the next member of a class: the pair (character or set of characters, True if it is a set)."""
        char = self._next()
        if char != "\\":
            return char, False
        char = self._next()
        if char == "b":
            return "\b", False
        found = CLASSES.get(char) or self._set(char)
        return (found, True) if found else (self._escaped(char), False)


def _with_count(text: str) -> _Text:
    """Return a character, class or set, which counts more if it holds Unicode properties."""
    return _Text(text, CHARS_PER_PROPERTY if re.search(r"\\[pP]", text) else 1)


def _num_counted(node: _Node) -> int:
    match node:
        case _Text():
            return node.num_counted
        case _Sequence(parts) | _Choice(parts):
            return sum(map(_num_counted, parts))
    return 0


def _plain(node: _Node) -> str:
    """Return a part of a pattern as a regular expression. Raises UnsupportedPattern if the part has an anchor."""
    match node:
        case _Text():
            return node.text
        case _Sequence(parts):
            return "".join(f"(?:{_plain(part)})" if isinstance(part, _Choice) else _plain(part) for part in parts)
        case _Choice(branches):
            return "|".join(map(_plain, branches))
    raise UnsupportedPattern(f"has a {'^' if node.is_start else '$'!r} in its middle")


def _has_anchor(node: _Node) -> bool:
    match node:
        case _Text():
            return False
        case _Sequence(parts) | _Choice(parts):
            return any(map(_has_anchor, parts))
    return True


def _anchored(node: _Node) -> str:
    """Return a regular expression for all texts in which the part `node` matches."""
    branches = list(_branches(node))
    if len(branches) > MAX_BRANCHES:
        raise UnsupportedPattern("has too many anchors")
    return "|".join(map(_whole, branches))


def _branches(node: _Node, depth: int = 0) -> list[tuple[_Node, ...]]:
    """Return the sequences of which one must match, such that anchors stand only at the ends of the sequences."""
    if depth > MAX_DEPTH:
        raise UnsupportedPattern("has too many anchors")
    match node:
        case _Choice(branches):
            return [found for branch in branches for found in _branches(branch, depth + 1)]
        case _Sequence(parts):
            flat = _flat(parts)
            for index in {0, len(flat) - 1} if flat else ():
                if isinstance(flat[index], _Choice) and _has_anchor(flat[index]):
                    choices = _branches(flat[index], depth + 1)
                    made = [_Sequence((*flat[:index], *choice, *flat[index + 1 :])) for choice in choices]
                    if len(made) > MAX_BRANCHES:
                        break
                    return [found for one in made for found in _branches(one, depth + 1)]
            return [flat]
    return [(node,)]


def _flat(parts: tuple[_Node, ...]) -> tuple[_Node, ...]:
    return tuple(one for part in parts for one in (_flat(part.parts) if isinstance(part, _Sequence) else (part,)))


def _whole(parts: tuple[_Node, ...]) -> str:
    first, last = 0, len(parts)
    while first < last and parts[first] == _Anchor(is_start=True):
        first += 1
    while first < last and parts[last - 1] == _Anchor(is_start=False):
        last -= 1
    body = _plain(_Sequence(parts[first:last]))
    return f"{'' if first else ANY_TEXT}{body}{'' if last < len(parts) else ANY_TEXT}"
