"""A `CallRules` makes the grammar rules for the tool calls of an answer."""

from __future__ import annotations

import json
from typing import Any

from services.engine.contract.sampling_params import JSON_OPTIONS
from services.gateway.chat.markers import Marker
from services.gateway.chat.tools import Tool, ToolUse, is_string_type
from services.gateway.schema.counted_chars import CountedChars
from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.json_schema import SchemaRewriter
from services.gateway.schema.raw_text import ANY_TEXT, TextRules
from services.gateway.schema.regex import literal

MAX_RULES = 2**17  # characters of all rules; the engine accepts no longer grammar
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


def spelled(marker: Marker) -> str:
    """Return the grammar expression for `marker`: a string, or the token id of a special token."""
    return json.dumps(marker.text) if marker.special_id is None else f"<[{marker.special_id}]>"


def json_rule(schema: Any) -> str:
    """Return the grammar expression for JSON text that matches `schema`, in keywords that llguidance knows."""
    return f"%json {json.dumps(schema | JSON_OPTIONS if isinstance(schema, dict) else schema)}"


class CallRules:
    """A `CallRules` makes the rules `calls` (one or more calls), `call` and `call_rest` (a call behind its marker).

    - `is_relaxed`: if True, the rules enforce only the types of the arguments of tools that are not strict. The caller
      sets `is_relaxed` if the grammar of the whole schemas cannot be used.
    - `counted`: counts the characters of lengths and repetitions, and starts at the count of the answer's own grammar.

    Raises ValueError if a strict tool's schema cannot be expressed, if an enum's value cannot be written, or if the
    rules become too long.
    """

    def __init__(
        self, tool_use: ToolUse, call_start: Marker, call_end: Marker, counted: CountedChars, is_relaxed: bool
    ) -> None:
        self.rules: list[str] = []
        self._num_chars, self._counted, self._is_relaxed = 0, counted, is_relaxed
        self._shared: dict[str, str] = {}  # names of rules, by their expressions
        self._add("calls: call" if tool_use.max_calls == 1 else 'calls: call ("\\n" call)*')
        self._add(f"call: {spelled(call_start)} call_rest")
        names = {tool.name for tool in tool_use.callable_tools}
        numbered = [(n, tool) for n, tool in enumerate(tool_use.tools) if tool.name in names]
        functions = " | ".join(f"function_{n}" for n, _ in numbered)
        self._add(f"call_rest: ({functions}) {spelled(call_end)}")
        # The rules of strict tools are made first, so that strict tools have the first claim to counted characters.
        for n, tool in sorted(numbered, key=lambda one: not one[1].is_strict):
            self._add_function(n, tool)

    def _add(self, rule: str) -> None:
        self._num_chars += len(rule)
        if self._num_chars > MAX_RULES:
            raise ValueError(
                f"tools make a grammar of more than {MAX_RULES} characters; give fewer tools, or smaller schemas."
            )
        self.rules.append(rule)

    def _add_function(self, n: int, tool: Tool) -> None:
        """Add the rules of a call of `tool`, the tool with the index `n`; their names begin with `function_{n}`.

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

    def _share(self, expression: str, prefix: str) -> str:
        """Return the name of a rule for `expression`; equal expressions share one rule."""
        if expression not in self._shared:
            self._shared[expression] = f"{prefix}_{len(self._shared)}"
            self._add(f"{self._shared[expression]}: {expression}")
        return self._shared[expression]
