"""A `ChoiceRequest` is what the gateway asks of the engine for one choice of an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.engine.contract.sampling_params import SamplingParams
from services.gateway.chat.tools import ToolUse


@dataclass(frozen=True)
class ChoiceRequest:
    """A `ChoiceRequest` is one choice to be generated: its prompt is tokenized and its parameters are checked.

    A `GenerationRequest` with `n` choices becomes `n` choice requests, which differ in their seeds.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    in_reasoning: bool = False  # the chat template opened `<think>`, so the answer begins with reasoning
    tool_use: ToolUse = field(default_factory=ToolUse)
    echo: str | None = None  # text of the prompt, which opens the answer; None: no echo was asked for
    is_prompt_only: bool = False  # max_tokens was 0: one token is generated, but not shown
    timeout: float | None = None  # seconds from now to the last token
