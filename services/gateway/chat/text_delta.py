"""A `TextDelta` is a piece that is added to a choice while it is generated; `join` joins the pieces of a choice."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from services.gateway.chat.answer_parser import ToolCallDelta


@dataclass(frozen=True)
class ScoredToken:
    """A `ScoredToken` is a token of the prompt or the answer with its probability and that of the best alternatives."""

    token_id: int
    data: bytes  # the token's text, which may be half a character
    logprob: float | None = None  # natural logarithm of the probability; None for the first token of a prompt
    rank: int = 0  # 1 is the most probable token; 0: not known
    top: tuple[ScoredToken, ...] = ()  # the most probable tokens, most probable first
    offset: int = 0  # where the token's text begins in the text of the answer, in characters

    @property
    def text(self) -> str:
        """Return the token's text; bytes that are no whole character become U+FFFD."""
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True)
class TextDelta:
    """A `TextDelta` is what one step of the engine added to one choice.

    The texts may be empty while characters are held back. `num_prompt` and `num_generated` are totals so far.
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

    @property
    def cache_report(self) -> str:
        """Return how many tokens of the prompt came from the prefix cache, and why not more."""
        return f"{self.cache_reason or 'unknown'}; cached={self.num_cached}"

    @property
    def is_shown(self) -> bool:
        """Return True if the delta holds anything that a client is shown."""
        return bool(self.text or self.reasoning or self.calls or self.logprobs or self.finish_reason)


async def collect(deltas: AsyncGenerator[TextDelta, None], num_choices: int) -> list[TextDelta]:
    """Return each choice as one delta, joined from all streamed deltas."""
    streamed: list[list[TextDelta]] = [[] for _ in range(num_choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            streamed[delta.index].append(delta)
    return [join(choice) for choice in streamed]


def join(deltas: Sequence[TextDelta]) -> TextDelta:
    """Return all deltas of one choice as one delta with complete tool calls."""
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
    )
