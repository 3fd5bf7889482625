"""A `Generation` turns requests into streams of text, for the REST API and the gRPC API."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_defaults import SamplingDefaults
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.gateway.bounded_thread_pool import BoundedThreadPool
from services.gateway.chat.choice_request import ChoiceRequest
from services.gateway.chat.grammars import CheckGrammar
from services.gateway.chat.output_processor import OutputProcessor
from services.gateway.chat.text_delta import TextDelta
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.errors import ApiError, ApiRefusal, client_errors, invalid
from services.gateway.generation_request import GenerationRequest
from services.gateway.limits import GatewayLimits
from services.gateway.metrics.request_metrics import RequestMetrics
from services.gateway.preparation import Preparation

# Maximum number of text deltas that wait for the client, for all choices of a request together. A full queue stops the
# streams of the choices.
MERGE_QUEUE_LEN = 16
INLINE_TOKENS = 1024  # longer lists of tokens are decoded in a thread; decoding this many tokens takes about 1 ms


@dataclass(frozen=True)
class ModelCard:
    """A `ModelCard` holds the facts about the served model that the API reports to clients."""

    id: str
    max_model_len: int  # maximum number of tokens of prompt and completion together
    created: int  # Unix time in seconds at which the gateway started
    owned_by: str = "expertmesh"


class TokenSource(Protocol):
    """A `TokenSource` generates tokens: either an engine in this process or a handle to engines in other processes.

    Closing the generator frees everything that the request holds. `generate` raises

    - ValueError with a sentence for the client, if a parameter is bad,
    - EngineOverloaded, EngineFailed or ApiError,
    - DeadlinePassed if the request has not ended after `timeout` seconds.
    """

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, timeout: float | None = None
    ) -> AsyncGenerator[TokenOutput, None]: ...


class Generation:
    """A `Generation` prepares requests (template, tokens, grammar), sends them to the engine and streams the text.

    `prepare` raises the exceptions of `services.engine.contract.errors`, ValueError and ApiError; the REST and gRPC
    handlers turn all these exceptions into ApiError with `errors.client_errors`. `stream` raises only ApiError.
    `check_grammar` refuses a bad grammar before the engine does, so that the error can name the client's parameter.
    """

    def __init__(
        self,
        source: TokenSource,
        tokenizer: Tokenizer,
        card: ModelCard,
        check_grammar: CheckGrammar | None = None,
        threads: BoundedThreadPool | None = None,
        metrics: RequestMetrics | None = None,
        limits: GatewayLimits | None = None,
        defaults: SamplingDefaults | None = None,
    ) -> None:
        self.limits = (limits or GatewayLimits()).for_context(card.max_model_len)
        self.threads = threads or BoundedThreadPool()
        self._source, self.tokenizer, self.card = source, tokenizer, card
        self._preparation = Preparation(
            tokenizer, card.max_model_len, self.limits, self.threads, check_grammar, defaults or SamplingDefaults()
        )
        self.metrics = metrics or RequestMetrics(card.id)

    def check_model(self, model: str | None) -> None:
        """Raise ApiError if `model` names another model than the served model; None and "" are allowed."""
        if model and model != self.card.id:
            message = f"The model {model!r:.100} does not exist; this server serves {self.card.id!r}."
            raise ApiError(ApiRefusal.NOT_FOUND, message, "model", "model_not_found")

    async def prepare(self, request: GenerationRequest) -> list[ChoiceRequest]:
        """Check and tokenize `request`, and return the `n` choices of each prompt, in the order of the prompts.

        Raises ApiError if a prompt is too long for the model's context; the message gives the length of both in tokens.
        """
        return await self._preparation.choices(request)

    async def tokenize(self, request: GenerationRequest, add_special_tokens: bool) -> list[int]:
        """Return the token ids of the request's prompt. Raises ApiError if they are more than the gateway's limit."""
        return await self._preparation.token_ids(request, add_special_tokens)

    async def num_tokens(self, request: GenerationRequest, most: int) -> int:
        """Return the number of tokens of the request's prompt, or `most` + 1 if the prompt has many more."""
        return await self._preparation.num_tokens(request, most)

    async def token_texts(self, token_ids: list[int]) -> list[str]:
        """Return a list with the text of each token, decoded separately from the other tokens."""
        return await self.threads.run_if(len(token_ids) > INLINE_TOKENS, self.tokenizer.texts, token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens `token_ids`.

        Raises ValueError if an id is not in the vocabulary, and ApiError if the ids are more than the gateway's limit.
        """
        self.check_num_ids(len(token_ids))
        return await self.threads.run_if(len(token_ids) > INLINE_TOKENS, self._detokenized, token_ids)

    async def stream(self, choices: Sequence[ChoiceRequest], request_id: str) -> AsyncGenerator[TextDelta, None]:
        """Yield text deltas of all `choices` in the order in which the engine generates the deltas.

        If the caller closes the generator, the engine stops generating the choices.
        """
        streams = [self._stream_one(index, choice, request_id) for index, choice in enumerate(choices)]
        async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as deltas:
            async for delta in deltas:
                yield delta

    def check_num_ids(self, num_ids: int) -> None:
        """Raise ApiError if `num_ids` token ids are too many to be detokenized."""
        if num_ids > (most := self.limits.max_tokenize_tokens(self.card.max_model_len)):
            raise invalid(f"tokens must hold at most {most} token ids, but holds more.", "tokens")

    def _detokenized(self, token_ids: Sequence[int]) -> str:
        self._preparation.check_ids("tokens", token_ids)
        return self.tokenizer.decode(token_ids)

    async def _stream_one(self, index: int, choice: ChoiceRequest, request_id: str) -> AsyncGenerator[TextDelta, None]:
        processor = OutputProcessor(index, choice, self.tokenizer)
        with self.metrics.request(request_id, index) as clock:
            async with aclosing(self._outputs(f"{request_id}-{index}", choice)) as outputs:
                async for output in outputs:
                    num_scores = len(output.prompt_logprobs) * (1 + (choice.params.prompt_logprobs or 0))
                    delta = await self.threads.run_if(num_scores > INLINE_TOKENS, processor.push, output)
                    clock.count(delta, output.queued_s)
                    if delta.finish_reason:
                        clock.finish(delta.finish_reason)
                        break
                    yield delta
                else:
                    with client_errors():
                        raise EngineFailed("The engine ended the request without a finish reason.")
        # The last delta is sent only after the engine's request is closed. When the client sees the end of the choice,
        # the engine is therefore free, even if a stop string ended the choice early.
        yield delta

    async def _outputs(self, name: str, choice: ChoiceRequest) -> AsyncGenerator[TokenOutput, None]:
        with client_errors():
            # The random suffix makes the id unique in the engine, because clients may use one request id several times.
            engine_id = f"{name}-{uuid.uuid4().hex[:12]}"
            source = self._source.generate(engine_id, choice.prompt_token_ids, choice.params, choice.timeout)
            async with aclosing(source) as outputs:
                async for output in outputs:
                    yield output


async def _merge(streams: Sequence[AsyncGenerator[TextDelta, None]]) -> AsyncGenerator[TextDelta, None]:
    """Yield the deltas of all `streams` in the order in which the deltas arrive.

    If a stream raises an exception, the exception is raised here and all other streams end.
    """
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
