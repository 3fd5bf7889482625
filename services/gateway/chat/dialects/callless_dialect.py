"""A `CalllessDialect` stands for chat formats without tool calls, and for chat formats with unknown tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from services.gateway.chat.conversation import PastCall
from services.gateway.chat.dialects.call_parser import CallParser, IsMarker
from services.gateway.chat.dialects.call_rules import CallRules
from services.gateway.chat.dialects.dialect import Dialect
from services.gateway.chat.tools import Tool, ToolMode, ToolUse
from services.gateway.schema.counted_chars import CountedChars


class CalllessDialect(Dialect):
    """A `CalllessDialect` answers without tools: the model is not told of tools, and its answer is text."""

    title = "no calls"
    has_calls = False
    call_marker_texts = ()

    def usable(self, tool_use: ToolUse) -> ToolUse:
        reason = "because the gateway knows no format for calls in the model's chat template"
        if tool_use.is_forced:
            raise ValueError(f"tool_choice may not force a call, {reason}.")
        if tool_use.allowed is not None and tool_use.mode is not ToolMode.NONE:
            raise ValueError(f"tool_choice may not name allowed tools, {reason}.")
        for n, tool in enumerate(tool_use.tools):
            if tool.is_strict and tool in tool_use.callable_tools:
                raise ValueError(f"tools[{n}].function.strict may not be true, {reason}.")
        return replace(tool_use, mode=ToolMode.NONE)

    def shows_call(self, prompt: str, call: PastCall) -> bool:
        (argument,) = json.loads(call.arguments).items()
        return all(text in prompt for text in (call.name, *argument))

    def call_parser(self, tools: Mapping[str, Tool], index: int, is_forced: bool, is_marker: IsMarker) -> CallParser:
        raise AssertionError("no call begins in a format without calls")

    def call_rules(self, tool_use: ToolUse, counted: CountedChars, is_relaxed: bool) -> CallRules:
        raise AssertionError("no tools can be called in a format without calls")
