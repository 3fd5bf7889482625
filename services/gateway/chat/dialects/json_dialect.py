"""A `JsonDialect` is the part that all chat formats share in which the arguments of calls are a JSON object."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from services.gateway.chat.dialects.call_parser import IsMarker
from services.gateway.chat.dialects.dialect import Dialect, FindMarker
from services.gateway.chat.dialects.json_call_form import JsonCallForm
from services.gateway.chat.dialects.json_call_parser import JsonCallParser
from services.gateway.chat.dialects.json_call_rules import JsonCallRules
from services.gateway.chat.tools import Tool, ToolUse
from services.gateway.schema.counted_chars import CountedChars
from services.gateway.schema.json_text import dumps


class JsonDialect(Dialect):
    """A `JsonDialect` parses and constrains calls in its `form`."""

    def __init__(self, find_marker: FindMarker) -> None:
        super().__init__(find_marker)
        self._form = self.form()

    @abstractmethod
    def form(self) -> JsonCallForm:
        """Return the form of calls, with the markers of the tokenizer."""

    def call_parser(
        self, tools: Mapping[str, Tool], index: int, is_forced: bool, is_marker: IsMarker
    ) -> JsonCallParser:
        return JsonCallParser(self._form, tools, index, is_forced, is_marker)

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
