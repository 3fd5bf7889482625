"""A `DeepSeekV31Dialect` is the chat format of DeepSeek-V3.1, V3.1-Terminus and V3.2-Exp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.gateway.chat.dialects.json_call_form import (
    CALL_END,
    CALL_START,
    CALLS_END,
    CALLS_START,
    SEPARATOR,
    JsonCallForm,
    Slot,
)
from services.gateway.chat.dialects.json_dialect import JsonDialect, described

# The model was trained with these sentences, which the section "ToolCall" of its model card gives word for word.
FORM = (
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    f"{CALLS_START}{CALL_START}tool_call_name{SEPARATOR}tool_call_arguments{CALL_END}{{additional_tool_calls}}{CALLS_END}"
    "\n\nWhere:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces"
)


class DeepSeekV31Dialect(JsonDialect):
    """A `DeepSeekV31Dialect` has calls whose arguments follow the name without a fence.

    The public chat template ignores tools, and the model card gives the text that offers them in the system turn. The
    template's argument `thinking` switches reasoning on; the model was trained to call tools without reasoning.
    """

    title = "calls with unfenced JSON, as DeepSeek-V3.1 writes them"
    call_marker_texts = (CALLS_START, CALLS_END, CALL_START, SEPARATOR, CALL_END)

    def form(self) -> JsonCallForm:
        calls_start, calls_end, call_start, separator, call_end = self.call_markers
        call = (call_start, Slot.NAME, separator, Slot.ARGUMENTS, call_end)
        return JsonCallForm(calls_start, call, calls_end)

    def preamble(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return f"## Tools\nYou have access to the following tools:\n\n{described(tools)}{FORM}"
