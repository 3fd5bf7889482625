"""A `Generation` turns requests into streams of text; it is the one path that REST and gRPC share."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import ParamSpec, Protocol, TypeVar

from services.engine.contract.errors import DeadlinePassed, EngineFailed
from services.engine.contract.sampling_params import Grammar, SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.gateway.bounded_thread_pool import BoundedThreadPool
from services.gateway.chat import grammars
from services.gateway.chat.choice_request import ChoiceRequest
from services.gateway.chat.conversation import Conversation
from services.gateway.chat.grammars import CheckGrammar
from services.gateway.chat.markers import THINK_START
from services.gateway.chat.output_processor import OutputProcessor
from services.gateway.chat.text_delta import TextDelta
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.errors import ApiError, ApiRefusal, client_errors, invalid
from services.gateway.generation_request import MAX_CHOICES, GenerationRequest, Prompt
from services.gateway.metrics.request_metrics import RequestMetrics

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's reference; a chat may use the whole context
MERGE_QUEUE_LEN = 16  # text deltas of all choices that wait for the client; a full queue stops the choices' streams
INLINE_CHARS = 16_384  # characters; tokenizing them takes about 5 ms, and longer texts go to a thread
INLINE_TOKENS = 1024  # decoding them one by one takes about 1 ms, and longer lists go to a thread

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ModelCard:
    """A `ModelCard` holds what the API tells clients about the served model."""

    id: str
    max_model_len: int  # tokens of prompt and completion together
    created: int  # Unix time, seconds
    owned_by: str = "expertmesh"


class TokenSource(Protocol):
    """A `TokenSource` generates tokens: it is the engine itself or a handle to engines in other processes.

    Closing the generator frees everything that the request holds. `generate` raises ValueError (a sentence for the
    client), EngineOverloaded, EngineFailed, DeadlinePassed (after `timeout` seconds) or ApiError.
    """

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, timeout: float | None = None
    ) -> AsyncGenerator[TokenOutput, None]: ...


def derived_seed(seed: int | None, choice: int) -> int | None:
    """Return the seed of the `choice`-th choice: the request's own for choice 0, else one derived from it."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class Generation:
    """A `Generation` prepares requests (template, tokens, grammar), has the engine generate, and streams the text.

    Preparing raises the exceptions of `services.engine.contract.errors`, ValueError and ApiError; a surface turns all
    of them into ApiError with `errors.client_errors`. `stream` raises only ApiError. `check_grammar` refuses a bad
    grammar before the engine does, so that the error can name the client's parameter.
    """

    def __init__(
        self,
        source: TokenSource,
        tokenizer: Tokenizer,
        card: ModelCard,
        check_grammar: CheckGrammar | None = None,
        threads: BoundedThreadPool | None = None,
        metrics: RequestMetrics | None = None,
    ) -> None:
        self._threads = threads or BoundedThreadPool()
        self._grammar_threads = BoundedThreadPool()  # separate, because checking one grammar may take seconds
        self._source, self.tokenizer, self.card, self._check_grammar = source, tokenizer, card, check_grammar
        self._markers = grammars.Markers.of(tokenizer)
        self.metrics = metrics or RequestMetrics(card.id)

    def check_model(self, model: str | None) -> None:
        """Raise ApiError unless `model` is the served one; None and an empty name mean the served one."""
        if model and model != self.card.id:
            message = f"The model {model!r:.100} does not exist; this server serves {self.card.id!r}."
            raise ApiError(ApiRefusal.NOT_FOUND, message, "model", "model_not_found")

    async def prepare(self, requests: Sequence[GenerationRequest]) -> list[ChoiceRequest]:
        """Check and tokenize `requests`, and return `n` choices for each of them, in order.

        Raises ApiError with the numbers if a prompt does not fit the model's context.
        """
        start = asyncio.get_running_loop().time()
        choices = [choice for request in requests for choice in await self._choices_in_time(request, start)]
        if len(choices) > MAX_CHOICES:
            raise invalid(f"n times the number of prompts must be at most {MAX_CHOICES}, not {len(choices)}.", "n")
        return choices

    async def tokenize(self, request: GenerationRequest, add_special_tokens: bool) -> list[int]:
        """Return the token ids of the request's prompt."""
        request.check()
        return await self._token_ids(request.prompt_with_tools(), add_special_tokens)

    async def token_texts(self, token_ids: list[int]) -> list[str]:
        """Return the text of each token by itself."""
        return await self._run(len(token_ids) > INLINE_TOKENS, self.tokenizer.texts, token_ids)

    def detokenize(self, token_ids: list[int]) -> str:
        """Return the text of `token_ids`. Raises ValueError if an id is not in the vocabulary."""
        self._check_ids("tokens", token_ids)
        return self.tokenizer.decode(token_ids)

    async def stream(self, choices: Sequence[ChoiceRequest], request_id: str) -> AsyncGenerator[TextDelta, None]:
        """Yield the text of all `choices`, interleaved as it is generated. Closing the generator aborts the choices."""
        streams = [self._stream_one(index, choice, request_id) for index, choice in enumerate(choices)]
        async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as deltas:
            async for delta in deltas:
                yield delta

    async def _choices_in_time(self, request: GenerationRequest, start: float) -> list[ChoiceRequest]:
        """Prepare `request` within its timeout, which began at `start` on the event loop's clock.

        The choices get the seconds that are left. Raises DeadlinePassed if none are.
        """
        request.check()
        if request.timeout is None:
            return await self._choices(request)
        deadline = start + request.timeout
        try:
            async with asyncio.timeout_at(deadline):
                choices = await self._choices(request)
        except TimeoutError as error:
            raise DeadlinePassed("The request's deadline passed before its prompt was ready.") from error
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        return [replace(choice, timeout=left) for choice in choices]

    async def _choices(self, request: GenerationRequest) -> list[ChoiceRequest]:
        prompt = request.prompt_with_tools()
        is_chat = isinstance(prompt, Conversation)
        is_prompt_only = request.echo and request.sampling.get("max_tokens") == 0
        params = SamplingParams(**{**request.sampling, **({"max_tokens": 1} if is_prompt_only else {})})
        self._check_ids("logit_bias", [token_id for token_id, _ in params.logit_bias])
        self._check_ids("stop_token_ids", params.stop_token_ids)
        text = self.tokenizer.render(prompt) if isinstance(prompt, Conversation) else prompt
        in_reasoning = is_chat and isinstance(text, str) and text.rstrip().endswith(THINK_START)
        token_ids = await self._token_ids(text, add_special_tokens=not is_chat)
        params = self._fit_context(params, len(token_ids), is_chat)
        grammar = await self._grammar(request, in_reasoning)
        echo = (text if isinstance(text, str) else self.tokenizer.decode(token_ids)) if request.echo else None
        params = replace(params, grammar=grammar)
        choice = ChoiceRequest(token_ids, params, in_reasoning, request.tool_use, echo, is_prompt_only)
        seeds = [derived_seed(params.seed, index) for index in range(request.n or 1)]
        return [replace(choice, params=replace(params, seed=seed)) for seed in seeds]

    async def _token_ids(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, list):
            if (lowest := min(prompt, default=0)) < 0:  # the engine, which knows the vocabulary, checks the highest
                raise ValueError(f"prompt must hold token ids of at least 0, not {lowest}.")
            return prompt
        text = self.tokenizer.render(prompt) if isinstance(prompt, Conversation) else prompt
        return await self._run(len(text) > INLINE_CHARS, self.tokenizer.encode, text, add_special_tokens)

    async def _run(self, is_long: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in a thread if it `is_long`, so that it does not block the event loop; else call it here.

        Raises EngineOverloaded if too many calls wait for a thread.
        """
        return await self._threads.run(function, *args, **kwargs) if is_long else function(*args, **kwargs)

    async def _grammar(self, request: GenerationRequest, in_reasoning: bool) -> Grammar | None:
        """Return the checked grammar of the whole answer, or None if its text is free."""
        answer_format, tool_use = request.answer_format, request.tool_use
        answer = answer_format.grammar if answer_format else None
        if answer_format and self._check_grammar:
            check = (answer_format.grammar, answer_format.param, self._check_grammar)
            await self._grammar_threads.run(grammars.check, *check)
        composed = grammars.compose(answer, tool_use, in_reasoning, self._markers)
        if composed is not None and composed is not answer and self._check_grammar:
            param = "tools" if tool_use.tools else "the answer's form"
            await self._grammar_threads.run(grammars.check, composed, param, self._check_grammar)
        return composed

    def _check_ids(self, param: str, token_ids: Sequence[int]) -> None:
        """Raise ValueError about `param` if a token id is not in the vocabulary."""
        for token_id in token_ids:
            if not 0 <= token_id < self.tokenizer.vocab_size:
                highest = self.tokenizer.vocab_size - 1
                raise ValueError(f"{param} holds the token id {token_id}; allowed are 0 to {highest}.")

    def _fit_context(self, params: SamplingParams, num_prompt: int, is_chat: bool) -> SamplingParams:
        """Return `params` with the default of max_tokens filled in. Raises ApiError if the context is too short."""
        longest, num_asked = self.card.max_model_len, params.max_tokens or params.min_tokens
        if num_prompt >= longest:
            message = (
                f"The prompt has {num_prompt} tokens; at most {longest - 1} are allowed, because the model's context "
                f"is {longest} tokens for prompt and completion together."
            )
            raise invalid(message, "messages" if is_chat else "prompt", "context_length_exceeded")
        if num_prompt + num_asked > longest:
            param = "max_tokens" if params.max_tokens else "min_tokens"
            message = (
                f"The prompt has {num_prompt} tokens and {param} is {num_asked}, together {num_prompt + num_asked}; "
                f"the model's context is {longest} tokens."
            )
            raise invalid(message, param, "context_length_exceeded")
        if params.max_tokens is None and not is_chat:
            default = max(DEFAULT_MAX_TOKENS, params.min_tokens)
            return replace(params, max_tokens=min(longest - num_prompt, default))
        return params

    async def _stream_one(self, index: int, choice: ChoiceRequest, request_id: str) -> AsyncGenerator[TextDelta, None]:
        processor = OutputProcessor(index, choice, self.tokenizer)
        with self.metrics.request(request_id, index) as clock:
            async with aclosing(self._outputs(f"{request_id}-{index}", choice)) as outputs:
                async for output in outputs:
                    delta = processor.push(output)
                    clock.count(delta, output.queued_s)
                    if delta.finish_reason:
                        clock.finish(delta.finish_reason)
                        break
                    yield delta
                else:
                    with client_errors():
                        raise EngineFailed("The engine ended the request without a finish reason.")
        # The last delta is sent only now, so that a stop string has freed the engine before the client sees the end.
        yield delta

    async def _outputs(self, name: str, choice: ChoiceRequest) -> AsyncGenerator[TokenOutput, None]:
        with client_errors():
            # A random suffix makes the engine's id unique, because clients may use one request id several times.
            engine_id = f"{name}-{uuid.uuid4().hex[:12]}"
            source = self._source.generate(engine_id, choice.prompt_token_ids, choice.params, choice.timeout)
            async with aclosing(source) as outputs:
                async for output in outputs:
                    yield output


async def _merge(streams: Sequence[AsyncGenerator[TextDelta, None]]) -> AsyncGenerator[TextDelta, None]:
    """Yield the deltas of all `streams` as they come. The first exception of a stream ends all streams."""
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
