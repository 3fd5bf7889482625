"""A `JsonCallParser` parses a section of tool calls whose arguments are a JSON object, in DeepSeek's formats."""

from __future__ import annotations

from collections.abc import Mapping

from services.gateway.chat.dialects.call_parser import CallParser
from services.gateway.chat.dialects.json_call_form import (
    CALL_END,
    CALL_START,
    CALL_TYPE,
    CALLS_END,
    CALLS_START,
    FENCE,
    FENCE_END,
    SEPARATOR,
)
from services.gateway.chat.dialects.json_object_text import JsonObjectText
from services.gateway.chat.stop_strings import StopMatcher, StopStrings
from services.gateway.chat.tool_call_delta import ToolCallDelta, new_call
from services.gateway.chat.tools import Tool
from services.gateway.schema.json_text import loads, nearest_float

FENCED = {  # for each part of a call with a fence, the strings that end the part
    "between": StopStrings([CALL_START, CALLS_END]),
    "type": StopStrings([SEPARATOR]),
    "name": StopStrings(["\n"]),
    "fence": StopStrings([FENCE]),
    "fence end": StopStrings([FENCE_END]),
    "end": StopStrings([CALL_END]),
}
UNFENCED = {
    "between": StopStrings([CALL_START, CALLS_END]),
    "name": StopStrings([SEPARATOR]),
    "end": StopStrings([CALL_END]),
}
WORDS = {"type": CALL_TYPE}  # the text of the parts that hold one word; "name" holds a name, all others white space
ARGUMENTS = "arguments"


class JsonCallParser(CallParser):
    """A `JsonCallParser` parses one section of calls, beginning with the text after its marker.

    The arguments are passed on as the model wrote them; see `JsonObjectText`. White space around all parts of a call
    is ignored. A call whose arguments are no JSON object is broken. If a grammar enforces calls (`is_forced`), the JSON
    is not checked again, because the check refuses objects that are nested too deep.
    """

    def __init__(self, is_fenced: bool, tools: Mapping[str, Tool], index: int, is_forced: bool) -> None:
        super().__init__(CALLS_START, index)
        self._ends, self._is_fenced, self._tools = FENCED if is_fenced else UNFENCED, is_fenced, tools
        self._is_forced = is_forced
        self._enter("between")

    def _enter(self, part: str) -> None:
        self._part, self._text = part, list[str]()
        if part == ARGUMENTS:
            self._object = JsonObjectText()
        else:
            self._matcher = StopMatcher(self._ends[part])

    def _parse(self, text: str) -> str:
        before = self.num_calls
        while text and not (self.is_whole or self.is_broken or self.num_calls > before):
            text = self._parse_arguments(text) if self._part == ARGUMENTS else self._parse_part(text)
        return "" if self.is_broken else text

    def _parse_part(self, text: str) -> str:
        shown, is_ended = self._matcher.push(text)
        self._text.append(shown)
        if not is_ended:
            self.is_broken = self._part not in ("type", "name") and bool(shown.strip())
            return ""
        rest = self._matcher.flush()
        self._leave("".join(self._text).strip(), self._matcher.stop)
        return rest

    def _leave(self, text: str, stop: str) -> None:
        if self._part != "name" and text != WORDS.get(self._part, ""):
            self.is_broken = True
            return
        match self._part:
            case "between" if stop == CALLS_END:
                self.is_whole = True
            case "between":
                self._enter("type" if self._is_fenced else "name")
            case "type":
                self._enter("name")
            case "name":
                self._open(text)
            case "fence":
                self._enter(ARGUMENTS)
            case "fence end":
                self._enter("end")
            case "end":
                self.num_calls += 1
                self._enter("between")

    def _open(self, name: str) -> None:
        if name not in self._tools:
            self.is_broken = True
            return
        self._deltas.append(new_call(self._index + self.num_calls, name))
        self._enter("fence" if self._is_fenced else ARGUMENTS)

    def _parse_arguments(self, text: str) -> str:
        if not self._text:
            text = text.lstrip()
            if text and text[0] != "{":
                self.is_broken = True
                return ""
        shown, rest = self._object.push(text)
        if shown:
            self._text.append(shown)
            self._deltas.append(ToolCallDelta(self._index + self.num_calls, "", "", shown))
        if self._object.is_whole:
            self.is_broken = not (self._is_forced or _is_json("".join(self._text)))
            self._enter("fence end" if self._is_fenced else "end")
        return rest


def _is_json(text: str) -> bool:
    try:
        loads(text, _refuse, nearest_float)
    except ValueError:
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)  # json.loads would accept NaN and Infinity, which are not JSON
