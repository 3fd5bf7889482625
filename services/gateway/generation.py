"""The one way from a request to text, shared by REST and gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import math
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, Protocol, TypeVar

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar, SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.gateway.chat import grammars
from services.gateway.chat.answer import Answer, Job, TextDelta
from services.gateway.chat.grammars import CheckGrammar
from services.gateway.chat.text import THINK_START, Chat, Tokenizer
from services.gateway.chat.tools import ToolMode, ToolUse
from services.gateway.errors import ApiError, ApiRefusal, bad_value, from_exception, invalid
from services.gateway.metrics.metrics import Metrics
from services.gateway.threads import BoundedThreads

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, in OpenAI's reference; a chat may use the whole context
MAX_CHOICES = 128  # of one request: prompts times n
MAX_REQUEST_ID_LEN = 128
MERGE_QUEUE_LEN = 16
INLINE_CHARS = 16_384  # about 5 ms of tokenizing
INLINE_TOKENS = 1024  # about 1 ms of spelling
RESERVED_KWARGS = {  # what transformers' apply_chat_template takes for itself
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}

Prompt = str | list[int] | Chat
P = ParamSpec("P")
T = TypeVar("T")


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

    Raises ValueError (a sentence for the client), EngineOverloaded, EngineFailed, DeadlinePassed (after `timeout`
    seconds) or ApiError.
    """

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, timeout: float | None = None
    ) -> AsyncGenerator[TokenOutput, None]: ...


@dataclass(frozen=True)
class Shape:
    """What an answer must match; `place` is the parameter that says so."""

    grammar: Grammar
    place: str


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and what is wanted for it; `sampling` holds the fields of SamplingParams that the client gave."""

    prompt: Prompt
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int | None = None
    echo: bool = False  # the prompt opens the text
    shape: Shape | None = None
    use: ToolUse = field(default_factory=ToolUse)
    timeout: float | None = None  # seconds from now to the last token

    def check(self) -> None:
        """Raises ValueError for what contradicts itself."""
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise ValueError(f"n must be 1 to {MAX_CHOICES}, not {self.n}.")
        if self.timeout is not None and not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ValueError(f"timeout must be a number of seconds above 0, not {self.timeout}.")
        if self.echo and isinstance(self.prompt, Chat):
            raise ValueError("echo may only be given with a plain prompt, not with messages.")
        self.use.check()
        if self.shape and self.use.is_forced:
            raise ValueError(f"{self.shape.place} may not be given together with a tool_choice that forces a call.")


@dataclass
class UsageTally:
    """The tokens of one request with `n` choices for each prompt, for its usage: prompts count once, answers all."""

    n: int
    num_prompt: dict[int, int] = field(default_factory=dict)
    num_cached: dict[int, int] = field(default_factory=dict)
    num_generated: dict[int, int] = field(default_factory=dict)

    def add(self, delta: TextDelta) -> None:
        prompt = delta.index // self.n
        if delta.index % self.n == 0 or prompt not in self.num_prompt:
            self.num_prompt[prompt], self.num_cached[prompt] = delta.num_prompt, delta.num_cached
        self.num_generated[delta.index] = delta.num_generated

    @property
    def prompt_tokens(self) -> int:
        return sum(self.num_prompt.values())

    @property
    def cached_tokens(self) -> int:
        return sum(self.num_cached.values())

    @property
    def completion_tokens(self) -> int:
        return sum(self.num_generated.values())


def template_kwargs(kwargs: Mapping[str, Any] | None, enable_thinking: bool | None) -> dict[str, Any]:
    """Arguments of the chat template; `enable_thinking` may be given by itself as well."""
    given = dict(kwargs or {})
    if reserved := sorted(given.keys() & RESERVED_KWARGS):
        raise ValueError(f"chat_template_kwargs must not hold {reserved[0]!r}, which the server itself sets.")
    if enable_thinking is not None:
        if given.get("enable_thinking", enable_thinking) is not enable_thinking:
            raise ValueError("enable_thinking must be the same in chat_template_kwargs where both are given; give one.")
        given["enable_thinking"] = enable_thinking
    return given


def check_request_id(request_id: str, place: str) -> None:
    """Raises ApiError for one that is too long for logs and headers, or not printable."""
    if len(request_id) > MAX_REQUEST_ID_LEN or not (request_id.isascii() and request_id.isprintable()):
        raise invalid(f"{place} must be at most {MAX_REQUEST_ID_LEN} printable ASCII characters long.", place)


def derived_seed(seed: int | None, choice: int) -> int | None:
    """The first choice has the seed that was asked for; the others have seeds of their own that follow from it."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class Generation:
    """`check_grammar` refuses a client's mistake before the engine does, with the name of the client's parameter."""

    def __init__(
        self,
        source: TokenSource,
        tokenizer: Tokenizer,
        card: ModelCard,
        check_grammar: CheckGrammar | None = None,
        threads: BoundedThreads | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._threads = threads or BoundedThreads()
        self._checks = BoundedThreads()  # apart, because a grammar may take seconds
        self._source, self.tokenizer, self.card, self._check_grammar = source, tokenizer, card, check_grammar
        self._markers = grammars.Markers.of(tokenizer)
        self.metrics = metrics or Metrics(card.id)

    def check_model(self, model: str | None) -> None:
        """Raises ApiError unless `model` is the served one; none or an empty name means the served one."""
        if model and model != self.card.id:
            message = f"The model {model!r:.100} does not exist; this server serves {self.card.id!r}."
            raise ApiError(ApiRefusal.NOT_FOUND, message, "model", "model_not_found")

    async def prepare(self, asks: Callable[[], Sequence[GenerationRequest]]) -> list[Job]:
        """Checks and tokenizes: `n` jobs for each ask, in order.

        Raises ApiError, for a ValueError of `asks` too, and for a prompt over the model's context with the numbers.
        """
        start = asyncio.get_running_loop().time()
        try:
            jobs = [job for ask in asks() for job in await self._jobs_in_time(ask, start)]
        except (ValueError, EngineOverloaded, EngineFailed, DeadlinePassed) as error:
            raise from_exception(error) from error
        if len(jobs) > MAX_CHOICES:
            raise invalid(f"n times the number of prompts must be at most {MAX_CHOICES}, not {len(jobs)}.", "n")
        return jobs

    async def tokenize(self, ask: Callable[[], GenerationRequest], add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt; raises ApiError, for a ValueError of `ask` too."""
        try:
            asked = ask()
            asked.check()
            return await self._token_ids(_with_tools(asked), add_special_tokens)
        except (ValueError, EngineOverloaded) as error:
            raise from_exception(error) from error

    async def token_texts(self, token_ids: list[int]) -> list[str]:
        """The text of each token; raises ApiError."""
        try:
            return await self._aside(len(token_ids) > INLINE_TOKENS, self.tokenizer.texts, token_ids)
        except EngineOverloaded as error:
            raise from_exception(error) from error

    def detokenize(self, token_ids: list[int]) -> str:
        """Raises ApiError for ids that are not in the vocabulary."""
        try:
            self._check_ids("tokens", token_ids)
        except ValueError as error:
            raise bad_value(error) from error
        return self.tokenizer.decode(token_ids)

    async def _token_ids(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, list):
            if (lowest := min(prompt, default=0)) < 0:  # the engine, which knows the vocabulary, checks the highest
                raise ValueError(f"prompt must hold token ids of at least 0, not {lowest}.")
            return prompt
        text = self.tokenizer.render(prompt) if isinstance(prompt, Chat) else prompt
        return await self._aside(len(text) > INLINE_CHARS, self.tokenizer.encode, text, add_special_tokens)

    async def _aside(self, is_long: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Long work leaves the event loop alone. Raises EngineOverloaded."""
        return await self._threads.run(function, *args, **kwargs) if is_long else function(*args, **kwargs)

    async def _jobs_in_time(self, ask: GenerationRequest, start: float) -> list[Job]:
        """Jobs with the seconds left to them, of those asked for since `start` of the loop's clock."""
        ask.check()
        if ask.timeout is None:
            return await self._jobs(ask)
        deadline = start + ask.timeout
        try:
            async with asyncio.timeout_at(deadline):
                jobs = await self._jobs(ask)
        except TimeoutError as error:
            raise DeadlinePassed("The request's deadline passed before its prompt was ready.") from error
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        return [replace(job, timeout=left) for job in jobs]

    async def _jobs(self, ask: GenerationRequest) -> list[Job]:
        prompt, name = _with_tools(ask), "messages" if isinstance(ask.prompt, Chat) else "prompt"
        is_prompt_only = ask.echo and ask.sampling.get("max_tokens") == 0
        params = SamplingParams(**{**ask.sampling, **({"max_tokens": 1} if is_prompt_only else {})})
        self._check_ids("logit_bias", [token_id for token_id, _ in params.logit_bias])
        self._check_ids("stop_token_ids", params.stop_token_ids)
        text = self.tokenizer.render(prompt) if isinstance(prompt, Chat) else prompt
        reasons = isinstance(prompt, Chat) and isinstance(text, str) and text.rstrip().endswith(THINK_START)
        token_ids = await self._token_ids(text, add_special_tokens=name == "prompt")
        params = self._fitting(params, len(token_ids), name)
        grammar = await self._grammar(ask, reasons)
        echo = (text if isinstance(text, str) else self.tokenizer.decode(token_ids)) if ask.echo else None
        job = Job(token_ids, replace(params, grammar=grammar), reasons, ask.use, echo, is_prompt_only)
        return [
            replace(job, params=replace(job.params, seed=derived_seed(params.seed, choice)))
            for choice in range(ask.n or 1)
        ]

    async def _grammar(self, ask: GenerationRequest, reasons: bool) -> Grammar | None:
        answer = ask.shape.grammar if ask.shape else None
        if ask.shape and self._check_grammar:
            await self._checks.run(grammars.check, ask.shape.grammar, ask.shape.place, self._check_grammar)
        composed = grammars.compose(answer, ask.use, reasons, self._markers)
        if composed is not None and composed is not answer and self._check_grammar:
            place = "tools" if ask.use.tools else "the answer's form"
            await self._checks.run(grammars.check, composed, place, self._check_grammar)
        return composed

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.tokenizer.vocab_size:
                highest = self.tokenizer.vocab_size - 1
                raise ValueError(f"{name} holds the token id {token_id}; allowed are 0 to {highest}.")

    def _fitting(self, params: SamplingParams, num_prompt: int, name: str) -> SamplingParams:
        """Raises ApiError unless prompt and answer fit the model's context."""
        longest, num_asked = self.card.max_model_len, params.max_tokens or params.min_tokens
        if num_prompt >= longest:
            message = (
                f"The prompt has {num_prompt} tokens; at most {longest - 1} are allowed, because the model's context "
                f"is {longest} tokens for prompt and completion together."
            )
            raise invalid(message, name, "context_length_exceeded")
        if num_prompt + num_asked > longest:
            asked = "max_tokens" if params.max_tokens else "min_tokens"
            message = (
                f"The prompt has {num_prompt} tokens and {asked} is {num_asked}, together {num_prompt + num_asked}; "
                f"the model's context is {longest} tokens."
            )
            raise invalid(message, asked, "context_length_exceeded")
        if params.max_tokens is None and name == "prompt":
            default = max(DEFAULT_MAX_TOKENS, params.min_tokens)
            return replace(params, max_tokens=min(longest - num_prompt, default))
        return params

    async def stream(self, jobs: Sequence[Job], request_id: str) -> AsyncGenerator[TextDelta, None]:
        """Yields text as it is made, of several jobs mixed; closing the generator aborts them. Raises ApiError."""
        streams = [self._stream_one(index, job, request_id) for index, job in enumerate(jobs)]
        async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as deltas:
            async for delta in deltas:
                yield delta

    async def _stream_one(self, index: int, job: Job, request_id: str) -> AsyncGenerator[TextDelta, None]:
        answer = Answer(index, job, self.tokenizer)
        with self.metrics.request(request_id, index) as clock:
            async with aclosing(self._outputs(f"{request_id}-{index}", job)) as outputs:
                async for output in outputs:
                    delta = answer.push(output)
                    clock.count(delta, output.queued_s)
                    if delta.finish_reason:
                        clock.finish(delta.finish_reason)
                        break
                    yield delta
                else:
                    raise from_exception(EngineFailed("The engine ended the request without a finish reason."))
        yield delta  # only now, so that a stop string has freed the engine before the client hears of it

    async def _outputs(self, name: str, job: Job) -> AsyncGenerator[TokenOutput, None]:
        try:
            # An id of our own after the client's, because clients may repeat theirs.
            engine_id = f"{name}-{uuid.uuid4().hex[:12]}"
            source = self._source.generate(engine_id, job.prompt_token_ids, job.params, job.timeout)
            async with aclosing(source) as outputs:
                async for output in outputs:
                    yield output
        except Exception as error:
            raise from_exception(error) from error


def _with_tools(ask: GenerationRequest) -> Prompt:
    """The model is told of the tools unless it may not use them."""
    if not isinstance(ask.prompt, Chat) or ask.use.mode is ToolMode.NONE:
        return ask.prompt
    return replace(ask.prompt, tools=tuple(tool.to_template() for tool in ask.use.tools))


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
