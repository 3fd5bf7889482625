"""An `AnswerParser` divides the text of an answer into reasoning, content and tool calls.

Parsing takes time linear in the length of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from services.gateway.chat.dialects.call_parser import CallParser
from services.gateway.chat.dialects.dialect import Dialect
from services.gateway.chat.markers import MarkerTokens
from services.gateway.chat.stop_strings import StopMatcher
from services.gateway.chat.tool_call_delta import ToolCallDelta
from services.gateway.chat.tools import Tool, tools_by_name

# The text of a broken call is parsed again. After this number of broken calls, no further call begins, because an
# answer of thousands of broken calls would keep the event loop busy for seconds.
MAX_BROKEN_CALLS = 64


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

    - `dialect`: the format of the answer, with its markers.
    - `in_reasoning`: True if the answer begins with reasoning, which ends at `</think>`. If there are tools, a valid
      call ends the reasoning, too, because some models write calls before they close their reasoning.
    - `opens_reasoning`: True if the answer also begins with reasoning if its first text is `<think>`, which is not
      shown.
    - `tools`: the tools that the model may call. If there are tools, the marker `dialect.calls_start` begins calls.
    - `is_forced`: True if a grammar makes every call valid. In that case the pieces of a call are shown at once. If
      False, a call is shown only when the call is complete, and all characters of a broken call become content, or
      stay reasoning.
    - `max_calls`: number of calls after which the answer ends; None: the number is not limited.

    Line ends around `</think>` and around calls belong to the markup and are not shown.
    """

    def __init__(
        self,
        dialect: Dialect,
        in_reasoning: bool,
        tools: Sequence[Tool] = (),
        is_forced: bool = False,
        max_calls: int | None = None,
        opens_reasoning: bool = False,
    ) -> None:
        self._dialect = dialect
        self._tools, self._is_forced, self._max_calls = tools_by_name(tools), is_forced, max_calls
        self._is_thinking = in_reasoning  # True: `</think>`, which is never shown, has not yet come
        self._at = self._before_call = _Section.REASONING if in_reasoning else _Section.CONTENT
        self._matcher = self._new_matcher()
        self._edges = _LineEndTrimmer()
        # the beginning of the answer while it may become `<think>`; None: the answer does not begin with `<think>`
        self._beginning = "" if opens_reasoning else None
        self._blank: list[str] = []  # the white space before this beginning
        self._calls: CallParser | None = None
        self.num_calls = 0
        self._num_broken = 0  # broken calls up to now
        self._marker_tokens = MarkerTokens()
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._deltas: list[ToolCallDelta] = []

    def _new_matcher(self) -> StopMatcher:
        return StopMatcher(self._dialect.section_ends[self._is_thinking, bool(self._tools)])

    @property
    def is_done(self) -> bool:
        """Return True if the answer holds the maximum number of calls."""
        return self._max_calls is not None and self.num_calls >= self._max_calls

    @property
    def is_in_reasoning(self) -> bool:
        """Return True if the next token belongs to the reasoning."""
        return self._at is _Section.REASONING

    def expect_marker(self, num_before: int) -> None:
        """Note that a token which is a marker begins after `num_before` characters of the answer.

        The note must come before the marker's text is pushed. A marker that is a token of the vocabulary is found only
        where such a token was noted.
        """
        self._marker_tokens.expect(num_before)

    def push(self, text: str) -> AnswerParts:
        """Add `text` to the answer, and return the pieces that may now be shown."""
        self._marker_tokens.add_text(text)
        if self._beginning is not None:
            text = self._open_reasoning(self._beginning + text)
        while text and not self.is_done:
            text = self._push_call(text) if self._at is _Section.CALL else self._push_text(text)
        return self._take()

    def finish(self) -> AnswerParts:
        """End the answer, and return the pieces that the parser held back."""
        self._show("".join(self._blank) + (self._beginning or ""))
        if self._calls is not None:
            self._deltas += self._calls.take() if self._is_forced else []
            self._at = self._before_call
            self._show("" if self._is_forced else self._calls.raw)
        elif not self.is_done:
            self._show(self._matcher.flush())
        if self._edges.is_inside:
            self._book(self._edges.rest())
        return self._take()

    def _open_reasoning(self, text: str) -> str:
        """Enter the reasoning if the answer `text` begins with `<think>`, and return the text that follows.

        If the first text may still become `<think>`, it is held back.
        """
        marker, begun = self._dialect.think_start, text.lstrip()
        self._blank.append(text[: len(text) - len(begun)])
        if begun != marker.text and marker.text.startswith(begun):
            self._beginning = begun
            return ""
        blank, self._blank, self._beginning = "".join(self._blank), [], None
        after = begun.removeprefix(marker.text)
        if after == begun or not self._marker_tokens.is_marker(marker, after):
            return blank + begun
        self._is_thinking, self._at = True, _Section.REASONING
        self._matcher, self._edges = self._new_matcher(), _LineEndTrimmer(is_inside=False)
        return after

    def _push_text(self, text: str) -> str:
        shown, is_marked = self._matcher.push(text)
        self._show(shown)
        if not is_marked:
            return ""
        rest, found = self._matcher.flush(), self._matcher.stop
        is_think_end = found == self._dialect.think_end.text
        marker = self._dialect.think_end if is_think_end else self._dialect.calls_start
        is_too_late = not is_think_end and self._num_broken >= MAX_BROKEN_CALLS
        if is_too_late or not self._marker_tokens.is_marker(marker, rest):
            self._show(found)
            self._matcher = self._new_matcher()
        elif is_think_end:
            self._is_thinking = False
            self._enter_content()
        else:
            self._before_call, self._at = self._at, _Section.CALL
            self._calls = self._dialect.call_parser(
                self._tools, self.num_calls, self._is_forced, self._marker_tokens.is_marker
            )
        return rest

    def _push_call(self, text: str) -> str:
        assert self._calls is not None
        before = self._calls.num_calls
        rest = self._calls.push(text)
        has_ended = self._calls.num_calls > before
        if self._is_forced or has_ended:
            self._deltas += self._calls.take()
        if has_ended:
            self.num_calls += 1
            self._before_call, self._edges = _Section.CONTENT, _LineEndTrimmer(is_inside=False)
        if self._calls.is_whole:
            self._enter_content()
        elif self._calls.is_broken:
            return self._reread(self._calls) + rest
        return rest

    def _reread(self, calls: CallParser) -> str:
        """Return the text of broken calls, which is parsed again as a part of the section before the calls.

        Another call may begin or the reasoning may end in the text. The marker at which the calls began is shown, so
        that the marker does not begin the same calls again.
        """
        self._at, self._calls, self._matcher = self._before_call, None, self._new_matcher()
        self._num_broken += 1
        if calls.num_calls:
            return calls.raw
        start = self._dialect.calls_start.text
        self._show(start)
        return calls.raw[len(start) :]

    def _enter_content(self) -> None:
        self._at, self._calls = _Section.CONTENT, None
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
        self.is_inside = is_inside
        self._held: list[str] = []

    def push(self, text: str) -> str:
        if not self.is_inside:
            text = text.lstrip("\n")
            self.is_inside = bool(text)
        body = text.rstrip("\n")
        if not body:
            self._held += [text] if text else []
            return ""
        shown, self._held = "".join([*self._held, body]), [text[len(body) :]]
        return shown

    def rest(self) -> str:
        """Return the line ends that the trimmer held back."""
        held, self._held = "".join(self._held), []
        return held
