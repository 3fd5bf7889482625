"""One step of the engine: what it computes, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from services.engine.contract.token_output import TokenLogprob
from services.engine.drafting.draft_depth import MAX_UNREAD, StepShape
from services.engine.prefix_cache import StateCheckpoint
from services.engine.request import Request
from services.engine.sampling.sampler import Sampled


@dataclass(frozen=True)
class ScheduledBatch:
    """One step: the next `lens[i]` uncomputed tokens of `requests[i]`. May be empty.

    The last `num_drafts[i]` of them are its first drafts. `draft_depths[i]` tokens are to be drafted after the step for
    a request that it lets catch up. Before anything is computed, recurrent states are copied between slots and KV
    between pages, as (from, to) and in order: what was copied to may be copied from next. `preempted` requests lost
    their memory since the last step; they may be back in this one.
    """

    requests: tuple[Request, ...]
    lens: tuple[int, ...]
    num_drafts: tuple[int, ...]
    draft_depths: tuple[int, ...]
    slot_copies: tuple[tuple[int, int], ...] = ()
    page_copies: tuple[tuple[int, int], ...] = ()
    preempted: tuple[Request, ...] = ()

    def __iter__(self) -> Iterator[tuple[Request, int]]:
        return zip(self.requests, self.lens, strict=True)

    def catches_up(self, i: int) -> bool:
        return self.lens[i] - self.num_drafts[i] == self.requests[i].num_pending

    @property
    def shape(self) -> StepShape:
        """What it costs, with the tokens that the draft module catches up with."""
        depths = {i: depth for i, depth in enumerate(self.draft_depths) if depth and self.catches_up(i)}
        num_unread = sum(min(MAX_UNREAD, self.requests[i].num_unread + self.lens[i]) for i in depths)
        return StepShape(
            sum(self.lens), max(depths.values(), default=0), num_unread + sum(depths.values()) - len(depths)
        )


@dataclass(frozen=True)
class StepResult:
    """Of one request in one step: accepted drafts and the token sampled after them, or none if it still lags behind.

    `draft_ids` are guesses at what follows; `prompt_logprobs` are those of the prompt's tokens that follow the ones
    computed; `failed`: the logits hold NaN.
    """

    tokens: tuple[Sampled, ...] = ()
    draft_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    failed: bool = False


@dataclass
class StepPlan:
    """A batch in the making."""

    budget: int
    lens: dict[Request, int] = field(default_factory=dict)
    num_drafts: dict[Request, int] = field(default_factory=dict)
    slot_copies: list[tuple[int, int]] = field(default_factory=list)
    page_copies: list[tuple[int, int]] = field(default_factory=list)
    saved: list[StateCheckpoint] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    num_started: int = 0

    def add(self, request: Request, length: int, num_drafts: int = 0) -> None:
        self.lens[request] = self.lens.get(request, 0) + length
        self.num_drafts[request] = num_drafts
        self.budget -= length

    def remove(self, request: Request) -> None:
        self.budget += self.lens.pop(request, 0)
        self.num_drafts.pop(request, None)
