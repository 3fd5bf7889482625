"""An `AnswerParser` divides the text of an answer into reasoning, content and tool calls.

Parsing takes time linear in the length of the text.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from services.gateway.chat.markers import CALL_END, CALL_START, THINK_END
from services.gateway.chat.stop_strings import StopMatcher, StopStrings
from services.gateway.chat.tools import Tool, argument_json, is_string_type, tools_by_name
from services.gateway.schema.json_text import dumps

# for each pair (reasoning has not ended, there are tools), the strings at which a section of text ends
SECTION_ENDS = {
    (True, True): StopStrings([THINK_END, CALL_START]),
    (True, False): StopStrings([THINK_END]),
    (False, True): StopStrings([CALL_START]),
    (False, False): StopStrings([]),
}
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


@dataclass(frozen=True)
class ToolCallDelta:
    """A `ToolCallDelta` is a piece of a tool call; all pieces of a call joined in order make the whole call.

    Only the first piece of a call holds the call's id and name. The `arguments` of all pieces joined are the text of
    one JSON object.
    """

    index: int  # number of the call in the answer, from 0
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class AnswerParts:
    """An `AnswerParts` holds the content, the reasoning and the pieces of tool calls that one piece of text adds."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class _Section(Enum):
    """A `_Section` is the kind of text that an `AnswerParser` is currently reading."""

    REASONING = 0
    CONTENT = 1
    CALL = 2


class AnswerParser:
    """An `AnswerParser` divides the text of one answer into reasoning, content and tool calls, piece by piece.

    - `in_reasoning`: True if the answer begins with reasoning, which ends at `</think>`. If there are tools, a valid
      call ends the reasoning, too, because some models write calls before they close their reasoning.
    - `tools`: the tools that the model may call. If there are tools, `<tool_call>` begins a call.
    - `is_forced`: True if a grammar makes every call valid. In that case the pieces of a call are shown at once. If
      False, a call is shown only when the call is complete, and all characters of a broken call become content, or
      stay reasoning.
    - `max_calls`: number of calls after which the answer ends; None: the number is not limited.

    Line ends around `</think>` and around calls belong to the markup and are not shown.
    """

    def __init__(
        self,
        in_reasoning: bool,
        tools: Sequence[Tool] = (),
        is_forced: bool = False,
        max_calls: int | None = None,
    ) -> None:
        self._tools, self._is_forced, self._max_calls = tools_by_name(tools), is_forced, max_calls
        self._is_thinking = in_reasoning  # True: `</think>`, which is never shown, has not yet come
        self._at = self._before_call = _Section.REASONING if in_reasoning else _Section.CONTENT
        self._matcher = self._new_matcher()
        self._edges = _LineEndTrimmer()
        self._call: _ToolCallParser | None = None
        self.num_calls = 0
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._deltas: list[ToolCallDelta] = []

    def _new_matcher(self) -> StopMatcher:
        return StopMatcher(SECTION_ENDS[self._is_thinking, bool(self._tools)])

    @property
    def is_done(self) -> bool:
        """Return True if the answer holds the maximum number of calls."""
        return self._max_calls is not None and self.num_calls >= self._max_calls

    @property
    def is_in_reasoning(self) -> bool:
        """Return True if the next token belongs to the reasoning."""
        return self._at is _Section.REASONING

    def push(self, text: str) -> AnswerParts:
        """Add `text` to the answer, and return the pieces that may now be shown."""
        while text and not self.is_done:
            text = self._push_call(text) if self._at is _Section.CALL else self._push_text(text)
        return self._take()

    def finish(self) -> AnswerParts:
        """End the answer, and return the pieces that the parser held back."""
        if self._call is not None:
            self._deltas += self._call.take() if self._is_forced else []
            self._at = self._before_call
            self._show("" if self._is_forced else self._call.raw)
        elif not self.is_done:
            self._show(self._matcher.flush())
        if self._edges.is_inside:
            self._book(self._edges.rest())
        return self._take()

    def _push_text(self, text: str) -> str:
        shown, is_marked = self._matcher.push(text)
        self._show(shown)
        if not is_marked:
            return ""
        rest = self._matcher.flush()
        if self._matcher.stop == THINK_END:
            self._is_thinking = False
            self._enter_content()
        else:
            self._before_call, self._at = self._at, _Section.CALL
            self._call = _ToolCallParser(self._tools, self.num_calls)
        return rest

    def _push_call(self, text: str) -> str:
        assert self._call is not None
        rest = self._call.push(text)
        if self._is_forced or self._call.is_whole:
            self._deltas += self._call.take()
        if self._call.is_whole:
            self.num_calls += 1
            self._enter_content()
        elif self._call.is_broken:
            raw, self._call = self._call.raw, None
            self._at, self._matcher = self._before_call, self._new_matcher()
            # The text of the broken call, including `<tool_call>`, belongs to the section before the call. The text
            # after `<tool_call>` is parsed again, because another call may begin or the reasoning may end in the text.
            self._show(CALL_START)
            return raw[len(CALL_START) :] + rest
        return rest

    def _enter_content(self) -> None:
        self._at, self._call = _Section.CONTENT, None
        self._matcher, self._edges = self._new_matcher(), _LineEndTrimmer(is_inside=False)

    def _show(self, text: str) -> None:
        if self._at is _Section.REASONING or self._tools or not self._edges.is_inside:
            text = self._edges.push(text)
        self._book(text)

    def _book(self, text: str) -> None:
        (self._reasoning if self._at is _Section.REASONING else self._content).append(text)

    def _take(self) -> AnswerParts:
        parts = AnswerParts("".join(self._content), "".join(self._reasoning), tuple(self._deltas))
        self._content, self._reasoning, self._deltas = [], [], []
        return parts


class _LineEndTrimmer:
    """A `_LineEndTrimmer` drops the line ends at the start of a text.

    Other line ends are held back until more text follows, because they may be the end of the text.
    """

    def __init__(self, is_inside: bool = True) -> None:
        self.is_inside, self._held = is_inside, ""

    def push(self, text: str) -> str:
        if not self.is_inside:
            text = text.lstrip("\n")
            self.is_inside = bool(text)
        body = text.rstrip("\n")
        if not body:
            self._held += text
            return ""
        shown, self._held = self._held + body, text[len(body) :]
        return shown

    def rest(self) -> str:
        """Return the line ends that the trimmer held back."""
        held, self._held = self._held, ""
        return held


ENDS = {  # for each part of a call, the strings that end the part
    "call": StopStrings([FUNCTION]),
    "name": StopStrings([">"]),
    "body": StopStrings([PARAMETER, FUNCTION_END]),
    "key": StopStrings([">"]),
    "value": StopStrings([PARAMETER_END]),
    "end": StopStrings([CALL_END]),
}
MARKUP = ("call", "body", "end")  # parts of a call that may hold only white space


class _ToolCallParser:
    """A `_ToolCallParser` parses one tool call, beginning with the text after `<tool_call>`.

    `is_broken` becomes True as soon as the text cannot become a valid call. `is_whole` becomes True at the end of a
    valid call.
    """

    def __init__(self, tools: dict[str, Tool], index: int) -> None:
        self._tools, self._index = tools, index
        self._raw: list[str] = [CALL_START]
        self._deltas: list[ToolCallDelta] = []
        self._num_keys, self._quotes = 0, _JsonQuotes()
        self.is_whole = self.is_broken = False
        self._enter("call")

    @property
    def raw(self) -> str:
        """Return the text of the call that has been parsed so far, including `<tool_call>`."""
        return "".join(self._raw)

    def push(self, text: str) -> str:
        """Add `text` to the call, and return the part of `text` that follows the end of the call."""
        raw = text
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
            if is_ended and not self.is_broken:
                self._leave(self._matcher.stop)
        rest = text if self.is_whole else ""
        self._raw.append(raw[: len(raw) - len(rest)])
        return rest

    def _add_marker_as_text(self) -> None:
        """Add the end marker of a value to the value, because the marker stands inside of a JSON string."""
        self._text.append(PARAMETER_END)
        self._quotes.push(PARAMETER_END)
        self._matcher = StopMatcher(ENDS["value"])

    def take(self) -> list[ToolCallDelta]:
        """Return a list with the piece of the call that is new since the last `take`; the list may be empty."""
        deltas, self._deltas = self._deltas, []
        arguments = "".join(delta.arguments for delta in deltas)
        if not deltas or not (deltas[0].id or arguments):
            return []
        return [ToolCallDelta(self._index, deltas[0].id, deltas[0].name, arguments)]

    def _enter(self, part: str) -> None:
        self._part, self._matcher = part, StopMatcher(ENDS[part])
        self._text: list[str] = []
        self._quotes = _JsonQuotes()
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
                self.is_whole = True

    def _open(self, name: str) -> None:
        if name not in self._tools:
            self.is_broken = True
            return
        self._tool = self._tools[name]
        self._deltas.append(ToolCallDelta(self._index, f"call_{uuid.uuid4().hex[:24]}", name, ""))
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
