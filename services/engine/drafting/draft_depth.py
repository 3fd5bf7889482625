"""How many tokens to draft for each request: values in, values out, no clock.

A step verifies the drafts of the step before it and then drafts again. Deeper drafts mean more tokens per step, as
often as the model agrees with them, and more rows and draft passes to compute. Depths are chosen so that expected
tokens per second are highest, from two measured things: how often drafts at each position are accepted, and what a
step costs. So drafting ends by itself where it does not pay, which is tried again once in a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul

import numpy as np
from numpy.typing import NDArray

DEFAULT_DRAFT_TOKENS = 4  # at most; measured acceptance and cost decide
PRIOR_RATE = 0.6  # accepted of drafts at any position, before anything was measured
PRIOR_WEIGHT = 4.0  # in observations
REQUEST_KEPT = 0.98  # of what a request's acceptance weighs, from one observation to the next
OVERALL_KEPT = 0.998
COST_KEPT = 0.99  # likewise of a step's cost
# Of a step, of a row, of a draft pass and of a row of it, before anything was measured, and how far each may be off.
PRIOR_COST = (1.0, 0.05, 0.15, 0.02)
PRIOR_SPREAD = (1.0, 0.3, 0.3, 0.1)
MAX_SURPRISE = 1.5  # of a step's seconds, as a factor, once NUM_TRUSTED have been seen
NUM_TRUSTED = 16
FIT_EVERY = 8  # steps, from then on: a fit takes as long as a small layer
NOISE = 0.1  # of a step's seconds, relative
MAX_UNREAD = 128  # tokens of a request that the draft module catches up with when drafts are wanted again
MAX_ROWS = 256  # of a step whose cost is learnt from: prompts follow another law
# A probe drafts for some steps after so many without; a pause leaves it for some after so many with: where depths never
# change, nothing tells the cost of drafts from that of the model. Both become rarer.
PROBE_AFTER, PROBE_LEN = (32, 256), 4
PAUSE_AFTER, PAUSE_LEN = (8, 64), 2


Weights = tuple[float, float, float, float]


@dataclass(frozen=True)
class Acceptance:
    """Of drafts by position: how many were tried, which takes that those before were accepted, and accepted."""

    tried: tuple[float, ...] = ()
    accepted: tuple[float, ...] = ()

    def observe(self, num_drafts: int, num_accepted: int, kept: float) -> Acceptance:
        """With one more verification of `num_drafts` drafts, of which the first `num_accepted` were right."""
        assert 0 <= num_accepted <= num_drafts
        num_tried = min(num_accepted + 1, num_drafts)
        size = max(len(self.tried), num_tried)
        tried, accepted = _padded(self.tried, size), _padded(self.accepted, size)
        for i in range(num_tried):
            tried[i] = kept * tried[i] + 1
            accepted[i] = kept * accepted[i] + (i < num_accepted)
        return Acceptance(tuple(tried), tuple(accepted))

    def rates(self, prior: Sequence[float]) -> tuple[float, ...]:
        """Probability that the draft at each position is accepted, given that those before it are."""
        tried, accepted = _padded(self.tried, len(prior)), _padded(self.accepted, len(prior))
        return tuple(
            (a + PRIOR_WEIGHT * p) / (t + PRIOR_WEIGHT) for t, a, p in zip(tried, accepted, prior, strict=False)
        )


NO_DRAFTS_YET = Acceptance()


def _padded(values: Sequence[float], size: int) -> list[float]:
    return [*values, *[0.0] * (size - len(values))]


@dataclass(frozen=True)
class StepShape:
    """What a step's cost depends on: rows of the model, passes of the draft module, and rows of these together."""

    num_rows: int
    num_passes: int = 0
    num_draft_rows: int = 0

    @property
    def features(self) -> tuple[float, float, float, float]:
        return 1.0, float(self.num_rows), float(self.num_passes), float(self.num_draft_rows)


@dataclass(frozen=True, eq=False)
class StepCost:
    """Seconds of a step as a linear function of its shape: least squares of relative errors, in which steps fade.

    `weights` are the seconds of a step, a row, a draft pass and a row of it; what the steps do not tell apart,
    PRIOR_COST does. `moments_FF` and `sums_F` are of features per second of the step.
    """

    weights: Weights
    moments_FF: NDArray[np.float64]
    sums_F: NDArray[np.float64]
    num_steps: float = 0.0  # faded like the sums
    num_seen: int = 0

    @staticmethod
    def unknown() -> StepCost:
        return StepCost(PRIOR_COST, np.zeros((4, 4)), np.zeros(4))

    def seconds(self, shape: StepShape) -> float:
        return sum((w * f for w, f in zip(self.weights, shape.features, strict=True)), 0.0)

    def observe(self, shape: StepShape, seconds: float) -> StepCost:
        """A step that surprises, as one that had to wait for another process, counts as MAX_SURPRISE at most."""
        if self.num_seen >= NUM_TRUSTED:
            expected = self.seconds(shape)
            seconds = min(max(seconds, expected / MAX_SURPRISE), expected * MAX_SURPRISE)
        features_F = np.array(shape.features) / seconds
        moments_FF = COST_KEPT * self.moments_FF + np.outer(features_F, features_F)
        sums_F, num_steps = COST_KEPT * self.sums_F + features_F, COST_KEPT * self.num_steps + 1
        is_fitted = self.num_seen < NUM_TRUSTED or self.num_seen % FIT_EVERY == 0
        weights = _fit(moments_FF, sums_F, num_steps) if is_fitted else self.weights
        return StepCost(weights, moments_FF, sums_F, num_steps, self.num_seen + 1)


def _fit(moments_FF: NDArray[np.float64], sums_F: NDArray[np.float64], num_steps: float) -> Weights:
    """Bayesian linear regression: a normal prior of PRIOR_SPREAD, and steps that are off by NOISE."""
    prior_F = np.array(PRIOR_COST)
    prior_F *= num_steps / (sums_F @ prior_F)  # as dear on the whole as what was measured
    spread_F = prior_F[0] * np.array(PRIOR_SPREAD)
    precision_FF = moments_FF + np.diag((NOISE / spread_F) ** 2)
    fitted_F = prior_F + np.linalg.solve(precision_FF, sums_F - moments_FF @ prior_F)
    step, row, a_pass, draft_row = np.maximum(fitted_F, prior_F * 1e-2).tolist()
    return step, row, a_pass, draft_row


def choose_depths(
    rates: Sequence[Sequence[float]], weights: Weights, num_other_rows: int, max_depths: Sequence[int]
) -> list[int]:
    """Depths, one per request, of the highest expected number of tokens per second.

    `rates[r][i]` is the probability that draft i of request r is accepted given those before it; `weights` as of
    `StepCost.weights`; `num_other_rows` are computed beside the requests' own.
    """
    step, row, a_pass, draft_row = weights
    # Of draft i: the probability that it and all before it are accepted, which falls with i.
    gains = sorted(
        (
            (gain, i, r)
            for r, of_request in enumerate(rates)
            for i, gain in enumerate(accumulate(of_request[: max_depths[r]], mul))
        ),
        key=lambda entry: (-entry[0], entry[1]),
    )
    tokens = float(len(rates))
    seconds = step + row * (len(rates) + num_other_rows)
    best, best_rate = [0] * len(rates), tokens / seconds
    for num_passes in range(1, max(max_depths, default=0) + 1):
        depths, some_tokens, some_seconds = [0] * len(rates), tokens, seconds + a_pass * num_passes
        for gain, i, r in gains:
            if i >= num_passes:
                continue
            if some_seconds * gain <= some_tokens * (row + draft_row):
                break  # this one, and all that are less likely, take more time than they bring
            depths[r] += 1
            some_tokens, some_seconds = some_tokens + gain, some_seconds + row + draft_row
        if some_tokens / some_seconds > best_rate:
            best, best_rate = depths, some_tokens / some_seconds
    return best


@dataclass(frozen=True)
class ExplorationSchedule:
    """When to do what was not chosen: for `length` steps, after `after` that were alike."""

    after: int
    longest: int
    length: int
    num_alike: int = 0
    num_others: int = 0

    @property
    def is_due(self) -> bool:
        return self.num_alike >= self.after

    def next(self, is_alike: bool) -> ExplorationSchedule:
        if is_alike:
            return replace(self, num_alike=self.num_alike + 1)
        if not self.is_due:
            return replace(self, num_alike=0)
        if self.num_others + 1 < self.length:
            return replace(self, num_others=self.num_others + 1)
        return replace(self, num_alike=0, num_others=0, after=min(2 * self.after, self.longest))


@dataclass(frozen=True)
class DraftingState:
    """What is known of drafting on the whole. Every method returns a value; nothing changes."""

    max_depth: int
    overall: Acceptance = NO_DRAFTS_YET
    cost: StepCost = field(default_factory=StepCost.unknown)
    probe: ExplorationSchedule = ExplorationSchedule(*PROBE_AFTER, PROBE_LEN)
    pause: ExplorationSchedule = ExplorationSchedule(*PAUSE_AFTER, PAUSE_LEN)
    drafted: tuple[int, ...] = ()  # drafts that were verified, by position
    accepted: tuple[int, ...] = ()

    def depths(self, acceptances: Sequence[Acceptance], num_other_rows: int, allowed: Sequence[int]) -> list[int]:
        """How many tokens to draft for each request: at most `allowed` of it, and at most `max_depth`."""
        if not self.max_depth or not acceptances or self.pause.is_due:
            return [0] * len(acceptances)
        prior = self.overall.rates([PRIOR_RATE] * self.max_depth)
        most = [min(self.max_depth, some) for some in allowed]
        depths = choose_depths([a.rates(prior) for a in acceptances], self.cost.weights, num_other_rows, most)
        return [min(1, some) for some in most] if self.probe.is_due and not any(depths) else depths

    def chosen(self, depths: Sequence[int]) -> DraftingState:
        """After `depths` gave these for a step that had requests to draft for."""
        is_idle = not any(depths)
        return replace(self, probe=self.probe.next(is_idle), pause=self.pause.next(not is_idle))

    def verified(self, num_drafts: int, num_accepted: int) -> DraftingState:
        """After drafts of one request were verified."""
        size = max(len(self.drafted), num_drafts)
        return replace(
            self,
            overall=self.overall.observe(num_drafts, num_accepted, OVERALL_KEPT),
            drafted=_counted(self.drafted, num_drafts, size),
            accepted=_counted(self.accepted, num_accepted, size),
        )

    def timed(self, shape: StepShape, seconds: float) -> DraftingState:
        """After a step of this shape took `seconds`."""
        if not self.max_depth or not seconds or shape.num_rows > MAX_ROWS:
            return self
        return replace(self, cost=self.cost.observe(shape, seconds))


def _counted(counts: Sequence[int], num_more: int, size: int) -> tuple[int, ...]:
    """One more for each of the first `num_more`."""
    return tuple(count + (i < num_more) for i, count in enumerate([*counts, *[0] * (size - len(counts))]))
