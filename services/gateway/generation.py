"""A `Generation` turns requests into streams of text, for the REST API and the gRPC API."""

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
from services.gateway.limits import GatewayLimits
from services.gateway.metrics.request_metrics import RequestMetrics

# default of max_tokens for /v1/completions, as in OpenAI's reference; a chat may use the whole context by default
DEFAULT_MAX_TOKENS = 16
# Maximum number of text deltas that wait for the client, for all choices of a request together. A full queue stops the
# streams of the choices.
MERGE_QUEUE_LEN = 16
INLINE_CHARS = 16_384  # longer texts are tokenized in a thread; tokenizing this many characters takes about 5 ms
INLINE_TOKENS = 1024  # longer lists of tokens are decoded in a thread; decoding this many tokens takes about 1 ms

P = ParamSpec("P")
T = TypeVar("T")


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


def derived_seed(seed: int | None, choice: int) -> int | None:
    """Return the seed of the choice with the index `choice`, or None if the request has no seed.

    Choice 0 gets the request's `seed`. Every other choice gets a hash of `seed` and `choice`.
    """
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


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
    ) -> None:
        self.limits = limits or GatewayLimits()
        self._threads = threads or BoundedThreadPool()
        # a separate pool, because checking one grammar may take seconds and must not delay tokenizing
        self._grammar_threads = BoundedThreadPool()
        self._source, self.tokenizer, self.card, self._check_grammar = source, tokenizer, card, check_grammar
        self._markers = grammars.Markers.of(tokenizer)
        self.metrics = metrics or RequestMetrics(card.id)

    def check_model(self, model: str | None) -> None:
        """Raise ApiError if `model` names another model than the served model; None and "" are allowed."""
        if model and model != self.card.id:
            message = f"The model {model!r:.100} does not exist; this server serves {self.card.id!r}."
            raise ApiError(ApiRefusal.NOT_FOUND, message, "model", "model_not_found")

    async def prepare(self, requests: Sequence[GenerationRequest]) -> list[ChoiceRequest]:
        """Check and tokenize `requests`, and return the `n` choices of each request, in the order of the requests.

        Raises ApiError if a prompt is too long for the model's context; the message gives the length of both in tokens.
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
        """Return a list with the text of each token, decoded separately from the other tokens."""
        return await self._run(len(token_ids) > INLINE_TOKENS, self.tokenizer.texts, token_ids)

    def detokenize(self, token_ids: list[int]) -> str:
        """Return the text of the tokens `token_ids`. Raises ValueError if an id is not in the vocabulary."""
        self._check_ids("tokens", token_ids)
        return self.tokenizer.decode(token_ids)

    async def stream(self, choices: Sequence[ChoiceRequest], request_id: str) -> AsyncGenerator[TextDelta, None]:
        """Yield text deltas of all `choices` in the order in which the engine generates the deltas.

        If the caller closes the generator, the engine stops generating the choices.
        """
        streams = [self._stream_one(index, choice, request_id) for index, choice in enumerate(choices)]
        async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as deltas:
            async for delta in deltas:
                yield delta

    async def _choices_in_time(self, request: GenerationRequest, start: float) -> list[ChoiceRequest]:
        """Prepare the choices of `request`, and give each choice the seconds that are left of the request's timeout.

        The timeout began at `start`, a time of the event loop's clock. Raises DeadlinePassed if the timeout ends before
        the choices are prepared.
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
            # The engine refuses ids that are too high, because the engine knows the model's vocabulary.
            if (lowest := min(prompt, default=0)) < 0:
                raise ValueError(f"prompt must hold token ids of at least 0, not {lowest}.")
            return prompt
        text = self.tokenizer.render(prompt) if isinstance(prompt, Conversation) else prompt
        return await self._run(len(text) > INLINE_CHARS, self.tokenizer.encode, text, add_special_tokens)

    async def _run(self, is_long: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` and return its result; if `is_long` is True, the call runs in a thread of a pool.

        A long call in the event loop's own thread would block the event loop. Raises EngineOverloaded if too many calls
        wait for a thread.
        """
        return await self._threads.run(function, *args, **kwargs) if is_long else function(*args, **kwargs)

    async def _grammar(self, request: GenerationRequest, in_reasoning: bool) -> Grammar | None:
        """Return the checked grammar of the whole answer, or None if the answer may be any text."""
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
        """Raise ValueError if a token id is not in the vocabulary; the message names the parameter `param`."""
        for token_id in token_ids:
            if not 0 <= token_id < self.tokenizer.vocab_size:
                highest = self.tokenizer.vocab_size - 1
                raise ValueError(f"{param} holds the token id {token_id}; allowed are 0 to {highest}.")

    def _fit_context(self, params: SamplingParams, num_prompt: int, is_chat: bool) -> SamplingParams:
        """Return `params`; a completion without max_tokens gets the default for max_tokens.

        `num_prompt` is the number of tokens of the prompt. Raises ApiError if the prompt and the requested tokens do
        not fit the model's context.
        """
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
