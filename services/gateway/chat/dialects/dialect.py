"""A `Dialect` is a chat format: how prompts offer tools, and how answers write their reasoning and their tool calls."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from services.gateway.chat.conversation import Conversation, PastCall
from services.gateway.chat.dialects.call_parser import CallParser, IsMarker
from services.gateway.chat.dialects.call_rules import CallRules
from services.gateway.chat.markers import THINK_END, THINK_START, Marker
from services.gateway.chat.stop_strings import StopStrings
from services.gateway.chat.tools import Tool, ToolUse
from services.gateway.schema.counted_chars import CountedChars

FindMarker = Callable[[str], Marker]  # returns the marker for a string, with the token's id if it is an added token


class Dialect(ABC):
    """A `Dialect` reads and constrains the answers in one chat format, with the markers of one tokenizer.

    The chat template writes the markers of turns and of earlier calls. The dialect knows only what the gateway needs
    beside the template: the markers of reasoning and calls in an answer, the parser and the grammar of calls, and the
    text that offers tools if the template offers none.

    Reasoning begins at `<think>`, usually in the prompt, and ends at `</think>` in all formats that are known. Calls
    stand in sections, each of which begins with `calls_start`; a section holds one call or several calls.
    """

    title: ClassVar[str]  # words for the operator that tell the format apart from the others
    has_calls: ClassVar[bool] = True  # False: answers hold no calls
    opens_reasoning: ClassVar[bool] = False  # True: an answer may itself begin with `<think>`
    call_marker_texts: ClassVar[tuple[str, ...]]  # all markers around calls; the first begins a section of calls

    def __init__(self, find_marker: FindMarker) -> None:
        self.think_start, self.think_end = find_marker(THINK_START), find_marker(THINK_END)
        self.call_markers = tuple(map(find_marker, self.call_marker_texts))
        # for each pair (reasoning has not ended, there are tools), the strings at which a section of text ends
        starts = self.call_marker_texts[:1]
        self.section_ends = {
            (is_thinking, has_tools): StopStrings([THINK_END] * is_thinking + [*starts] * has_tools)
            for is_thinking in (True, False)
            for has_tools in (True, False)
        }

    @property
    def calls_start(self) -> Marker:
        """Return the marker that begins a section of calls."""
        return self.call_markers[0]

    def usable(self, tool_use: ToolUse) -> ToolUse:
        """Return the tools that the model may call in this format.

        Raises ValueError if the format cannot carry a tool.
        """
        for n, tool in enumerate(tool_use.tools):
            self.check_tool(tool, f"tools[{n}]")
        return tool_use

    def check_tool(self, tool: Tool, param: str) -> None:
        """Raise ValueError if the format cannot carry calls of `tool`, which the client gave in the field `param`."""
        return

    def ends_in_reasoning(self, chat: Conversation, prompt: str) -> bool:
        """Return True if `prompt`, the text of the prompt for `chat`, ends inside the assistant's reasoning."""
        if chat.continued_field == "reasoning_content":
            return True
        last = chat.messages[-1].content or ""
        is_open = chat.continue_final_message and last.rfind(THINK_START) > last.rfind(THINK_END)
        return is_open or prompt.rstrip().endswith(THINK_START)

    def preamble(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of the system turn that offers `tools`, in OpenAI's form, and shows how to call them.

        The text is used only if the chat template ignores tools. "" stands for no text.
        """
        return ""

    def shows_call(self, prompt: str, call: PastCall) -> bool:
        """Return True if `prompt` holds `call`, whose arguments are strings, in this format."""
        for start in re.finditer(re.escape(self.calls_start.text), prompt):
            parser = self.call_parser({call.name: Tool(call.name)}, 0, False, lambda marker, after: True)
            parser.push(prompt[start.end() :])
            if parser.num_calls:
                [shown] = parser.take()
                return bool(json.loads(shown.arguments) == json.loads(call.arguments))
        return False

    @abstractmethod
    def call_parser(self, tools: Mapping[str, Tool], index: int, is_forced: bool, is_marker: IsMarker) -> CallParser:
        """Return a parser for one section of calls of `tools`.

        `index` is the number of the first call, and `is_forced` is True if a grammar makes every call valid.
        `is_marker` tells the tokens of markers from the same text in other tokens.
        """

    @abstractmethod
    def call_rules(self, tool_use: ToolUse, counted: CountedChars, is_relaxed: bool) -> CallRules:
        """Return the grammar rules for the calls that `tool_use` allows; see `CallRules` for the arguments."""
