"""The `DraftingState` chooses the draft depth of each request: the number of tokens to draft for it in one step.

All functions here are pure: a function's result depends only on its arguments, and no function reads a clock.

A step verifies the drafts of the previous step and then drafts again. Deeper drafts cost more rows and draft passes,
but give more tokens per step if the model accepts the drafts. The depths are chosen for the highest expected number of
tokens per second. This number follows from two measurements: how often the drafts at each position are accepted, and
how long a step takes. So drafting stops when drafts cost more time than they save. From time to time, drafting is tried
again.

Legend: F features of a step's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul

import numpy as np
from numpy.typing import NDArray

DEFAULT_DRAFT_TOKENS = 4  # largest draft depth; measured acceptance and cost choose a depth from 0 to this
PRIOR_RATE = 0.6  # acceptance rate at any position before anything was measured
PRIOR_WEIGHT = 4.0  # weight of the prior acceptance rate, in observations
REQUEST_KEPT = 0.98  # factor by which the older acceptance counts of one request are multiplied at each new observation
OVERALL_KEPT = 0.998  # the same factor for the acceptance counts of all requests together
COST_KEPT = 0.99  # the same factor for the measured costs of steps
# Assumed costs of a step, a row, a draft pass and a row of a draft pass before anything was measured, relative to the
# cost of a step, and the standard deviation of each assumed cost.
PRIOR_COST = (1.0, 0.05, 0.15, 0.02)
PRIOR_SPREAD = (1.0, 0.3, 0.3, 0.1)
NUM_TRUSTED = 16  # number of observed steps after which the fitted costs are trusted
MAX_SURPRISE = 1.5  # largest factor between measured and expected seconds; larger factors are clipped
# Number of steps between two fits after the first NUM_TRUSTED steps. A fit takes as long as a small layer.
FIT_EVERY = 8
NOISE = 0.1  # relative standard deviation of a step's seconds
MAX_UNREAD = 128  # largest number of unread tokens that the draft module reads when it drafts for a request again
MAX_ROWS = 256  # steps with more rows are not used to fit costs: the costs of long prompts follow another law
# If the depths never changed, the fit could not separate the cost of drafts from the cost of the model. Therefore a
# probe drafts for PROBE_LEN steps after PROBE_AFTER[0] steps without drafts, and a pause stops drafting for PAUSE_LEN
# steps after PAUSE_AFTER[0] steps with drafts. Each probe doubles the number of steps before the next probe, up to
# PROBE_AFTER[1]; each pause does the same up to PAUSE_AFTER[1].
PROBE_AFTER, PROBE_LEN = (32, 256), 4
PAUSE_AFTER, PAUSE_LEN = (8, 64), 2


Weights = tuple[float, float, float, float]


@dataclass(frozen=True)
class Acceptance:
    """An `Acceptance` counts tried and accepted drafts at each draft position; older counts have less weight.

    A draft counts as tried only if all earlier drafts of the same step were accepted.
    """

    tried: tuple[float, ...] = ()
    accepted: tuple[float, ...] = ()

    def observe(self, num_drafts: int, num_accepted: int, kept: float) -> Acceptance:
        """Return the counts after a step verified `num_drafts` drafts and accepted the first `num_accepted` of them.

        The older counts are multiplied by `kept`.
        """
        assert 0 <= num_accepted <= num_drafts
        num_tried = min(num_accepted + 1, num_drafts)
        size = max(len(self.tried), num_tried)
        tried, accepted = _padded(self.tried, size), _padded(self.accepted, size)
        for i in range(num_tried):
            tried[i] = kept * tried[i] + 1
            accepted[i] = kept * accepted[i] + (i < num_accepted)
        return Acceptance(tuple(tried), tuple(accepted))

    def rates(self, prior: Sequence[float]) -> tuple[float, ...]:
        """Return, per draft position, the probability that the draft is accepted if all earlier drafts are accepted.

        `prior` holds the probabilities to assume before anything was observed, one per position.
        """
        tried, accepted = _padded(self.tried, len(prior)), _padded(self.accepted, len(prior))
        return tuple(
            (a + PRIOR_WEIGHT * p) / (t + PRIOR_WEIGHT) for t, a, p in zip(tried, accepted, prior, strict=False)
        )


NO_DRAFTS_YET = Acceptance()


def _padded(values: Sequence[float], size: int) -> list[float]:
    return [*values, *[0.0] * (size - len(values))]


@dataclass(frozen=True)
class StepShape:
    """A `StepShape` counts the model's rows and the draft module's passes and rows, which determine a step's cost."""

    num_rows: int
    num_passes: int = 0
    num_draft_rows: int = 0

    @property
    def features(self) -> tuple[float, float, float, float]:
        """Return the numbers (F,) by which the four weights of a `StepCost` are multiplied to give a step's seconds."""
        return 1.0, float(self.num_rows), float(self.num_passes), float(self.num_draft_rows)


@dataclass(frozen=True, eq=False)
class StepCost:
    """A `StepCost` estimates a step's seconds as a linear function of the step's shape.

    The function is fitted by least squares of relative errors.

    - `weights`: the seconds of a step, of a row, of a draft pass and of a row of a draft pass. If the observed steps
      cannot separate two costs, the two costs follow PRIOR_COST, scaled to the measured seconds.
    - `sums_F`: the sum of `features / seconds` over the observed steps.
    - `moments_FF`: the sum of the outer product of `features / seconds` with itself over the observed steps.

    Older steps have less weight in the sums.
    """

    weights: Weights
    moments_FF: NDArray[np.float64]
    sums_F: NDArray[np.float64]
    num_steps: float = 0.0  # number of observed steps, with less weight for older steps, as in the sums
    num_seen: int = 0  # number of observed steps, all with the same weight

    @staticmethod
    def unknown() -> StepCost:
        """Return the estimate before any step was observed."""
        return StepCost(PRIOR_COST, np.zeros((4, 4)), np.zeros(4))

    def seconds(self, shape: StepShape) -> float:
        """Return the expected seconds of a step of this shape."""
        return sum((w * f for w, f in zip(self.weights, shape.features, strict=True)), 0.0)

    def observe(self, shape: StepShape, seconds: float) -> StepCost:
        """Return the estimate after a step of this shape took `seconds`.

        A measured time may differ from the expected time by more than the factor MAX_SURPRISE, for example because the
        step had to wait for another process. Such a time is clipped, so that the factor is exactly MAX_SURPRISE.
        """
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
    """Return the weights of a `StepCost`, fitted by Bayesian linear regression.

    The prior is normal with the mean PRIOR_COST and the standard deviations PRIOR_SPREAD, in units of the prior cost of
    a step. The seconds of a step have the relative standard deviation NOISE.
    """
    prior_F = np.array(PRIOR_COST)
    prior_F *= num_steps / (sums_F @ prior_F)  # scale the prior so that it agrees with the measured steps on average
    spread_F = prior_F[0] * np.array(PRIOR_SPREAD)
    precision_FF = moments_FF + np.diag((NOISE / spread_F) ** 2)
    fitted_F = prior_F + np.linalg.solve(precision_FF, sums_F - moments_FF @ prior_F)
    step, row, a_pass, draft_row = np.maximum(fitted_F, prior_F * 1e-2).tolist()
    return step, row, a_pass, draft_row


def choose_depths(
    rates: Sequence[Sequence[float]], weights: Weights, num_other_rows: int, max_depths: Sequence[int]
) -> list[int]:
    """Return one draft depth per request, so that the expected number of tokens per second is highest.

    - `rates[r][i]`: the probability that draft i of request r is accepted if all earlier drafts of r are accepted.
    - `weights`: costs in seconds, like `StepCost.weights`.
    - `num_other_rows`: rows that the step computes for other requests.
    - `max_depths[r]`: the largest draft depth that request r may have.
    """
    step, row, a_pass, draft_row = weights
    # The gain of draft i is the probability that draft i and all earlier drafts are accepted. The gain falls with i.
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
                break  # this draft and all less likely drafts cost more time than they gain
            depths[r] += 1
            some_tokens, some_seconds = some_tokens + gain, some_seconds + row + draft_row
        if some_tokens / some_seconds > best_rate:
            best, best_rate = depths, some_tokens / some_seconds
    return best


@dataclass(frozen=True)
class ExplorationSchedule:
    """An `ExplorationSchedule` says when to try the less usual of two choices: to draft or not to draft.

    After `after` consecutive steps with the usual choice, the less usual choice is tried for `length` steps. Then
    `after` doubles, up to `longest`.
    """

    after: int
    longest: int
    length: int
    num_alike: int = 0  # consecutive steps with the usual choice
    num_others: int = 0  # steps with the less usual choice since this choice became due

    @property
    def is_due(self) -> bool:
        """Return True if the next step should try the less usual choice."""
        return self.num_alike >= self.after

    def next(self, is_alike: bool) -> ExplorationSchedule:
        """Return the schedule after one more step; `is_alike` is True if the step made the usual choice."""
        if is_alike:
            return replace(self, num_alike=self.num_alike + 1)
        if not self.is_due:
            return replace(self, num_alike=0)
        if self.num_others + 1 < self.length:
            return replace(self, num_others=self.num_others + 1)
        return replace(self, num_alike=0, num_others=0, after=min(2 * self.after, self.longest))


@dataclass(frozen=True)
class DraftingState:
    """A `DraftingState` holds what is known about drafting for all requests together.

    The state is immutable: methods return a new state.
    """

    max_depth: int
    overall: Acceptance = NO_DRAFTS_YET
    cost: StepCost = field(default_factory=StepCost.unknown)
    probe: ExplorationSchedule = ExplorationSchedule(*PROBE_AFTER, PROBE_LEN)
    pause: ExplorationSchedule = ExplorationSchedule(*PAUSE_AFTER, PAUSE_LEN)
    drafted: tuple[int, ...] = ()  # number of drafts that were verified, by position
    accepted: tuple[int, ...] = ()  # number of drafts that were accepted, by position

    def depths(self, acceptances: Sequence[Acceptance], num_other_rows: int, allowed: Sequence[int]) -> list[int]:
        """Return how many tokens to draft for each request i: at most `allowed[i]`, and at most `max_depth`.

        - `acceptances[i]`: how often drafts of request i were accepted.
        - `num_other_rows`: rows that the step computes for other requests.
        """
        if not self.max_depth or not acceptances or self.pause.is_due:
            return [0] * len(acceptances)
        prior = self.overall.rates([PRIOR_RATE] * self.max_depth)
        most = [min(self.max_depth, some) for some in allowed]
        depths = choose_depths([a.rates(prior) for a in acceptances], self.cost.weights, num_other_rows, most)
        return [min(1, some) for some in most] if self.probe.is_due and not any(depths) else depths

    def chosen(self, depths: Sequence[int]) -> DraftingState:
        """Return the state after a step drafted to these depths, one depth per request."""
        is_idle = not any(depths)
        return replace(self, probe=self.probe.next(is_idle), pause=self.pause.next(not is_idle))

    def verified(self, num_drafts: int, num_accepted: int) -> DraftingState:
        """Return the state after a step accepted `num_accepted` of the `num_drafts` drafts of a request."""
        size = max(len(self.drafted), num_drafts)
        return replace(
            self,
            overall=self.overall.observe(num_drafts, num_accepted, OVERALL_KEPT),
            drafted=_counted(self.drafted, num_drafts, size),
            accepted=_counted(self.accepted, num_accepted, size),
        )

    def timed(self, shape: StepShape, seconds: float) -> DraftingState:
        """Return the state after a step of this shape took `seconds`."""
        if not self.max_depth or not seconds or shape.num_rows > MAX_ROWS:
            return self
        return replace(self, cost=self.cost.observe(shape, seconds))


def _counted(counts: Sequence[int], num_more: int, size: int) -> tuple[int, ...]:
    """Return `counts`, padded with zeros to `size` positions and increased by 1 at the first `num_more` positions."""
    return tuple(count + (i < num_more) for i, count in enumerate([*counts, *[0] * (size - len(counts))]))
