"""One choice of an answer on its way from tokens to what the client is shown."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import FinishReason, TokenLogprob, TokenOutput
from services.gateway.chat.answer_parser import AnswerParser, CallDelta, Parts
from services.gateway.chat.text import CALL_END, CALL_START, THINK_END, Detokenizer, StopMatcher, Tokenizer
from services.gateway.chat.tools import ToolUse

TOOL_CALLS = "tool_calls"  # the finish reason of an answer that calls tools, OpenAI's
FLOOR = -9999.0  # stands for a logarithm of probability 0, as JSON has no infinity


@dataclass(frozen=True)
class Job:
    """One choice to be generated."""

    prompt_token_ids: list[int]
    params: SamplingParams
    reasons: bool = False  # the template opened `<think>`: the answer begins with reasoning
    use: ToolUse = field(default_factory=ToolUse)
    echo: str | None = None
    is_prompt_only: bool = False  # max_tokens was 0: the generated token is not told
    timeout: float | None = None


@dataclass(frozen=True)
class Scored:
    """A token with the natural logarithm of its probability and, in `top`, the likeliest ones, most likely first.

    `offset` is where its text begins in the answer's, in characters. `logprob` is None for a prompt's first token.
    """

    token_id: int
    data: bytes
    logprob: float | None = None
    rank: int = 0
    top: tuple[Scored, ...] = ()
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
    calls: tuple[CallDelta, ...] = ()
    logprobs: tuple[Scored, ...] = ()
    prompt_logprobs: tuple[Scored, ...] = ()
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


class Answer:
    """Text, reasoning, tool calls and logprobs of one choice.

    Like stop tokens, stop strings count only after `min_tokens` tokens. A stop token has no text and no logprob; the
    tokens of a stop string have logprobs although their text is not shown.
    """

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer) -> None:
        self._index, self._job, self._tokenizer = index, job, tokenizer
        self._num_tokens = self._num_chars = 0
        self._stops = StopMatcher(job.params.stop)
        tools = job.use.callable_tools
        self._splitter = AnswerParser(job.reasons, tools, job.use.is_forced, job.use.max_calls)
        names = [*([THINK_END] if job.reasons else []), *([CALL_START, CALL_END] if tools else [])]
        self._detokenizer = Detokenizer(tokenizer.token_bytes, map(tokenizer.marker, names))
        self._is_first = True

    def push(self, output: TokenOutput) -> TextDelta:
        """The last delta has a finish reason, which a stop string or the last call may give before the engine does."""
        if not self._is_first:
            return self._delta(output)
        self._is_first = False
        prompt_logprobs = tuple(self._scored_prompt(output))
        echo = self._job.echo or ""
        self._num_chars += len(echo)
        if self._job.is_prompt_only:
            delta = TextDelta(self._index, "", (), FinishReason.LENGTH, output.num_prompt, 0)
            delta = replace(delta, num_cached=output.num_cached, cache_reason=output.cache_reason)
        else:
            delta = self._delta(output)
        return replace(delta, text=echo + delta.text, prompt_logprobs=prompt_logprobs)

    def _delta(self, output: TokenOutput) -> TextDelta:
        # A stop token is the last id of its output and no part of the text.
        num_shown = len(output.token_ids) - (output.finish_reason is FinishReason.STOP)
        first = self._num_tokens
        parts: list[Parts] = []
        scored: list[Scored] = []
        token_ids, reason = output.token_ids, output.finish_reason
        for n, token_id in enumerate(output.token_ids[:num_shown]):
            if output.logprobs:
                scored.append(self._scored(output.logprobs[n], self._num_chars))
            part, is_over = self._push_token(token_id)
            parts.append(part)
            if is_over:
                token_ids, reason = output.token_ids[: n + 1], FinishReason.STOP
                break
        is_cut = len(token_ids) < len(output.token_ids) or reason is not output.finish_reason
        if reason:
            parts += [] if is_cut else [self._splitter.push(self._stops.flush())]
            parts.append(self._splitter.finish())
        is_call = reason is FinishReason.STOP and self._splitter.num_calls > 0
        return TextDelta(
            self._index,
            "".join(part.content for part in parts),
            token_ids,
            TOOL_CALLS if is_call else reason,
            output.num_prompt,
            first + len(token_ids) if is_cut else output.num_generated,
            "".join(part.reasoning for part in parts),
            _joined([call for part in parts for call in part.calls]),
            tuple(scored),
            (),
            output.num_cached,
            output.cache_reason,
        )

    def _push_token(self, token_id: int) -> tuple[Parts, bool]:
        self._num_tokens += 1
        text = self._detokenizer.push(token_id)
        self._num_chars += len(text)
        is_stopped = False
        if self._num_tokens > self._job.params.min_tokens:
            text, is_stopped = self._stops.push(text)
        parts = self._splitter.push(text)
        return parts, is_stopped or self._splitter.is_done

    def _scored_prompt(self, output: TokenOutput) -> Iterator[Scored]:
        spelled = self._tokenizer.spelled
        # Echo shows special tokens by their names, but not those that the tokenizer itself put before a text.
        detokenizer = Detokenizer(self._tokenizer.token_bytes, self._tokenizer.special_markers)
        echo, whole = self._job.echo, self._tokenizer.decode(self._job.prompt_token_ids)
        position = 0 if echo is None else min(0, len(echo) - len(whole))
        for token_id, score in zip(self._job.prompt_token_ids, output.prompt_logprobs, strict=False):
            offset = max(0, position)
            yield Scored(token_id, spelled(token_id), offset=offset) if score is None else self._scored(score, offset)
            position += len(detokenizer.push(token_id))

    def _scored(self, score: TokenLogprob, offset: int) -> Scored:
        spelled = self._tokenizer.spelled
        top = tuple(Scored(token_id, spelled(token_id), max(value, FLOOR)) for token_id, value in score.top)
        return Scored(score.token_id, spelled(score.token_id), max(score.logprob, FLOOR), score.rank, top, offset)


async def collect(deltas: AsyncGenerator[TextDelta, None], num_choices: int) -> list[TextDelta]:
    """Each choice as one delta, from all that were streamed."""
    streamed: list[list[TextDelta]] = [[] for _ in range(num_choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            streamed[delta.index].append(delta)
    return [join(choice) for choice in streamed]


def join(deltas: Sequence[TextDelta]) -> TextDelta:
    """All deltas of one choice as one; its tool calls are whole."""
    calls: dict[int, CallDelta] = {}
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


def _joined(deltas: Sequence[CallDelta]) -> tuple[CallDelta, ...]:
    """Neighbouring pieces of one call as one."""
    joined: list[CallDelta] = []
    for delta in deltas:
        if joined and joined[-1].index == delta.index:
            last = joined[-1]
            joined[-1] = replace(last, arguments=last.arguments + delta.arguments)
        else:
            joined.append(delta)
    return tuple(joined)
