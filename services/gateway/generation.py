"""The one way from a request to text, shared by REST and gRPC."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from services.engine.request import EngineFailed, FinishReason, SamplingParams, TokenOutput
from services.gateway.errors import ApiError, Refusal, bad_value, from_exception, invalid
from services.gateway.metrics import Metrics
from services.gateway.text import Chat, Detokenizer, StopMatcher, Tokenizer

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, in OpenAI's reference; a chat may use the whole context
MERGE_QUEUE_LEN = 16

Prompt = str | list[int] | Chat


@dataclass(frozen=True)
class ModelCard:
    """What clients are told about the served model."""

    id: str
    max_model_len: int  # prompt and completion together
    created: int  # Unix time, seconds
    owned_by: str = "expertmesh"


@dataclass(frozen=True)
class Health:
    """`is_degraded`: it answers, but experts have fewer live homes than they should."""

    is_ready: bool
    is_degraded: bool = False
    detail: str = ""


class TokenSource(Protocol):
    """The engine, or a handle to one in another process. Closing the generator frees what the request holds.

    Raises ValueError (a sentence for the client), EngineOverloaded, EngineFailed, DeadlinePassed or ApiError.
    """

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[TokenOutput, None]: ...


@dataclass(frozen=True)
class Job:
    prompt_token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class TextDelta:
    """What one step of the engine added to one completion; `text` may be empty while characters are held back."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt: int
    num_generated: int


class Generation:
    def __init__(self, source: TokenSource, tokenizer: Tokenizer, card: ModelCard) -> None:
        self._source, self._tokenizer, self.card = source, tokenizer, card
        self.metrics = Metrics(card.id)

    def check_model(self, model: str | None) -> None:
        """Raises ApiError unless `model` is the served one; none or an empty name means the served one."""
        if model and model != self.card.id:
            message = f"The model {model!r:.100} does not exist; this server serves {self.card.id!r}."
            raise ApiError(Refusal.NOT_FOUND, message, "model", "model_not_found")

    async def prepare(self, prompt: Prompt, sampling: Mapping[str, Any]) -> Job:
        """Checks and tokenizes; `sampling` holds the fields of SamplingParams that the client gave.

        Raises ApiError, for a request over the model's context with the numbers.
        """
        try:
            params = SamplingParams(**sampling)
            token_ids, name = await self._token_ids(prompt)
        except ValueError as error:
            raise bad_value(error) from error
        room = self._room(len(token_ids), name)
        self._check_fits(len(token_ids), params)
        if params.max_tokens is None and name == "prompt":
            params = replace(params, max_tokens=min(room, max(DEFAULT_MAX_TOKENS, params.min_tokens)))
        return Job(token_ids, params)

    async def _token_ids(self, prompt: Prompt) -> tuple[list[int], str]:
        match prompt:
            case str():
                return await self._tokenizer.encode(prompt), "prompt"
            case Chat():
                return await self._tokenizer.encode_chat(prompt), "messages"
        return prompt, "prompt"

    def _room(self, num_prompt: int, name: str) -> int:
        longest = self.card.max_model_len
        if num_prompt >= longest:
            message = (
                f"The prompt has {num_prompt} tokens; at most {longest - 1} are allowed, because the model's context "
                f"is {longest} tokens for prompt and completion together."
            )
            raise invalid(message, name, "context_length_exceeded")
        return longest - num_prompt

    def _check_fits(self, num_prompt: int, params: SamplingParams) -> None:
        longest, num_asked = self.card.max_model_len, params.max_tokens or params.min_tokens
        if num_prompt + num_asked > longest:
            name = "max_tokens" if params.max_tokens else "min_tokens"
            message = (
                f"The prompt has {num_prompt} tokens and {name} is {num_asked}, together {num_prompt + num_asked}; the "
                f"model's context is {longest} tokens."
            )
            raise invalid(message, name, "context_length_exceeded")

    async def stream(self, jobs: Sequence[Job]) -> AsyncGenerator[TextDelta, None]:
        """Yields text as it is made, of several jobs mixed; closing the generator aborts them. Raises ApiError."""
        streams = [self._stream_one(index, job) for index, job in enumerate(jobs)]
        async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as deltas:
            async for delta in deltas:
                yield delta

    async def _stream_one(self, index: int, job: Job) -> AsyncGenerator[TextDelta, None]:
        text = _Text(index, job.params, self._tokenizer)
        with self.metrics.request() as clock:
            async with aclosing(self._outputs(job)) as outputs:
                async for output in outputs:
                    delta = text.push(output)
                    clock.count(delta.num_prompt, len(delta.token_ids))
                    if delta.finish_reason:
                        clock.finish(delta.finish_reason)
                        break
                    yield delta
                else:
                    raise from_exception(EngineFailed("The engine ended the request without a finish reason."))
        yield delta  # only now, so that a stop string has freed the engine before the client hears of it

    async def _outputs(self, job: Job) -> AsyncGenerator[TokenOutput, None]:
        try:
            # Our own id, because clients may repeat theirs.
            source = self._source.generate(uuid.uuid4().hex, job.prompt_token_ids, job.params)
            async with aclosing(source) as outputs:
                async for output in outputs:
                    yield output
        except Exception as error:
            raise from_exception(error) from error


class _Text:
    """The text of one completion. Like stop tokens, stop strings count only after `min_tokens` tokens."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self._index, self._min_tokens, self._num_tokens = index, params.min_tokens, 0
        self._detokenizer, self._stops = Detokenizer(tokenizer.token_bytes), StopMatcher(params.stop)

    def push(self, output: TokenOutput) -> TextDelta:
        # A stop token is the last id of its output and no part of the text.
        num_shown = len(output.token_ids) - (output.finish_reason is FinishReason.STOP)
        pieces = []
        for n, token_id in enumerate(output.token_ids[:num_shown], 1):
            piece, is_stopped = self._push_token(token_id)
            pieces.append(piece)
            if is_stopped:
                stopped = replace(output, token_ids=output.token_ids[:n], finish_reason=FinishReason.STOP)
                return self._delta("".join(pieces), replace(stopped, num_generated=self._num_tokens))
        if output.finish_reason:
            pieces.append(self._stops.flush())
        return self._delta("".join(pieces), output)

    def _push_token(self, token_id: int) -> tuple[str, bool]:
        self._num_tokens += 1
        text = self._detokenizer.push(token_id)
        return (text, False) if self._num_tokens <= self._min_tokens else self._stops.push(text)

    def _delta(self, text: str, output: TokenOutput) -> TextDelta:
        tokens, reason = output.token_ids, output.finish_reason
        return TextDelta(self._index, text, tokens, reason, output.num_prompt, output.num_generated)


async def _merge(streams: Sequence[AsyncGenerator[TextDelta, None]]) -> AsyncGenerator[TextDelta, None]:
    """Yields what any stream yields, as it comes; the first exception of one ends all."""
    queue: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue(MERGE_QUEUE_LEN)
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        num_open = len(pumps)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(stream: AsyncGenerator[TextDelta, None], queue: asyncio.Queue[TextDelta | Exception | None]) -> None:
    try:
        async with aclosing(stream):
            async for delta in stream:
                await queue.put(delta)
        await queue.put(None)
    except Exception as error:
        await queue.put(error)
