"""The `SamplingParams` of a request say how to choose tokens, when to stop, and what the text must match."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_TOP_K = 2**31 - 1  # largest `top_k`: larger than any vocabulary, and still an integer that tensors can hold
MAX_STOP_STRINGS = 64  # the gateway's own limit is lower by default
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20  # largest number of alternatives per token, the same as in OpenAI's API
MAX_LOGIT_BIAS = 1 << 17  # entries; a gateway allows fewer by default (`GatewayLimits.logit_bias`)
MAX_CACHE_SALT = 128  # characters
# Largest number of token ids in a `ThinkingBudget`. A vocabulary of 131,072 tokens has about 500 tokens that begin with
# ">" or end with "</", which may begin or end a marker that is ordinary text.
MAX_MARKER_IDS = 8192
# Characters that one grammar may count. A character of text without quotes takes up to 16 states, which take 8 kB.
# So 4,000 characters take 32 MB, and they make no step of the engine more than 6 ms longer.
MAX_COUNTED_CHARS = 4_000
# JSON grammars allow only this white space: a space, or a new line with at most 16 characters of indentation. Without a
# bound, a model that is unsure of its next token could generate white space until `max_tokens`.
JSON_OPTIONS = {"x-guidance": {"whitespace_pattern": r"(\x20|\x0A[\x20\x09]{0,16})?"}}


class GrammarKind(StrEnum):
    """A `GrammarKind` names the syntax in which a grammar is given."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


def _check(is_good: bool, name: str, allowed: str, value: object) -> None:
    if not is_good:
        raise ValueError(f"{name} must be {allowed}, not {value!r}.")


@dataclass(frozen=True)
class Grammar:
    """A `Grammar` defines which texts are allowed as an answer; `kind` names the syntax of the definition in `text`.

    `num_counted` is the number of characters that lengths and repetitions in the grammar count (such as 80 for
    `maxLength: 80`), as far as this number is known. The number of states that the grammar's lexer may have grows with
    this number.
    """

    kind: GrammarKind
    text: str = ""  # a JSON schema, a regular expression or a Lark grammar; empty for JSON_OBJECT
    num_counted: int = 0

    def __post_init__(self) -> None:
        is_allowed = 0 <= self.num_counted <= MAX_COUNTED_CHARS
        _check(is_allowed, "num_counted", f"from 0 to {MAX_COUNTED_CHARS}", self.num_counted)


@dataclass(frozen=True)
class LogitBias:
    """A `LogitBias` holds numbers to add to the logits of some tokens: `values[i]` to the logit of token `ids[i]`.

    The choices of a request share one `LogitBias`, which is checked only once.
    """

    ids: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        num, num_ids = len(self.values), len(set(self.ids))
        _check(num <= MAX_LOGIT_BIAS, "logit_bias", f"at most {MAX_LOGIT_BIAS} entries", num)
        _check(len(self.ids) == num == num_ids, "logit_bias", "one value for each token id", f"{num} for {num_ids} ids")
        lowest_id = min(self.ids, default=0)
        _check(lowest_id >= 0, "logit_bias", "keyed by token ids of at least 0", lowest_id)
        wrong = next((value for value in self.values if not -100 <= value <= 100), None)
        _check(wrong is None, "logit_bias", "-100 to 100 for each token", wrong)

    @classmethod
    def of(cls, biases: Mapping[int, float]) -> LogitBias:
        """Return the `LogitBias` that holds a number for each token id in `biases`."""
        return cls(tuple(biases), tuple(biases.values()))


@dataclass(frozen=True)
class ThinkingBudget:
    """A `ThinkingBudget` limits the reasoning with which an answer begins to `max_tokens` tokens.

    If `start_ids` is empty, the prompt ends inside the reasoning. Otherwise the answer may open the reasoning with the
    marker `<think>`, which `start_ids` describes, and only tokens of `blank_ids`, which are white space, may come
    before the marker. An answer that begins with other tokens has no reasoning and no limit. In the next paragraph,
    the answer begins after the marker.

    If the answer has `max_tokens` tokens and the marker that ends the reasoning (`</think>`) is not among them, the
    sampler writes the marker. If the last tokens already are the beginning of the marker, the sampler writes only the
    rest of the marker.

    `end_ids` describes the tokens of the marker. `end_ids[i]` holds the ids of all tokens that may be the marker's
    token number i, and the sampler writes the first of them. A marker that is one special token has one token and one
    id. The first token of a marker that is ordinary text may end with the marker's first characters (" </" instead of
    "</"), and its last token may begin with the marker's last characters (">\n" instead of ">").
    """

    max_tokens: int
    end_ids: tuple[tuple[int, ...], ...]
    start_ids: tuple[tuple[int, ...], ...] = ()  # in the same form as `end_ids`
    blank_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 0, "thinking_budget", "at least 0", self.max_tokens)
        groups = (*self.end_ids, *self.start_ids)
        _check(bool(self.end_ids) and all(groups), "thinking_budget", "given with the ids of a marker", ())
        num_ids = sum(map(len, (*groups, self.blank_ids)))
        _check(num_ids <= MAX_MARKER_IDS, "thinking_budget", f"given with at most {MAX_MARKER_IDS} ids", num_ids)
        lowest = min((*map(min, groups), *self.blank_ids))
        _check(lowest >= 0, "thinking_budget", "given with ids of at least 0", lowest)


@dataclass(frozen=True)
class SamplingParams:
    """The `SamplingParams` of a request say how to choose its tokens and when to stop.

    A value that is not allowed raises a ValueError that names the field.

    - `stop`: strings at which the gateway ends the answer. The engine sees no text, and stops at token ids only.
    - `priority`: a lower number means a higher priority. Waiting requests with the lowest number start first, and a
      running request with a higher number may be preempted for a waiting request. Requests that wait for a long time
      move forward as if their number were lower (`services.engine.scheduling.waiting_queue`).
    - `logprobs`, `prompt_logprobs`: how many alternatives to report beside each token's own logprob. With None, no
      logprob is reported.
    - `cache_salt`: requests share cached prefixes only if their salts are equal. So a client whose salt is secret does
      not let other clients find out, from the time to the first token, which prompts it has sent.
    - `thinking_budget`: a limit on the reasoning with which an answer begins; set by the gateway only.
    """

    max_tokens: int | None = None  # None: as many tokens as the model's context allows
    temperature: float = 1.0  # 0 means greedy decoding
    top_p: float = 1.0  # 0 keeps only the most probable token
    top_k: int = 0  # 0 or -1 means the whole vocabulary
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    min_p: float = 0.0  # lowest allowed probability, relative to the probability of the likeliest token
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: LogitBias = LogitBias()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int = 0
    thinking_budget: ThinkingBudget | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        self._check_lengths()
        temperature_ok = self.temperature >= 0 and math.isfinite(self.temperature)
        _check(temperature_ok, "temperature", "a finite number of at least 0", self.temperature)
        _check(0 <= self.top_p <= 1, "top_p", "0 to 1", self.top_p)
        top_k_allowed = f"1 to {MAX_TOP_K}, or 0 or -1 for the whole vocabulary"
        _check(-1 <= self.top_k <= MAX_TOP_K, "top_k", top_k_allowed, self.top_k)
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a signed 64-bit integer", self.seed)
        priority_ok = -(2**31) <= self.priority < 2**31
        _check(priority_ok, "priority", "a signed 32-bit integer", self.priority)
        salt, allowed = self.cache_salt, f"at most {MAX_CACHE_SALT} characters"
        _check(len(salt) <= MAX_CACHE_SALT, "cache_salt", allowed, len(salt))
        is_text = not re.search("[\ud800-\udfff]", salt)
        _check(is_text, "cache_salt", "text without halves of surrogate pairs", salt)
        self._check_stops()
        self._check_penalties()
        self._check_logprobs()

    def _check_penalties(self) -> None:
        _check(0 <= self.min_p <= 1, "min_p", "0 to 1", self.min_p)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2 <= getattr(self, name) <= 2, name, "-2 to 2", getattr(self, name))
        repetition_ok = self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)
        _check(repetition_ok, "repetition_penalty", "a finite number above 0", self.repetition_penalty)

    def varied(self, **changes: Any) -> SamplingParams:
        """Return a copy in which `changes` replace the values of fields; the caller knows that they are allowed.

        The copy shares the values of all other fields, and no field is checked again. The choices of a request are such
        copies.
        """
        varied = copy(self)
        for name, value in changes.items():
            assert name in self.__dataclass_fields__
            object.__setattr__(varied, name, value)
        return varied

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
