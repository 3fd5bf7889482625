"""An `XmlCallRules` makes the grammar rules for tool calls in XML, whose values are untyped text."""

from __future__ import annotations

import json
from typing import Any

from services.gateway.chat.dialects.call_rules import CallRules, json_rule, spelled
from services.gateway.chat.markers import Marker
from services.gateway.chat.tools import Tool, ToolUse, is_string_type
from services.gateway.schema.counted_chars import CountedChars
from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.json_schema import SchemaRewriter
from services.gateway.schema.raw_text import ANY_TEXT, TextRules
from services.gateway.schema.regex import literal

VALUE_END = "</parameter>"


def texts_without(marker: str) -> str:
    """Return a regular expression for all texts that do not contain `marker`.

    The first character of `marker` must not occur again in `marker`.

    A complement (`~`) would allow the same texts. But in an intersection with a counted length, the library would
    search all remaining lengths to find out that nothing may follow the marker, and give up.
    """
    first, rest = literal(marker[0]), marker[1:]
    assert marker[0] not in rest
    # Behind each first character comes a part of `rest`, and then nothing, a wrong character or a first character.
    tail = ""
    for index in range(len(rest) - 1, -1, -1):
        char = literal(rest[index])
        right = f"|{char}{tail}" if tail else ""
        tail = f"(?:[^{first}{char}][^{first}]*{right})?"
    return f"[^{first}]*(?:{first}{tail})*"


NO_VALUE_END = f"/{texts_without(VALUE_END)}/"


class XmlCallRules(CallRules):
    """An `XmlCallRules` holds the rules for calls between `call_start` and `call_end`, each with one function."""

    def __init__(
        self, tool_use: ToolUse, call_start: Marker, call_end: Marker, counted: CountedChars, is_relaxed: bool
    ) -> None:
        super().__init__(counted, is_relaxed)
        self.more = "" if tool_use.max_calls == 1 else '("\\n" call)*'
        self._add(f"calls: call {self.more}")
        self._add(f"call: {spelled(call_start)} call_rest")
        self._add(f"call_rest: function {spelled(call_end)}")
        self._add_functions(tool_use)

    def _add_function(self, n: int, tool: Tool) -> None:
        """Add the rules of a call of `tool`.

        The parameters must come in the order of the schema; optional parameters may be left out.
        """
        path = f"tools[{n}].function.parameters"
        schema, rule = tool.arguments, f"function_{n}"
        if tool.is_strict:
            schema.check_strict(path)
        text = TextRules(schema.root, f"TEXT_{n}", tool.is_strict, VALUE_END, self._counted)
        rewriter = SchemaRewriter(schema.root, tool.is_strict, self._counted)
        parts = []
        for m, (name, value) in enumerate(schema.properties.items()):
            is_required = name in schema.required
            if value is False and not is_required:
                continue
            parts.append(f"{rule}_{m}" + ("" if is_required else "?"))
            opening = json.dumps(f"<parameter={name}>\n")
            shown = self._value(tool, name, value, f"{path}.properties.{name}", text, rewriter)
            self._add(f"{rule}_{m}: {opening} {shown}")
        for terminal in text.rules:
            self._add(terminal)
        if not schema.properties and schema.additional is not False:
            parts = [f"{rule}_any*"]
            self._add(f'{rule}_any: "<parameter=" /[^<>\\n]+/ ">\\n" {self._any_text()}')
        self._add(f'{rule}: "\\n<function={tool.name}>\\n" {" ".join(parts)} "</function>\\n"')

    def _value(self, tool: Tool, name: str, schema: Any, path: str, text: TextRules, rewriter: SchemaRewriter) -> str:
        """Return the grammar expression for the value of the parameter `name`, up to the end of the parameter."""
        types = tool.arguments.types_of(name)
        is_relaxed = self._is_relaxed and not tool.is_strict
        if is_string_type(types):
            expression = "" if is_relaxed else text.expression(schema, path)
            if not expression:
                return self._any_text()
            terminal = self._share(f'(({expression}) & {NO_VALUE_END}) "\\n{VALUE_END}"', "VALUE")
            return f'{terminal} "\\n"'
        try:
            value = {} if is_relaxed else rewriter.rewrite(schema, path)
        except UnsupportedKeyword:
            if tool.is_strict:
                raise
            value = {}
        if value in ({}, True) and types is not None:
            value = {"type": sorted(types)}
        return f'{self._share(json_rule(value), "value")} "\\n{VALUE_END}\\n"'

    def _any_text(self) -> str:
        if "any_text" not in self._shared:
            self._shared["any_text"] = "any_text"
            self._add(f'any_text[suffix="{VALUE_END}"]: {ANY_TEXT}')
        return 'any_text "\\n"'
