"""What the engine sends back after each step: tokens, their log probabilities, and why a request ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"  # `Engine.generate` raises DeadlinePassed instead of yielding it
    FAILED = "failed"  # `Engine.generate` raises EngineFailed or ValueError instead of yielding it


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability before temperature, penalties and masks, its rank
    (1 is the likeliest), and the likeliest tokens as (id, logprob), most likely first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """The tokens one step added to one request.

    With finish reason STOP the last id is the stop token itself: counted in `num_generated`, but no part of the text.
    `logprobs` has one entry per token id where they were asked for. `prompt_logprobs` comes with the first output: one
    entry per prompt token, None for the first. `cache_reason` says why no more than `num_cached` prompt tokens were
    reused: hit, too_short, no_match, no_checkpoint_at_boundary, evicted, prompt_logprobs or disabled.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt: int
    num_generated: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    num_cached: int = 0
    cache_reason: str = ""
    queued_s: float = 0.0  # from arrival to the first step that computed it
