"""A `TokenOutput` holds the tokens that a step added to a request, their logprobs, and why the request ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """A `FinishReason` says why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"  # `Engine.generate` raises DeadlinePassed instead of yielding it
    FAILED = "failed"  # `Engine.generate` raises EngineFailed or ValueError instead of yielding it


@dataclass(frozen=True)
class TokenLogprob:
    """A `TokenLogprob` holds the logprob of a token: the natural logarithm of its probability.

    The probability is the one before temperature, penalties and masks. `rank` is 1 for the likeliest token. `top` holds
    the likeliest tokens as (id, logprob), most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """A `TokenOutput` holds the tokens that one step added to one request.

    - `token_ids`: with the finish reason STOP the last id is the stop token itself. The stop token counts in
      `num_generated`, but is no part of the text.
    - `logprobs`: one entry per token id, if the request asked for them.
    - `prompt_logprobs`: one entry per prompt token, None for the first token; they come with the first output.
    - `cache_reason`: why no more than `num_cached` prompt tokens were reused. The values are hit, too_short, no_match,
      no_checkpoint_at_boundary, evicted, prompt_logprobs and disabled.
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
