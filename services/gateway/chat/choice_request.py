"""A `ChoiceRequest` is the gateway's request to the engine for one choice of an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.engine.contract.sampling_params import SamplingParams
from services.gateway.chat.stop_strings import StopStrings
from services.gateway.chat.tools import ToolUse


@dataclass(frozen=True)
class ChoiceRequest:
    """A `ChoiceRequest` describes one choice to generate, with a tokenized prompt and checked parameters.

    A `GenerationRequest` with `n` choices becomes `n` choice requests, which differ in their seeds.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    in_reasoning: bool = False  # True: the chat template opened `<think>`, so the answer begins with reasoning
    tool_use: ToolUse = field(default_factory=ToolUse)
    echo: str | None = None  # text of the prompt, to be shown before the answer; None: the client asked for no echo
    is_prompt_only: bool = False  # True: max_tokens was 0; the engine generates one token, which is not shown
    # seconds until the last token must be generated, counted from the moment at which the choice was prepared
    timeout: float | None = None
    stops: StopStrings = field(default_factory=lambda: StopStrings([]))  # the tables for `params.stop`
    skip_special_tokens: bool = True  # False: the text shows the names of special tokens
    opens_reasoning: bool = False  # True: the answer may itself open its reasoning with `<think>`
    include_stop_str_in_output: bool = False  # True: the text ends with the stop string or stop token that ended it
