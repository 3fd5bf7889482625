"""An `XmlCallParser` parses one tool call in XML, whose values are untyped text.

The model writes a call like this (the format of Qwen3-Coder and Nemotron 3):

    <tool_call>
    <function=NAME>
    <parameter=ARGUMENT>
    value
    </parameter>
    </function>
    </tool_call>
"""

from __future__ import annotations

from collections.abc import Mapping

from services.gateway.chat.dialects.call_parser import CallParser, IsMarker
from services.gateway.chat.markers import Marker
from services.gateway.chat.stop_strings import StopMatcher, StopStrings
from services.gateway.chat.tool_call_delta import ToolCallDelta, new_call
from services.gateway.chat.tools import Tool, argument_json, is_string_type
from services.gateway.schema.json_text import dumps

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
ENDS = {  # for each part of a call, the strings that end the part
    "call": StopStrings([FUNCTION]),
    "name": StopStrings([">"]),
    "body": StopStrings([PARAMETER, FUNCTION_END]),
    "key": StopStrings([">"]),
    "value": StopStrings([PARAMETER_END]),
    "end": StopStrings([CALL_END]),
}
MARKUP = ("call", "body", "end")  # parts of a call that may hold only white space


class XmlCallParser(CallParser):
    """An `XmlCallParser` parses one tool call, beginning with the text after `<tool_call>`, up to `call_end`."""

    def __init__(self, tools: Mapping[str, Tool], index: int, call_end: Marker, is_marker: IsMarker) -> None:
        super().__init__(CALL_START, index)
        self._call_end, self._is_marker = call_end, is_marker
        self._tools, self._num_keys = tools, 0
        self._enter("call")

    def _parse(self, text: str) -> str:
        while text and not (self.is_whole or self.is_broken):
            shown, is_ended = self._matcher.push(text)
            text = self._matcher.flush() if is_ended else ""
            if self._part in MARKUP:
                self.is_broken = bool(shown.strip())
            elif self._is_shown_at_once:
                self._show_string(shown)
            else:
                self._text.append(shown)
                self._quotes.push(shown)
                if is_ended and self._part == "value" and self._quotes.is_inside:
                    self._add_marker_as_text()
                    continue
            if is_ended and self._part == "end" and not self._is_marker(self._call_end, text):
                self.is_broken = True
            if is_ended and not self.is_broken:
                self._leave(self._matcher.stop)
        return text if self.is_whole else ""

    def _add_marker_as_text(self) -> None:
        """Add the end marker of a value to the value, because the marker stands inside of a JSON string."""
        self._text.append(PARAMETER_END)
        self._quotes.push(PARAMETER_END)
        self._matcher = StopMatcher(ENDS["value"])

    def _enter(self, part: str) -> None:
        self._part, self._matcher = part, StopMatcher(ENDS[part])
        self._text: list[str] = []
        self._quotes: _JsonQuotes = _JsonQuotes()
        self._is_shown_at_once = False

    def _leave(self, stop: str) -> None:
        text = "".join(self._text)
        match self._part:
            case "call":
                self._enter("name")
            case "name":
                self._open(text)
            case "body" if stop == PARAMETER:
                self._enter("key")
            case "body":
                self._add("}" if self._num_keys else "{}")
                self._enter("end")
            case "key":
                self._enter_value(text)
            case "value":
                is_string = self._is_shown_at_once
                value = text.removeprefix("\n").removesuffix("\n")
                self._add('"' if is_string else argument_json(value, self._types))
                self._enter("body")
            case "end":
                self.is_whole, self.num_calls = True, 1

    def _open(self, name: str) -> None:
        if name not in self._tools:
            self.is_broken = True
            return
        self._tool = self._tools[name]
        self._deltas.append(new_call(self._index, name))
        self._enter("body")

    def _enter_value(self, key: str) -> None:
        self._types = self._tool.arguments.types_of(key)
        self._add(f"{', ' if self._num_keys else '{'}{dumps(key)}: ")
        self._num_keys += 1
        self._enter("value")
        self._is_shown_at_once = is_string_type(self._types)
        if self._is_shown_at_once:
            self._add('"')
            self._is_first, self._held = True, ""

    def _show_string(self, text: str) -> None:
        """Add a piece of a string value to the arguments, escaped as JSON.

        One line end before the value and one line end after the value are markup and are dropped.
        """
        text = self._held + text
        if self._is_first and text:
            text, self._is_first = text.removeprefix("\n"), False
        self._held = "\n" if text.endswith("\n") else ""
        self._add(dumps(text.removesuffix("\n"))[1:-1])

    def _add(self, arguments: str) -> None:
        self._deltas.append(ToolCallDelta(self._index, "", "", arguments))


class _JsonQuotes:
    """A `_JsonQuotes` says whether a text that arrives in pieces ends inside of a string of JSON.

    A JSON string holds no line end, so a line end shows that the text is no JSON, or that a string has ended.
    """

    def __init__(self) -> None:
        self.is_inside = self._is_escaped = False
        self._is_json: bool | None = None  # None: the text holds only white space up to now

    def push(self, text: str) -> None:
        if self._is_json is None and (beginning := text.lstrip()):
            self._is_json = beginning[0] in '{["'
        for char in text if self._is_json else "":
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = self.is_inside
            elif char in '"\n':
                self.is_inside = char == '"' and not self.is_inside
