"""A `TokenOutput` holds the tokens that a step added to a request, their logprobs, and why the request ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """A `FinishReason` says why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"  # `Engine.generate` raises DeadlinePassed instead of yielding an output
    FAILED = "failed"  # `Engine.generate` raises EngineFailed or ValueError instead of yielding an output


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A `TokenLogprob` holds the logprob of a token: the natural logarithm of its probability.

    - The probability is the model's own: before temperature, penalties and masks are applied.
    - `rank`: 1 for the likeliest token.
    - `top`: the likeliest tokens as pairs (token id, logprob), most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """A `TokenOutput` holds the tokens that one step added to one request.

    - `token_ids`: the new tokens. If the finish reason is STOP, the last id is the stop token. The stop token counts in
      `num_generated`, but does not belong to the text.
    - `logprobs`: one entry per token id if the request asked for logprobs, else empty.
    - `prompt_logprobs`: one entry per prompt token, None for the first token. Only the first output has these entries.
    - `cache_reason`: why the prefix cache could not provide more than `num_cached` prompt tokens. The values are hit,
      too_short, no_match, no_checkpoint_at_boundary, evicted, prompt_logprobs and disabled.
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
    queued_s: float = 0.0  # seconds from the arrival to the first step that computed the request
