"""A `JsonDialect` is the part that the chat formats of DeepSeek's models share: calls with arguments in JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from services.gateway.chat.conversation import PastCall
from services.gateway.chat.dialects.dialect import Dialect, FindMarker
from services.gateway.chat.dialects.json_call_form import (
    CALL_END,
    CALL_START,
    CALLS_END,
    CALLS_START,
    SEPARATOR,
    JsonCallForm,
)
from services.gateway.chat.dialects.json_call_parser import JsonCallParser
from services.gateway.chat.dialects.json_call_rules import JsonCallRules
from services.gateway.chat.tools import Tool, ToolUse
from services.gateway.schema.counted_chars import CountedChars
from services.gateway.schema.json_text import dumps


class JsonDialect(Dialect):
    """A `JsonDialect` has several calls in one section, with or without a fence around the arguments."""

    call_marker_texts = (CALLS_START, CALLS_END, CALL_START, SEPARATOR, CALL_END)
    is_fenced: ClassVar[bool]

    def __init__(self, find_marker: FindMarker) -> None:
        super().__init__(find_marker)
        calls_start, calls_end, call_start, separator, call_end = self.call_markers
        self._form = JsonCallForm(calls_start, calls_end, call_start, separator, call_end, self.is_fenced)

    def shows_call(self, prompt: str, call: PastCall, key: str, value: str) -> bool:
        fence = r"\s*```json\s*" if self.is_fenced else ""
        name = rf"{SEPARATOR}{call.name}{fence}" if self.is_fenced else rf"{call.name}{SEPARATOR}"
        return bool(re.search(rf'{name}\s*\{{\s*"{key}":\s*"{value}"\s*\}}', prompt))

    def call_parser(self, tools: Mapping[str, Tool], index: int, is_forced: bool) -> JsonCallParser:
        return JsonCallParser(self.is_fenced, tools, index, is_forced)

    def call_rules(self, tool_use: ToolUse, counted: CountedChars, is_relaxed: bool) -> JsonCallRules:
        return JsonCallRules(tool_use, self._form, counted, is_relaxed)


def described(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the part of a system turn that lists `tools` with their descriptions and the schemas of their arguments.

    Source: the model card of DeepSeek-V3.1.
    """
    functions = [tool["function"] for tool in tools]
    return "".join(
        f"### {function['name']}\nDescription: {function.get('description', '')}\n\n"
        f"Parameters: {dumps(function.get('parameters', {}))}\n\n"
        for function in functions
    )
