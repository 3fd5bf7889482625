"""A `Preparation` turns a client's request into choices for the engine: template, tokens, lengths and grammar."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from services.engine.contract.errors import DeadlinePassed
from services.engine.contract.sampling_defaults import SamplingDefaults
from services.engine.contract.sampling_params import Grammar, SamplingParams, ThinkingBudget
from services.gateway.bounded_thread_pool import BoundedThreadPool
from services.gateway.chat.choice_request import ChoiceRequest
from services.gateway.chat.conversation import Conversation
from services.gateway.chat.grammars import CheckGrammar, GrammarBuilder
from services.gateway.chat.stop_strings import StopStrings
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.chat.tools import ToolUse
from services.gateway.errors import ApiError, invalid
from services.gateway.generation_request import GenerationRequest, Prompt
from services.gateway.limits import GatewayLimits
from services.gateway.schema.budget import SchemaBudget

# default of max_tokens for /v1/completions, as in OpenAI's reference; a chat may use the whole context by default
DEFAULT_MAX_TOKENS = 16
NUM_GRAMMAR_THREADS = 32  # grammars that are built or checked at the same time; almost all of them only wait
CHARS_PER_TOKEN = 5  # characters; most texts that fill a context have shorter tokens on average
PIECE_CHARS = 65_536  # characters that are tokenized at once to estimate a text's length, which takes about 15 MB
MANY_CHARS = 2 * PIECE_CHARS  # longer texts are not tokenized at once before the number of their tokens is bounded
INLINE_CHARS = 16_384  # longer prompts are prepared in a thread; tokenizing this many characters takes about 5 ms

T = TypeVar("T")


@dataclass(frozen=True)
class PreparedPrompt:
    """A `PreparedPrompt` holds the tokens of one prompt that fits the model's context."""

    token_ids: list[int]
    in_reasoning: bool  # True: the prompt ends inside the reasoning with which the answer begins
    opens_reasoning: bool  # True: the answer may itself open its reasoning with `<think>`
    echo: str | None  # text of the prompt, if the client wants to see it again


def derived_seed(seed: int | None, choice: int) -> int | None:
    """Return the seed of the choice with the index `choice`, or None if the request has no seed.

    Choice 0 gets the request's `seed`. Every other choice gets a hash of `seed` and `choice`.
    """
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class Preparation:
    """A `Preparation` checks requests and prepares their choices, with long work in threads of `threads`.

    First come the checks that need little time for any request, then the prompts, and only then the choices. All
    choices of a request share the data that does not depend on the choice.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int,
        limits: GatewayLimits,
        threads: BoundedThreadPool,
        check_grammar: CheckGrammar | None,
        defaults: SamplingDefaults,
    ) -> None:
        self._tokenizer, self._max_model_len, self._limits = tokenizer, max_model_len, limits
        self._threads, self._defaults = threads, defaults
        # Grammars have a separate pool, because checking a grammar may take seconds and must not delay tokenizing. The
        # pool has more threads than slow grammars may wait in `check_grammar`, so other grammars find a thread.
        self._grammar_threads = BoundedThreadPool(NUM_GRAMMAR_THREADS)
        budget = SchemaBudget(limits.schema_nodes, limits.schema_bytes)
        self._dialect = tokenizer.dialect
        self._grammars = GrammarBuilder(self._dialect, budget, check_grammar)
        self._think_end_ids = tokenizer.marker_ids(self._dialect.think_end.text)
        opens = self._dialect.opens_reasoning
        self._think_start_ids = tokenizer.marker_ids(self._dialect.think_start.text) if opens else ()
        self._blank_ids = tokenizer.blank_ids() if opens else ()

    async def choices(self, request: GenerationRequest) -> list[ChoiceRequest]:
        """Return the `n` choices of each prompt, in the order of the prompts.

        Raises ValueError or ApiError if the request is invalid, and DeadlinePassed if the request's timeout ends first.
        """
        request.check_timeout()
        if request.timeout is None:
            return await self._choices(request)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.timeout
        choices = await _in_time(self._choices(request), deadline)
        left = max(0.0, deadline - loop.time())
        return [replace(choice, timeout=left) for choice in choices]

    async def token_ids(self, request: GenerationRequest, add_special_tokens: bool) -> list[int]:
        """Return the token ids of the request's first prompt, whose number `tokenize_tokens` limits.

        Raises ApiError or ValueError if the prompt is invalid or too long.
        """
        request = await self._checked(request)
        prompt, *_ = request.prompts()
        return await self._threads.run_if(request.size > INLINE_CHARS, self._tokenized, prompt, add_special_tokens)

    async def num_tokens(self, request: GenerationRequest, most: int) -> int:
        """Return the number of tokens of the request's first prompt, or `most` + 1 if the prompt has many more."""
        request = await self._checked(request)
        prompt, *_ = request.prompts()
        return await self._threads.run_if(request.size > INLINE_CHARS, self._counted, prompt, most)

    def check_ids(self, param: str, token_ids: Sequence[int]) -> None:
        """Raise ValueError if a token id is not in the vocabulary; the message names the parameter `param`."""
        for token_id in token_ids:
            if not 0 <= token_id < self._tokenizer.vocab_size:
                highest = self._tokenizer.vocab_size - 1
                raise ValueError(f"{param} holds the token id {token_id}; allowed are 0 to {highest}.")

    async def _checked(self, request: GenerationRequest) -> GenerationRequest:
        """Check `request`, and return it with the tools that the model may call in its chat format."""
        tool_use = await self._threads.run_if(request.size > INLINE_CHARS, self._usable, request)
        return request if tool_use is request.tool_use else replace(request, tool_use=tool_use)

    def _usable(self, request: GenerationRequest) -> ToolUse:
        request.check(self._limits)
        return self._dialect.usable(request.tool_use)

    async def _choices(self, request: GenerationRequest) -> list[ChoiceRequest]:
        request = await self._checked(request)
        params = request.params(self._defaults.values)
        self.check_ids("logit_bias", params.logit_bias.ids)
        self.check_ids("stop_token_ids", params.stop_token_ids)
        self._check_truncation(request.truncate_prompt_tokens)
        prompts = request.prompts()
        prepared = await self._threads.run_if(request.size > INLINE_CHARS, self._prepared, prompts, request, params)
        params = params.varied(grammar=await self._grammar(request, prepared[0].in_reasoning))
        stops = StopStrings(params.stop)
        return [choice for prompt in prepared for choice in self._of_prompt(prompt, request, params, stops)]

    def _of_prompt(
        self, prompt: PreparedPrompt, request: GenerationRequest, params: SamplingParams, stops: StopStrings
    ) -> list[ChoiceRequest]:
        params = self._within_context(prompt, request, params)
        choice = ChoiceRequest(
            prompt.token_ids,
            params,
            prompt.in_reasoning,
            request.tool_use,
            prompt.echo,
            request.is_prompt_only,
            stops=stops,
            skip_special_tokens=request.skip_special_tokens,
            include_stop_str_in_output=request.include_stop_str_in_output,
            opens_reasoning=prompt.opens_reasoning,
        )
        seeds = [derived_seed(params.seed, index) for index in range(request.n or 1)]
        return [replace(choice, params=params.varied(seed=seed)) for seed in seeds]

    def _within_context(
        self, prompt: PreparedPrompt, request: GenerationRequest, params: SamplingParams
    ) -> SamplingParams:
        """Return `params` with lengths that fit the context: an answer ends where the context ends."""
        room = min(self._max_model_len - len(prompt.token_ids), self._defaults.max_new_tokens or self._max_model_len)
        max_tokens = params.max_tokens
        if max_tokens is None and not request.is_unlimited:
            max_tokens = max(DEFAULT_MAX_TOKENS, params.min_tokens)
        if max_tokens is not None or self._defaults.max_new_tokens:
            room = max_tokens = min(room, max_tokens or room)
        budget = request.thinking.budget(room) if prompt.in_reasoning or prompt.opens_reasoning else None
        thinking = None if budget is None or budget >= room else self._thinking_budget(budget, prompt)
        return params.varied(max_tokens=max_tokens, min_tokens=min(room, params.min_tokens), thinking_budget=thinking)

    def _thinking_budget(self, max_tokens: int, prompt: PreparedPrompt) -> ThinkingBudget:
        if not prompt.opens_reasoning:
            return ThinkingBudget(max_tokens, self._think_end_ids)
        return ThinkingBudget(max_tokens, self._think_end_ids, self._think_start_ids, self._blank_ids)

    def _prepared(
        self, prompts: Sequence[Prompt], request: GenerationRequest, params: SamplingParams
    ) -> list[PreparedPrompt]:
        """Return the tokens of all `prompts`. A long call belongs in a thread."""
        prepared = [self._prepare(prompt, request, params) for prompt in prompts]
        if params.prompt_logprobs is not None:
            num_tokens = sum(len(prompt.token_ids) for prompt in prepared)
            self._check_prompt_logprobs(num_tokens * (request.n or 1) * (1 + params.prompt_logprobs))
        return prepared

    def _check_prompt_logprobs(self, num_scores: int) -> None:
        if num_scores > self._limits.prompt_logprobs:
            raise ValueError(
                f"prompt_logprobs (or echo with logprobs) may ask for at most {self._limits.prompt_logprobs} logprobs, "
                f"which are tokens times n times 1 + alternatives, not {num_scores}."
            )

    def _prepare(self, prompt: Prompt, request: GenerationRequest, params: SamplingParams) -> PreparedPrompt:
        longest, keep = self._max_model_len, request.truncate_prompt_tokens
        if keep == -1:
            keep = longest - min(params.max_tokens or max(DEFAULT_MAX_TOKENS, params.min_tokens), longest - 1)
        text = self._rendered(prompt)
        if isinstance(text, list):
            token_ids = text
        elif keep is not None:
            token_ids = self._bounded(text, not request.is_chat, request.is_chat)
        elif self._is_much_longer(text, longest, CHARS_PER_TOKEN * longest + INLINE_CHARS):
            raise self._too_long(longest, request.is_chat, "more than ")
        else:
            token_ids = self._tokenizer.encode(text, not request.is_chat)
        if is_cut := keep is not None and len(token_ids) > keep:
            token_ids = token_ids[-keep:]
        if len(token_ids) >= longest:
            raise self._too_long(len(token_ids), request.is_chat)
        if isinstance(prompt, list) and (lowest := min(token_ids, default=0)) < 0:
            # The engine refuses ids that are too high, because the engine knows the model's vocabulary.
            raise ValueError(f"prompt must hold token ids of at least 0, not {lowest}.")
        is_chat = isinstance(prompt, Conversation)
        in_reasoning = isinstance(prompt, Conversation) and self._dialect.ends_in_reasoning(prompt, str(text))
        opens_reasoning = is_chat and self._dialect.opens_reasoning and not in_reasoning
        is_text = isinstance(text, str) and not is_cut
        echo = (str(text) if is_text else self._tokenizer.decode(token_ids)) if request.echo else None
        return PreparedPrompt(token_ids, in_reasoning, opens_reasoning, echo)

    def _rendered(self, prompt: Prompt) -> str | list[int]:
        return self._tokenizer.render(prompt) if isinstance(prompt, Conversation) else prompt

    def _tokenized(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        text = self._rendered(prompt)
        return text if isinstance(text, list) else self._bounded(text, add_special_tokens, text is not prompt)

    def _bounded(self, text: str, add_special_tokens: bool, is_chat: bool) -> list[int]:
        """Return the token ids of `text`. Raises ApiError if the ids are more than `tokenize_tokens` allows."""
        most = self._limits.max_tokenize_tokens(self._max_model_len)
        if not self._is_much_longer(text, most):
            token_ids = self._tokenizer.encode(text, add_special_tokens)
            if len(token_ids) <= most:
                return token_ids
        param = "messages" if is_chat else "prompt"
        raise invalid(f"{param} must have at most {most} tokens to be tokenized or truncated, but has more.", param)

    def _counted(self, prompt: Prompt, most: int) -> int:
        text = self._rendered(prompt)
        if isinstance(text, list):
            return len(text)
        is_longer = self._is_much_longer(text, most)
        return most + 1 if is_longer else len(self._tokenizer.encode(text, add_special_tokens=False))

    def _is_much_longer(self, text: str, most: int, num_chars: int = MANY_CHARS) -> bool:
        """Return True if `text` has over `num_chars` characters, and over an eighth more than `most` tokens.

        Tokenizing takes about a second and 250 MB for each megabyte of text. Therefore the text is tokenized in pieces,
        and the function stops at the first piece with too many tokens. Where two pieces meet, a token may be cut in
        two, so the count is too high by a few tokens for each piece.
        """
        if len(text) <= num_chars:
            return False
        num_tokens = 0
        for start in range(0, len(text), PIECE_CHARS):
            num_tokens += len(self._tokenizer.encode(text[start : start + PIECE_CHARS], add_special_tokens=False))
            if num_tokens > most + most // 8:
                return True
        return False

    def _too_long(self, num_prompt: int, is_chat: bool, least: str = "") -> ApiError:
        longest, param = self._max_model_len, "messages" if is_chat else "prompt"
        # LiteLLM recognises the error by OpenAI's words at the start; LangChain, by Anthropic's words at the end.
        message = (
            f"This model's maximum context length is {longest} tokens. However, your {param} resulted in {least}"
            f"{num_prompt} tokens. At most {longest - 1} are allowed, because an answer needs one; the prompt is too "
            "long."
        )
        return invalid(message, param, "context_length_exceeded")

    def _check_truncation(self, keep: int | None) -> None:
        longest = self._max_model_len - 1
        if keep is not None and keep != -1 and not 1 <= keep <= longest:
            raise ValueError(f"truncate_prompt_tokens must be 1 to {longest}, or -1 for all that fit, not {keep}.")

    async def _grammar(self, request: GenerationRequest, in_reasoning: bool) -> Grammar | None:
        """Return the checked grammar of the whole answer, or None if the answer may be any text."""
        answer_format, tool_use = request.answer_format, request.tool_use
        if answer_format is None and not tool_use.is_enforced:
            return None
        answer, param = (answer_format.grammar, answer_format.param) if answer_format else (None, "")
        return await self._grammar_threads.run(self._grammars.build, answer, param, tool_use, in_reasoning)


async def _in_time(work: Awaitable[T], deadline: float) -> T:
    """Return the result of `work`, or raise DeadlinePassed at `deadline`, a time of the event loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError as error:
        raise DeadlinePassed("The request's deadline passed before its prompt was ready.") from error
