"""A request as the engine keeps it, from its arrival to its last token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import FinishReason, TokenLogprob
from services.engine.drafting.draft_depth import NO_DRAFTS_YET, Acceptance


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
    compiled_grammar: Any = (
        None  # services.engine.grammar.compiled_grammar.CompiledGrammar of params.grammar, if that is not None
    )
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
