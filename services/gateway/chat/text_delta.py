"""A `TextDelta` is a piece of a choice that is streamed to the client; `join` joins the pieces of one choice."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from services.gateway.chat.tool_call_delta import ToolCallDelta


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A `ScoredToken` is a token of the prompt or the answer with its logprob and the most probable alternatives."""

    token_id: int
    data: bytes  # the token's text in UTF-8, which may be only a part of a character
    logprob: float | None = None  # natural logarithm of the probability; None for the first token of a prompt
    rank: int = 0  # rank of the token by probability, from 1 for the most probable token; 0: unknown
    top: tuple[ScoredToken, ...] = ()  # the most probable tokens at the position, most probable first
    offset: int = 0  # number of characters of the answer before the token's text

    @property
    def text(self) -> str:
        """Return the token's text; an incomplete character becomes U+FFFD."""
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True)
class TextDelta:
    """A `TextDelta` holds the text, tool calls and logprobs that one step of the engine added to one choice.

    `text` and `reasoning` may be empty while the gateway holds characters back. `num_prompt` counts the tokens of the
    prompt, and `num_generated` counts the tokens of the choice so far.
    """

    index: int  # position of the choice among all choices of the request
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    num_prompt: int
    num_generated: int
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[ScoredToken, ...] = ()
    prompt_logprobs: tuple[ScoredToken, ...] = ()
    num_cached: int = 0
    cache_reason: str = ""
    stop_string: str = ""  # the stop string that ended the choice; "" if no stop string has
    num_reasoning: int = 0  # tokens of the choice's reasoning so far, with the token that ends the reasoning
    prompt_token_ids: Sequence[int] = ()  # only in the first delta of a choice

    @property
    def cache_report(self) -> str:
        """Return a text that says how many prompt tokens came from the prefix cache, and why there were not more."""
        return f"{self.cache_reason or 'unknown'}; cached={self.num_cached}"

    @property
    def num_scores(self) -> int:
        """Return the number of logprobs of the delta, with the logprobs of alternatives."""
        scores = (*self.prompt_logprobs[-1:], *self.logprobs[-1:])
        return (len(self.prompt_logprobs) + len(self.logprobs)) * (1 + max((len(one.top) for one in scores), default=0))

    @property
    def is_shown(self) -> bool:
        """Return True if the delta holds text, reasoning, tool calls, logprobs or a finish reason for the client."""
        return bool(self.text or self.reasoning or self.calls or self.logprobs or self.finish_reason)


async def collect(deltas: AsyncGenerator[TextDelta, None], num_choices: int) -> list[TextDelta]:
    """Return one delta for each of `num_choices` choices, joined from all deltas of the choice in `deltas`."""
    streamed: list[list[TextDelta]] = [[] for _ in range(num_choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            streamed[delta.index].append(delta)
    return [join(choice) for choice in streamed]


def join(deltas: Sequence[TextDelta]) -> TextDelta:
    """Join all `deltas` of one choice into one delta with complete tool calls."""
    calls: dict[int, ToolCallDelta] = {}
    for call in (call for delta in deltas for call in delta.calls):
        before = calls.get(call.index)
        calls[call.index] = replace(before, arguments=before.arguments + call.arguments) if before else call
    last = deltas[-1]
    return TextDelta(
        last.index,
        "".join(delta.text for delta in deltas),
        tuple(token_id for delta in deltas for token_id in delta.token_ids),
        last.finish_reason,
        last.num_prompt,
        last.num_generated,
        "".join(delta.reasoning for delta in deltas),
        tuple(calls.values()),
        tuple(score for delta in deltas for score in delta.logprobs),
        deltas[0].prompt_logprobs,
        deltas[0].num_cached,
        deltas[0].cache_reason,
        stop_string=last.stop_string,
        num_reasoning=last.num_reasoning,
        prompt_token_ids=deltas[0].prompt_token_ids,
    )
