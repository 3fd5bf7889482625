"""A `TextRules` makes grammar rules for a string argument, which the model writes as text without quotes.

The library that enforces grammars knows JSON schemas only for JSON text. For text without quotes, the schema is
converted to a regular language: terminals of llguidance's dialect of Lark, which has intersections (`&`) and
complements (`~`). So `not`, `if` and `oneOf` hold exactly, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.gateway.schema.counted_chars import CountedChars
from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.formats import encoding_regex, format_regex
from services.gateway.schema.references import ALL_TYPES, MAX_NESTING, SchemaRoot, wrong_type
from services.gateway.schema.regex import UnsupportedPattern, num_counted, whole_match

ANY_TEXT = "/(?s:.*)/"
MAX_ONE_OF = 16  # options of one oneOf, each of which excludes all others


class NoText(UnsupportedKeyword):
    """A `NoText` says that a schema allows no string."""


class MarkerInValue(ValueError):
    """A `MarkerInValue` names a value that no argument can have, because it contains the marker that ends arguments."""


class TextRules:
    """A `TextRules` converts the schemas of string arguments of one tool; `rules` are the terminals that they share.

    - `root`: the whole schema of the tool's arguments.
    - `prefix`: the beginning of the terminals' names, in capital letters.
    - `is_strict`: True: raise UnsupportedKeyword for a constraint that cannot be expressed. False: omit the constraint.
    - `end_marker`: the text that ends an argument, and that a string can therefore not contain.
    - `counted`: counts the characters of lengths and patterns.
    """

    def __init__(self, root: SchemaRoot, prefix: str, is_strict: bool, end_marker: str, counted: CountedChars) -> None:
        self._root, self._prefix, self._is_strict, self._end_marker = root, prefix, is_strict, end_marker
        self._counted = counted
        self.rules: list[str] = []
        self._terminals: dict[str, str] = {}  # names of terminals, by reference; "" where the reference allows any text
        self._open: list[str] = []  # references that are being converted
        self._depth = 0  # schemas that are being converted
        self._keywords: dict[str, Callable[[Mapping[str, Any], str, bool], str]] = {
            "type": self._type,
            "enum": self._enum,
            "const": self._const,
            "pattern": self._pattern,
            "format": self._format,
            "contentEncoding": self._encoding,
            "minLength": self._length,
            "maxLength": self._length,
            "$ref": self._reference,
            "$dynamicRef": self._unknown_reference,
            "$recursiveRef": self._unknown_reference,
            "allOf": self._all_of,
            "anyOf": self._any_of,
            "oneOf": self._one_of,
            "not": self._not,
            "if": self._if,
        }

    def expression(self, schema: Any, path: str) -> str:
        """Return a terminal's expression for the strings that `schema` allows, or "" if it allows any text.

        Raises UnsupportedKeyword, whose messages begin with a path below `path`, and ValueError if an enum's value
        contains the marker that ends an argument.
        """
        try:
            return self._language(schema, path, self._is_strict)
        except NoText:
            if self._is_strict:
                raise
            return ""

    def _language(self, schema: Any, path: str, is_strict: bool) -> str:
        self._root.count_read(path)
        if self._depth >= MAX_NESTING:
            raise UnsupportedKeyword(path, f"stands below more than {MAX_NESTING} schemas and references")
        self._depth += 1
        try:
            return self._conjunction(schema, path, is_strict)
        finally:
            self._depth -= 1

    def _conjunction(self, schema: Any, path: str, is_strict: bool) -> str:
        if schema is False:
            raise NoText(path, "allows no value")
        parts: dict[str, None] = {}
        for keyword, convert in self._keywords.items():
            if not isinstance(schema, Mapping) or keyword not in schema:
                continue
            try:
                parts[convert(schema, f"{path}.{keyword}", is_strict)] = None
            except NoText:
                raise
            except UnsupportedKeyword:
                if is_strict:
                    raise
        return " & ".join(f"({part})" for part in parts if part)

    def _type(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if wrong := [name for name in named if name not in (*ALL_TYPES, None)]:
            raise UnsupportedKeyword(path, wrong_type(wrong[0]))
        if "string" not in named and None not in named:
            raise NoText(path, f"allows no string, but {schema['type']!r:.100}")
        return ""

    def _enum(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        if not isinstance(schema["enum"], list):
            raise UnsupportedKeyword(path, "must be a list of values")
        return self._values(schema["enum"], path)

    def _const(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        return self._values([schema["const"]], path)

    def _values(self, values: Sequence[Any], path: str) -> str:
        strings = list(dict.fromkeys(value for value in values if isinstance(value, str)))
        if not strings:
            raise NoText(path, "holds no string")
        for value in strings:
            if self._end_marker in value:
                reason = f"holds {value!r:.100}, but no argument can contain {self._end_marker!r}, which ends arguments"
                raise MarkerInValue(f"{path} {reason}.")
        return " | ".join(map(json.dumps, strings))

    def _pattern(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        regex = regex_of(whole_match, schema["pattern"], path)
        self._counted.add(schema, num_counted(schema["pattern"]), path)
        return regex

    def _format(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        return regex_of(format_regex, schema["format"], path)

    def _encoding(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        return regex_of(encoding_regex, schema["contentEncoding"], path)

    def _length(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        shortest, longest = length_of(schema, "minLength", path) or 0, length_of(schema, "maxLength", path)
        if longest is not None and longest < shortest:
            raise NoText(path, f"allows at least {shortest} and at most {longest} characters")
        keyword = path.rpartition(".")[2]
        value = shortest if keyword == "minLength" else longest
        if (not value and keyword == "minLength") or value is None:
            return ""
        self._counted.add(schema, value, path)
        return f"/(?s:.{{{value},}})/" if keyword == "minLength" else f"/(?s:.{{0,{value}}})/"

    def _reference(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        reference = schema["$ref"]
        target = self._root.resolve(reference, path)
        if reference in self._open:
            raise UnsupportedKeyword(path, f"refers to {reference!r:.100}, which refers to itself")
        if reference not in self._terminals:
            self._open.append(reference)
            try:
                found = self._language(target, path, is_strict)
            finally:
                self._open.pop()
            self._terminals[reference] = self._terminal(found) if found else ""
        return self._terminals[reference]

    def _terminal(self, expression: str) -> str:
        """Add a terminal for `expression`, and return its name."""
        name = f"{self._prefix}_{len(self.rules)}"
        self.rules.append(f"{name}: {expression}")
        return name

    def _unknown_reference(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        raise UnsupportedKeyword(path, "is not supported")

    def _all_of(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        parts = [
            self._language(part, f"{path}[{n}]", is_strict) for n, part in enumerate(schemas_of(schema, "allOf", path))
        ]
        return " & ".join(f"({part})" for part in dict.fromkeys(parts) if part)

    def _any_of(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        return _union(self._options(schemas_of(schema, "anyOf", path), path, is_strict))

    def _one_of(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        options = schemas_of(schema, "oneOf", path)
        if all(_is_constant(option) for option in options):
            values = [option["const"] for option in options]
            return self._values([value for value in values if values.count(value) == 1], path)
        # No option may allow more texts than its schema, because each option also excludes its texts from the others.
        found = self._options(options, path, is_strict=True)
        if len(found) > MAX_ONE_OF:
            raise UnsupportedKeyword(path, f"must hold at most {MAX_ONE_OF} schemas, not {len(found)}")
        found = [self._terminal(option or ANY_TEXT) for option in found]
        return _union(
            [
                " & ".join([f"({option})", *(f"~({other})" for m, other in enumerate(found) if m != n)])
                for n, option in enumerate(found)
            ]
        )

    def _options(self, options: Sequence[Any], path: str, is_strict: bool) -> list[str]:
        """Return an expression for each of the `options` that allows a string. Raises NoText if no option does.

        An option that is only a reference to the schema that holds the options adds nothing, and is left out.
        """
        found = []
        for n, option in enumerate(options):
            if isinstance(option, Mapping) and option.keys() == {"$ref"} and option["$ref"] in self._open[-1:]:
                continue
            try:
                found.append(self._language(option, f"{path}[{n}]", is_strict))
            except NoText:
                continue
        if not found:
            raise NoText(path, "allows no string")
        return found

    def _not(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        try:
            found = self._language(schema["not"], path, is_strict=True)
        except NoText:
            return ""
        if not found:
            raise NoText(path, "allows no string")
        return f"~({found})"

    def _if(self, schema: Mapping[str, Any], path: str, is_strict: bool) -> str:
        base = path.removesuffix(".if")
        options = []
        for condition, branch in [(schema["if"], "then"), ({"not": schema["if"]}, "else")]:
            try:
                whole = {"allOf": [condition, schema.get(branch, True)]}
                options.append(self._language(whole, base, is_strict=True))
            except NoText:
                continue
        if not options:
            raise NoText(path, "allows no string")
        return _union(options)


def _union(options: Sequence[str]) -> str:
    return "" if "" in options else " | ".join(f"({option})" for option in dict.fromkeys(options))


def _is_constant(schema: Any) -> bool:
    return isinstance(schema, Mapping) and "const" in schema and schema.keys() <= {"const", "title", "description"}


def schemas_of(schema: Mapping[str, Any], keyword: str, path: str) -> list[Any]:
    """Return the list of schemas that `keyword` holds. Raises UnsupportedKeyword if it holds no such list."""
    if not isinstance(schema[keyword], list) or not schema[keyword]:
        raise UnsupportedKeyword(path, "must be a list of schemas")
    found: list[Any] = schema[keyword]
    return found


def length_of(schema: Mapping[str, Any], keyword: str, path: str) -> int | None:
    """Return the number that `keyword` holds, or None if the schema lacks the keyword."""
    value = schema.get(keyword)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
        raise UnsupportedKeyword(
            f"{path.rpartition('.')[0]}.{keyword}", f"must be a number of at least 0, not {value!r:.100}"
        )
    return int(value)


def regex_of(find: Callable[[str], str | None], value: Any, path: str) -> str:
    """Return a regular expression between slashes, or "" if `find` finds None for the keyword's `value`."""
    if not isinstance(value, str):
        raise UnsupportedKeyword(path, f"must be a string, not {value!r:.100}")
    try:
        found = find(value)
    except UnsupportedPattern as error:
        raise UnsupportedKeyword(path, f"{value!r:.100} {error}") from error
    return "" if found is None else f"/{found}/"
