"""A `HermesDialect` is the chat format of Qwen2.5, Qwen3, Qwen3-Next and NousResearch's Hermes models."""

from __future__ import annotations

from services.gateway.chat.dialects.json_call_form import JsonCallForm, Slot
from services.gateway.chat.dialects.json_dialect import JsonDialect
from services.gateway.chat.dialects.xml_call_parser import CALL_END, CALL_START

NAME_KEY, ARGUMENTS_KEY = '"name": ', '"arguments": '


class HermesDialect(JsonDialect):
    """A `HermesDialect` has one call in each section: a JSON object with the name and the arguments of the function.

    The chat template tells the model of tools. Some models write the arguments before the name. Qwen3's hybrid models
    write `<think>` themselves at the beginning of an answer; Qwen3-Next-Thinking's template writes `<think>`.
    """

    title = "calls as a JSON object with name and arguments, as Qwen3, Qwen3-Next and Hermes write them"
    call_marker_texts = (CALL_START, CALL_END)
    opens_reasoning = True

    def form(self) -> JsonCallForm:
        call_start, call_end = self.call_markers
        return JsonCallForm(
            call_start,
            (f'\n{{{NAME_KEY}"', Slot.NAME, f'", {ARGUMENTS_KEY}', Slot.ARGUMENTS, "}\n", call_end),
            between="\n",
            others=((f"\n{{{ARGUMENTS_KEY}", Slot.ARGUMENTS, f', {NAME_KEY}"', Slot.NAME, '"}\n', call_end),),
        )
