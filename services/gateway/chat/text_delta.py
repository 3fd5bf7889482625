"""What is added to a choice of an answer, piece by piece, and how the pieces are joined."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from services.gateway.chat.answer_parser import ToolCallDelta


@dataclass(frozen=True)
class ScoredToken:
    """A token with the natural logarithm of its probability and, in `top`, the likeliest ones, most likely first.

    `offset` is where its text begins in the answer's, in characters. `logprob` is None for a prompt's first token.
    """

    token_id: int
    data: bytes
    logprob: float | None = None
    rank: int = 0
    top: tuple[ScoredToken, ...] = ()
    offset: int = 0

    @property
    def text(self) -> str:
        """Bytes that are no whole characters become U+FFFD."""
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True)
class TextDelta:
    """What one step of the engine added to one choice; its texts may be empty while characters are held back."""

    index: int
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
        """What the prefix cache did for the prompt, and why no more."""
        return f"{self.cache_reason or 'unknown'}; cached={self.num_cached}"

    @property
    def is_shown(self) -> bool:
        """Whether a client has something to see of it."""
        return bool(self.text or self.reasoning or self.calls or self.logprobs or self.finish_reason)


async def collect(deltas: AsyncGenerator[TextDelta, None], num_choices: int) -> list[TextDelta]:
    """Each choice as one delta, from all that were streamed."""
    streamed: list[list[TextDelta]] = [[] for _ in range(num_choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            streamed[delta.index].append(delta)
    return [join(choice) for choice in streamed]


def join(deltas: Sequence[TextDelta]) -> TextDelta:
    """All deltas of one choice as one; its tool calls are whole."""
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
