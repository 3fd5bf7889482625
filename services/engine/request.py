"""What a client asks for, what the engine keeps about it, and what it sends back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from services.engine.drafting import NO_DRAFTS_YET, Acceptance

MAX_TOP_K = 2**31 - 1  # far beyond any vocabulary, and an integer that tensors can hold
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20  # alternatives per token, OpenAI's bound
# The white space of every JSON grammar: a space, or a new line and its indentation. Without a bound, a model that is
# unsure of its next token of JSON goes on with white space for ever.
JSON_OPTIONS = {"x-guidance": {"whitespace_pattern": r"(\x20|\x0A[\x20\x09]{0,16})?"}}


class EngineOverloaded(Exception):
    """Too many requests are waiting; ask again after `retry_after` seconds (REST 429, gRPC RESOURCE_EXHAUSTED)."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(Exception):
    """The engine could not finish this request through no fault of the client (REST 500, gRPC INTERNAL)."""


class DeadlinePassed(TimeoutError):
    """The request's own deadline passed before its last token (REST 504, gRPC DEADLINE_EXCEEDED)."""


class GrammarKind(StrEnum):
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"  # `Engine.generate` raises DeadlinePassed instead of yielding it
    FAILED = "failed"  # `Engine.generate` raises EngineFailed or ValueError instead of yielding it


def _check(is_good: bool, name: str, allowed: str, value: object) -> None:
    if not is_good:
        raise ValueError(f"{name} must be {allowed}, not {value!r}.")


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must match, in the syntax of `kind`."""

    kind: GrammarKind
    text: str = ""  # a JSON schema, a regular expression or a Lark grammar; nothing for JSON_OBJECT


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; a bad value is a ValueError that names the field.

    `stop` strings are matched by the gateway, which sees text; the engine only stops at token ids. Of requests that
    wait, those of the lowest `priority` come first, and running ones of a higher number make way for them; time spent
    waiting lowers the number (`services.engine.waiting`). `logprobs` and `prompt_logprobs` are the number of
    alternatives to report beside each token's own logarithm of probability; None: report nothing.
    """

    max_tokens: int | None = None  # None: up to the model's context
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: the whole vocabulary
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    min_p: float = 0.0  # relative to the likeliest token
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        self._check_lengths()
        temperature_ok = self.temperature >= 0 and math.isfinite(self.temperature)
        _check(temperature_ok, "temperature", "a finite number of at least 0", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        top_k_allowed = f"1 to {MAX_TOP_K}, or 0 or -1 for the whole vocabulary"
        _check(-1 <= self.top_k <= MAX_TOP_K, "top_k", top_k_allowed, self.top_k)
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a signed 64-bit integer", self.seed)
        priority_ok = -(2**31) <= self.priority < 2**31
        _check(priority_ok, "priority", "a signed 32-bit integer", self.priority)
        self._check_stops()
        self._check_penalties()
        self._check_logprobs()

    def _check_penalties(self) -> None:
        _check(0 <= self.min_p <= 1, "min_p", "0 to 1", self.min_p)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2 <= getattr(self, name) <= 2, name, "-2 to 2", getattr(self, name))
        repetition_ok = self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)
        _check(repetition_ok, "repetition_penalty", "a finite number above 0", self.repetition_penalty)
        for token_id, bias in self.logit_bias:
            _check(token_id >= 0, "logit_bias", "keyed by token ids of at least 0", token_id)
            _check(-100 <= bias <= 100, "logit_bias", "-100 to 100 for each token", bias)

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= MAX_LOGPROBS, name, f"0 to {MAX_LOGPROBS}", value)

    def _check_lengths(self) -> None:
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _check(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)
        if self.max_tokens is not None:
            allowed = f"at most max_tokens ({self.max_tokens})"
            _check(self.min_tokens <= self.max_tokens, "min_tokens", allowed, self.min_tokens)

    def _check_stops(self) -> None:
        num_stops, num_tokens = len(self.stop), len(self.stop_token_ids)
        _check(num_stops <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings", f"{num_stops} strings")
        _check(all(self.stop), "stop", "strings of at least one character", "")
        _check(num_tokens <= MAX_STOP_TOKENS, "stop_token_ids", f"at most {MAX_STOP_TOKENS} ids", f"{num_tokens} ids")
        _check(min(self.stop_token_ids, default=0) >= 0, "stop_token_ids", "at least 0 each", self.stop_token_ids)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(eq=False, slots=True)
class Request:
    """One sequence: `num_computed_tokens` catches up with `num_tokens`, whether those were prompted or generated."""

    id: str
    token_ids: list[int]  # the prompt, then what was generated
    params: SamplingParams
    seed: int
    max_len: int  # prompt and generated tokens together
    stop_ids: frozenset[int] = frozenset()
    deadline: float = math.inf
    num_sent: int | None = None  # last of `token_ids` that another engine generated; None: it begins here
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    slot: int | None = None  # None: waiting
    block_table: list[int] = field(default_factory=list)
    draft_ids: tuple[int, ...] = ()  # guesses at what follows `token_ids`, to be verified by the next step
    acceptance: Acceptance = NO_DRAFTS_YET
    num_unread: int = 0  # tokens that were computed since it was last drafted for
    compiled_grammar: Any = None  # services.engine.grammar.CompiledGrammar of params.grammar, if that is not None
    sampling_state: Any = None  # the sampler's own notes about this request: penalties' counts, the grammar's state
    arrived_at: float = 0.0  # these three in seconds of the scheduler's clock
    first_scheduled_at: float | None = None
    first_token_at: float | None = None
    arrival: int = 0  # the scheduler's count of requests when this one was added
    level: int = field(init=False)  # its priority, less what it gained by waiting
    waiting_since: float = 0.0  # and, in seconds too, how long it waited before that
    waited_s: float = 0.0
    page_hashes: list[bytes] = field(default_factory=list)  # of its full pages so far, each with all before it
    due_checkpoints: list[int] = field(default_factory=list)  # lengths, ascending, at which its state is to be saved
    looked_up: Any = None  # while it waits: what the prefix cache found for it, and the state of the cache then
    num_cached: int = 0  # prompt tokens that were reused when it first started
    cache_reason: str = ""  # empty: it has not started yet
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # collected until the first output

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids) - (self.num_sent or 0)
        self.level = self.params.priority

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_resumed(self) -> bool:
        """Whether another engine accepted it before, and is gone."""
        return self.num_sent is not None

    @property
    def num_pending(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def order(self) -> tuple[int, int]:
        """The lower, the sooner it is served; the higher, the sooner it is preempted."""
        return self.level, self.arrival

    @property
    def slot_id(self) -> int:
        assert self.slot is not None, "only a running request has state"
        return self.slot

    @property
    def queued_s(self) -> float:
        return 0.0 if self.first_scheduled_at is None else self.first_scheduled_at - self.arrived_at

    def append(self, token_id: int) -> FinishReason | None:
        """Adds a generated token and says whether the request ends with it."""
        assert self.num_tokens < self.max_len
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_tokens == self.max_len else None


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability before temperature, penalties and masks, its rank
    (1 is the likeliest), and the likeliest tokens as (id, logprob), most likely first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """The tokens one step added to one request.

    With finish reason STOP the last id is the stop token itself: counted in `num_generated`, but no part of the text.
    `logprobs` has one entry per token id where they were asked for. `prompt_logprobs` comes with the first output: one
    entry per prompt token, None for the first. `cache_reason` says why no more than `num_cached` prompt tokens were
    reused: hit, too_short, no_match, no_checkpoint_at_boundary, evicted, prompt_logprobs or disabled.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt: int
    num_generated: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    num_cached: int = 0
    cache_reason: str = ""
    queued_s: float = 0.0  # from arrival to the first step that computed it
