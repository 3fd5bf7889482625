"""A `Request` holds the tokens and the progress of a request in the engine; a `RequestFactory` makes requests."""

from __future__ import annotations

import array
import hashlib
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import FinishReason, TokenLogprob
from services.engine.drafting.draft_depth import NO_DRAFTS_YET, Acceptance

DIGEST_BYTES = 16
PAGE_NUMBERS = "q"  # type of the numbers in a block table: int64, as in `Batch.arrays`
HASH_OF_NOTHING = b""  # the hash of the empty prefix


@dataclass(eq=False, slots=True)
class Request:
    """A `Request` is a sequence of tokens; steps compute tokens until `num_computed_tokens` reaches `num_tokens`.

    Prompt tokens and generated tokens count alike in `num_tokens`. Times are in seconds of the scheduler's clock.
    """

    id: str
    token_ids: list[int]  # the prompt, followed by the generated tokens
    params: SamplingParams
    seed: int
    max_len: int  # largest number of tokens of prompt and answer together
    stop_ids: frozenset[int] = frozenset()
    deadline: float = math.inf
    # Number of tokens at the end of `token_ids` that a lost engine generated; None if the request is not resumed.
    num_sent: int | None = None
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    slot: int | None = None  # the state slot; None while the request waits
    # The KV pages, in the order of the tokens. A list would take 3 ms to convert in each step at a million tokens.
    block_table: array.array[int] = field(default_factory=lambda: array.array(PAGE_NUMBERS))
    draft_ids: tuple[int, ...] = ()  # drafts of the tokens after `token_ids`, which the next step verifies
    acceptance: Acceptance = NO_DRAFTS_YET
    num_unread: int = 0  # tokens computed since the request was last drafted for
    compiled_grammar: Any = None  # the `CompiledGrammar` of `params.grammar`, or None without a grammar
    sampling_state: Any = None  # the sampler's `SamplerState` of this request
    arrived_at: float = 0.0
    first_scheduled_at: float | None = None
    first_token_at: float | None = None
    arrival: int = 0  # index of the request in the order of arrival at the scheduler
    level: int = field(init=False)  # the priority number, lowered by the time spent waiting
    waiting_since: float = 0.0
    waited_s: float = 0.0  # seconds in the queue until the last start
    page_hashes: list[bytes] = field(default_factory=list)  # hashes of full pages; `hash_pages` appends more hashes
    due_checkpoints: list[int] = field(default_factory=list)  # ascending lengths at which the state is to be saved
    # While the request waits: the `CachedPrefix` that `look_up` found last, and `CheckpointStore.num_changes` then.
    looked_up: Any = None
    num_cached: int = 0  # prompt tokens that were reused at the first start
    cache_reason: str = ""  # empty until the request has started
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # filled by the steps before the first output

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
    def scores_prompt(self) -> bool:
        """Return True if the logprobs of the prompt are wanted, and are not complete yet."""
        return self.params.prompt_logprobs is not None and not self.num_generated

    @property
    def is_resumed(self) -> bool:
        """Return True if another engine had accepted the request before that engine was lost."""
        return self.num_sent is not None

    @property
    def num_pending(self) -> int:
        """Return how many tokens must be computed before the next token can be sampled."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_after_next(self) -> int:
        """Return how many more tokens may follow the next token."""
        return self.max_len - 1 - self.num_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Return the request's sort key: requests with lower keys are served first and preempted last."""
        return self.level, self.arrival

    @property
    def slot_id(self) -> int:
        """Return the id of the state slot that the request holds; the request must be running."""
        assert self.slot is not None, "only a running request has state"
        return self.slot

    @property
    def queued_s(self) -> float:
        """Return the seconds from arrival to the first step that computed the request; return 0 before this step."""
        return 0.0 if self.first_scheduled_at is None else self.first_scheduled_at - self.arrived_at

    def append(self, token_id: int) -> FinishReason | None:
        """Append a generated token; return the finish reason if the request ends with this token, else None."""
        assert self.num_tokens < self.max_len
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_tokens == self.max_len else None

    def hash_pages(self, page_size: int) -> list[bytes]:
        """Return the hash of each full page of tokens; a page's hash also covers the tokens before it and the salt."""
        hashes = self.page_hashes
        new_ids = self.token_ids[len(hashes) * page_size : self.num_tokens // page_size * page_size]
        if new_ids:
            data, parent = array.array("i", new_ids), hashes[-1] if hashes else self._hash_of_salt()
            for start in range(0, len(data), page_size):
                parent = _hash_tokens(parent, data[start : start + page_size])
                hashes.append(parent)
        return hashes

    def prefix_key(self, length: int, page_size: int) -> bytes:
        """Return the hash of the request's `cache_salt` and its first `length` tokens."""
        num_full = length // page_size
        parent = self.hash_pages(page_size)[num_full - 1] if num_full else self._hash_of_salt()
        tail = self.token_ids[num_full * page_size : length]
        return _hash_tokens(parent, array.array("i", tail)) if tail else parent

    def _hash_of_salt(self) -> bytes:
        """Return the hash that begins the chain of page hashes, and covers the salt but no tokens.

        No two requests with different salts share a hash.
        """
        salt = self.params.cache_salt.encode()
        return (
            hashlib.blake2b(salt, digest_size=DIGEST_BYTES, person=b"cache_salt").digest() if salt else HASH_OF_NOTHING
        )

    def log_fields(self, reason: str, now: float) -> dict[str, Any]:
        """Return the log fields of a request that has ended for `reason`: counts of tokens, and times in seconds."""

        def since_arrival(at: float | None) -> float | None:
            return None if at is None else round(at - self.arrived_at, 6)

        return {
            "request_id": self.id,
            "finish_reason": reason,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generated_tokens": self.num_generated,
            "num_cached_tokens": self.num_cached,
            "cache_reason": self.cache_reason,
            "queued_s": since_arrival(self.first_scheduled_at),
            "first_token_s": since_arrival(self.first_token_at),
            "total_s": since_arrival(now),
        }


def serving_order(request: Request) -> tuple[int, int]:
    """Return `request.order`; lists of requests are sorted with this function as their `key`."""
    return request.order


def _hash_tokens(parent: bytes, token_ids: array.array[int]) -> bytes:
    """Return the hash of a sequence of tokens: first the tokens whose hash is `parent`, then `token_ids`."""
    return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=DIGEST_BYTES).digest()


class RequestFactory:
    """A `RequestFactory` makes requests from clients' arguments, and refuses requests that the engine cannot serve.

    - `max_model_len`: the model's context, in tokens.
    - `max_len`: the length of the longest request that also fits into memory, in tokens.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int], max_len: int, max_model_len: int) -> None:
        self.vocab_size, self.eos_token_ids = vocab_size, frozenset(eos_token_ids)
        self.max_len, self.max_model_len = max_len, max_model_len

    def make(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None,
        sent_token_ids: Sequence[int] | None,
        now: float,
    ) -> Request:
        """Return a request that arrives at `now`; the other arguments have the same meaning as in `Engine.generate`.

        Errors:

        - ValueError: a token id is outside the vocabulary, or the prompt and the answer are too long.
        - EngineFailed: the prompt and the tokens in `sent_token_ids` already have the largest allowed length.
        """
        self._check_ids("prompt", prompt_token_ids)
        self._check_ids("sent_token_ids", sent_token_ids or ())
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", params.logit_bias.ids)
        if budget := params.thinking_budget:
            for token_ids in (*budget.end_ids, *budget.start_ids, budget.blank_ids):
                self._check_ids("thinking_budget", token_ids)
        # A request with a grammar always needs an end-of-sequence token, because no other token is allowed when the
        # grammar can only end.
        eos_ids = frozenset() if params.ignore_eos and params.grammar is None else self.eos_token_ids
        max_len = self._max_len(len(prompt_token_ids), params)
        if sent_token_ids and len(prompt_token_ids) + len(sent_token_ids) >= max_len:
            raise EngineFailed(f"The answer of {len(sent_token_ids)} tokens leaves no room for another token here.")
        return Request(
            id=request_id,
            token_ids=[*prompt_token_ids, *(sent_token_ids or ())],
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            max_len=max_len,
            stop_ids=frozenset(params.stop_token_ids) | eos_ids,
            deadline=math.inf if timeout is None else now + timeout,
            num_sent=None if sent_token_ids is None else len(sent_token_ids),
            arrived_at=now,
        )

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{name} holds the token id {token_id}; allowed are 0 to {self.vocab_size - 1}.")

    def _max_len(self, num_prompt: int, params: SamplingParams) -> int:
        if num_prompt == 0:
            raise ValueError("prompt must hold at least one token.")
        num_asked = max(params.max_tokens or 0, params.min_tokens, 1)
        if num_prompt + num_asked > self.max_len:
            is_context = self.max_len == self.max_model_len
            why = "the model's context" if is_context else "which is all that memory holds"
            raise ValueError(
                f"The prompt of {num_prompt} tokens and an answer of {num_asked} make {num_prompt + num_asked} tokens; "
                f"at most {self.max_len} are allowed, {why}."
            )
        return min(self.max_len, num_prompt + params.max_tokens) if params.max_tokens else self.max_len
