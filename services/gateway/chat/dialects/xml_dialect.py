"""An `XmlDialect` is the chat format of Nemotron 3 and Qwen3-Coder, whose answers write tool calls in XML."""

from __future__ import annotations

import re
from collections.abc import Mapping

from services.gateway.chat.dialects.call_parser import IsMarker
from services.gateway.chat.dialects.dialect import Dialect
from services.gateway.chat.dialects.xml_call_parser import CALL_END, CALL_START, XmlCallParser
from services.gateway.chat.dialects.xml_call_rules import XmlCallRules
from services.gateway.chat.tools import Tool, ToolUse
from services.gateway.schema.counted_chars import CountedChars

ARGUMENT_NAME = re.compile(r"[^<>\n]+")


class XmlDialect(Dialect):
    """An `XmlDialect` has one call in each section. The values of arguments are text without types or quotes.

    The names of arguments cannot contain `<`, `>` or line ends, and string values cannot contain `</parameter>`.
    """

    title = "calls in XML, as Nemotron 3 and Qwen3-Coder write them"
    call_marker_texts = (CALL_START, CALL_END)

    def check_tool(self, tool: Tool, param: str) -> None:
        for name in tool.arguments.properties:
            if not ARGUMENT_NAME.fullmatch(name):
                path = f"{param}.function.parameters"
                allowed = "names without '<', '>' and line ends, and schemas"
                raise ValueError(f"{path}.properties must hold {allowed}, not {name!r:.100}.")

    def call_parser(self, tools: Mapping[str, Tool], index: int, is_forced: bool, is_marker: IsMarker) -> XmlCallParser:
        return XmlCallParser(tools, index, self.call_markers[1], is_marker)

    def call_rules(self, tool_use: ToolUse, counted: CountedChars, is_relaxed: bool) -> XmlCallRules:
        call_start, call_end = self.call_markers
        return XmlCallRules(tool_use, call_start, call_end, counted, is_relaxed)
