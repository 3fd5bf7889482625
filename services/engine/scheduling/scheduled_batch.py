"""A `ScheduledBatch` says which tokens a step computes; a `StepResult` holds the step's results for one request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from services.engine.contract.token_output import TokenLogprob
from services.engine.drafting.draft_depth import MAX_UNREAD, StepShape
from services.engine.request import Request
from services.engine.sampling.sampler import SampledToken
from services.engine.scheduling.state_checkpoints import StateCheckpoint


@dataclass(frozen=True)
class ScheduledBatch:
    """A `ScheduledBatch` says what one step computes: the next `lens[i]` uncomputed tokens of `requests[i]`.

    - The last `num_drafts[i]` of these tokens are the first drafts of the request.
    - `draft_depths[i]`: how many tokens to draft after the step if the step computes all pending tokens of a request.
    - `slot_copies`: recurrent states to copy from slot to slot, as pairs (from, to).
    - `page_copies`: KV to copy from page to page, as pairs (from, to).
    - `preempted`: requests that lost their slot and pages since the last step. Such a request may be in `requests`.

    The runner makes the copies in order, before the step computes any token: one copy may write a slot or page that
    the next copy reads. A batch may be empty.
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
        """Return True if the step computes all pending tokens of `requests[i]`, so that a new token can be sampled."""
        return self.lens[i] - self.num_drafts[i] == self.requests[i].num_pending

    @property
    def shape(self) -> StepShape:
        """Return the `StepShape` of the step; the draft module's rows include tokens that it has still to read."""
        depths = {i: depth for i, depth in enumerate(self.draft_depths) if depth and self.catches_up(i)}
        num_unread = sum(min(MAX_UNREAD, self.requests[i].num_unread + self.lens[i]) for i in depths)
        return StepShape(
            sum(self.lens), max(depths.values(), default=0), num_unread + sum(depths.values()) - len(depths)
        )


@dataclass(frozen=True)
class StepResult:
    """A `StepResult` holds the results of one step for one request.

    - `tokens`: the accepted drafts, and the token sampled after the drafts; empty if the step did not compute the
      last token of the request, so that no token was sampled.
    - `draft_ids`: drafts of the tokens that follow `tokens`. The next step verifies the drafts.
    - `prompt_logprobs`: for each computed prompt token, the logprob of the next prompt token; empty if the request did
      not ask for prompt logprobs.
    - `failed`: True if the request's logits hold NaN or infinity, or if its grammar allows no token.
    """

    tokens: tuple[SampledToken, ...] = ()
    draft_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    failed: bool = False


@dataclass
class BatchBuilder:
    """A `BatchBuilder` collects the tokens and copies of the next `ScheduledBatch` within a budget of tokens."""

    budget: int  # number of tokens that may still be added
    scored_budget: int = 0  # number of these tokens that may be prompt tokens whose logprobs are computed
    lens: dict[Request, int] = field(default_factory=dict)
    num_drafts: dict[Request, int] = field(default_factory=dict)
    draft_depths: dict[Request, int] = field(default_factory=dict)  # a request without an entry gets no drafts
    slot_copies: list[tuple[int, int]] = field(default_factory=list)
    page_copies: list[tuple[int, int]] = field(default_factory=list)
    saved: list[StateCheckpoint] = field(default_factory=list)  # new checkpoints whose state the slot copies write
    preempted: list[Request] = field(default_factory=list)
    num_started: int = 0

    def add(self, request: Request, length: int, num_drafts: int = 0) -> None:
        """Add `length` more tokens of a request to the batch; the last `num_drafts` of these tokens are drafts."""
        self.lens[request] = self.lens.get(request, 0) + length
        self.num_drafts[request] = num_drafts
        self._spend(request, length)

    def budget_of(self, request: Request) -> int:
        """Return how many more tokens of a request may be added to the batch."""
        return min(self.budget, self.scored_budget) if request.scores_prompt else self.budget

    def remove(self, request: Request) -> None:
        """Remove a request from the batch, and add the number of its tokens to the budget again."""
        self._spend(request, -self.lens.pop(request, 0))
        self.num_drafts.pop(request, None)

    def _spend(self, request: Request, length: int) -> None:
        self.budget -= length
        self.scored_budget -= length if request.scores_prompt else 0

    @property
    def catching_up(self) -> list[Request]:
        """Return the requests whose pending tokens are all in the batch."""
        return [
            request for request, length in self.lens.items() if length - self.num_drafts[request] == request.num_pending
        ]

    def build(self) -> ScheduledBatch:
        """Return the `ScheduledBatch` of all tokens and copies that were added."""
        return ScheduledBatch(
            tuple(self.lens),
            tuple(self.lens.values()),
            tuple(self.num_drafts[request] for request in self.lens),
            tuple(self.draft_depths.get(request, 0) for request in self.lens),
            tuple(self.slot_copies),
            tuple(self.page_copies),
            tuple(self.preempted),
        )
