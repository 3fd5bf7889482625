"""A `DeepSeekV3Dialect` is the chat format of DeepSeek-V3, V3-0324 and R1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.gateway.chat.dialects.json_call_form import (
    CALL_END,
    CALL_START,
    CALL_TYPE,
    CALLS_END,
    CALLS_START,
    FENCE,
    FENCE_END,
    SEPARATOR,
    JsonCallForm,
    Slot,
)
from services.gateway.chat.dialects.json_dialect import JsonDialect, described

EXAMPLE_CALL = f"{CALL_START}{CALL_TYPE}{SEPARATOR}NAME_OF_FUNCTION\n{FENCE}\nARGUMENTS\n{FENCE_END}{CALL_END}"
EXAMPLE = f"{CALLS_START}{EXAMPLE_CALL}{CALLS_END}"


class DeepSeekV3Dialect(JsonDialect):
    """A `DeepSeekV3Dialect` has calls whose arguments stand in a fenced block of JSON.

    The public chat template ignores tools, and no public text says how the model was told of tools in training. The
    preamble is therefore our own; the form of the calls in the preamble is the form in which the template writes
    earlier calls. R1 writes `<think>` itself at the beginning of an answer.
    """

    title = "calls with fenced JSON, as DeepSeek-V3, V3-0324 and R1 write them"
    call_marker_texts = (CALLS_START, CALLS_END, CALL_START, SEPARATOR, CALL_END)
    opens_reasoning = True

    def form(self) -> JsonCallForm:
        calls_start, calls_end, call_start, separator, call_end = self.call_markers
        fence, fence_end = f"\n{FENCE}\n", f"\n{FENCE_END}"
        call = (call_start, CALL_TYPE, separator, Slot.NAME, fence, Slot.ARGUMENTS, fence_end, call_end)
        return JsonCallForm(calls_start, call, calls_end, between="\n")

    def preamble(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return (
            f"## Tools\nYou can call these functions:\n\n{described(tools)}"
            f"To call functions, end your answer with calls in exactly this form:\n{EXAMPLE}\n\n"
            "- NAME_OF_FUNCTION is the name of one of the functions above.\n"
            "- ARGUMENTS is one JSON object that matches the parameters of the function.\n"
            f"- To call several functions, put one call after another, each from {CALL_START} to {CALL_END} and on a "
            f"new line, before {CALLS_END}.\n"
            "- If no function is needed, answer without calls."
        )
