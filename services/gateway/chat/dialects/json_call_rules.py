"""A `JsonCallRules` makes the grammar rules for tool calls whose arguments are a JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from services.gateway.chat.dialects.call_rules import CallRules, json_rule, spelled
from services.gateway.chat.dialects.json_call_form import JsonCallForm, Slot
from services.gateway.chat.markers import Marker
from services.gateway.chat.tools import Tool, ToolUse
from services.gateway.schema.counted_chars import CountedChars
from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.json_schema import SchemaRewriter
from services.gateway.schema.object_schema import NOT_AT_THE_TOP


class JsonCallRules(CallRules):
    """A `JsonCallRules` holds the rules for a section of calls in the form `form`."""

    def __init__(self, tool_use: ToolUse, form: JsonCallForm, counted: CountedChars, is_relaxed: bool) -> None:
        super().__init__(counted, is_relaxed)
        self._form = form
        between = json.dumps(form.between) if form.between else ""
        self._add(f"call: {spelled(form.calls_start)} call_rest")
        if form.calls_end is None:
            self.more = "" if tool_use.max_calls == 1 else f"({between} call)*"
            self._add(f"calls: call {self.more}")
            self._add("call_rest: function")
        else:
            more = "" if tool_use.max_calls == 1 else f"({between} function)*"
            self._add("calls: call")
            self._add(f"call_rest: function {more} {spelled(form.calls_end)}")
        self._add_functions(tool_use)

    def _add_function(self, n: int, tool: Tool) -> None:
        expressions, text = [], ""
        for part in self._form.call:
            if isinstance(part, str) or part is Slot.NAME:
                text += tool.name if part is Slot.NAME else part
                continue
            expressions += [json.dumps(text)] if text else []
            text = ""
            if isinstance(part, Marker):
                expressions.append(spelled(part))
            else:
                expressions.append(self._share(json_rule(self._schema(n, tool)), "arguments"))
        assert not text, "each form of a call ends with a marker"
        self._add(f"function_{n}: {' '.join(expressions)}")

    def _schema(self, n: int, tool: Tool) -> Any:
        """Return the schema of the arguments in keywords that llguidance knows."""
        path = f"tools[{n}].function.parameters"
        if self._is_relaxed and not tool.is_strict:
            return _types_only(tool)
        rewriter = SchemaRewriter(tool.arguments.root, tool.is_strict, self._counted)
        try:
            return rewriter.rewrite(_closed(tool, path), path)
        except UnsupportedKeyword:
            if tool.is_strict:
                raise
            return _types_only(tool)


def _closed(tool: Tool, path: str) -> Mapping[str, Any]:
    """Return the schema of the arguments, which allows no arguments without a name if the client named any.

    If the top of the schema holds only references and `allOf`, their properties are collected in one schema.
    """
    arguments = tool.arguments
    given = {key: value for key, value in tool.parameters.items() if value is not None}
    if given.keys() & {"$ref", "allOf"}:
        if tool.is_strict:
            arguments.check_strict(path)
        given = {"required": list(arguments.required)}
        if arguments.additional is not True:
            given["additionalProperties"] = arguments.additional
    if arguments.properties:
        given["properties"] = arguments.properties
    is_open = given.keys() & {"additionalProperties", "unevaluatedProperties", *NOT_AT_THE_TOP}
    if not tool.parameters or ("properties" in given and not is_open):
        given["additionalProperties"] = False
    return given | {"type": "object"}


def _types_only(tool: Tool) -> Mapping[str, Any]:
    arguments = tool.arguments
    types = {name: arguments.types_of(name) for name in arguments.properties}
    return {
        "type": "object",
        "properties": {name: {} if one is None else {"type": sorted(one)} for name, one in types.items()},
        "required": list(arguments.required),
        "additionalProperties": not types and arguments.additional is not False,
    }
