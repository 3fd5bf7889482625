"""The `PlanTrial` checks a plan against the load that was measured after the plan, and rolls back a harmful plan."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from cluster.control.leader.decision_log import DecisionLog
from cluster.placement.migration import Target
from cluster.placement.plan import Plan
from cluster.topology import Placement, Shard

MAX_LOSS = 0.01  # A plan is rolled back if it makes steps longer by more than this share of a step's time.

Planner = Callable[[Sequence[Shard], Placement | None], Awaitable[Plan]]


@dataclass(frozen=True)
class _Trial:
    """A `_Trial` is the trial of a plan: the predicted gain has not been compared with the measured load yet.

    `before` lists the homes and standbys that the plan replaces.
    """

    before: Target
    predicted: float  # The share of a step's time that the plan should save, by the planner's prediction.
    ends_at: float


class PlanTrial:
    """A `PlanTrial` judges the last plan by the load measured after the plan, and rolls back a harmful plan.

    A plan is harmful if it makes steps longer by more than the share `MAX_LOSS`.

    - `planner`: predicts how long steps take with a placement under the present load.
    - `clock`: gives seconds since 1970.
    - `trial_s`: the seconds from a plan to the verdict on the plan.
    - `pause_s`: the seconds after a rollback in which the leader makes no plan for a changed load.
    """

    def __init__(
        self, planner: Planner, decisions: DecisionLog, clock: Callable[[], float], trial_s: float, pause_s: float
    ) -> None:
        self.planner, self.decisions, self.clock = planner, decisions, clock
        self.trial_s, self.pause_s = trial_s, pause_s
        self._trial: _Trial | None = None
        self._paused_until = 0.0

    @property
    def is_paused(self) -> bool:
        """Return True if a plan was rolled back less than `pause_s` ago."""
        return self.clock() < self._paused_until

    def begin(self, before: Target, plan: Plan, planned_at: float) -> None:
        """Start a trial of `plan`, if no other trial is under way.

        `before` lists the homes and standbys that `plan` replaces. A plan without a predicted gain gets no trial.
        `planned_at` is the time of the plan in seconds since 1970.
        """
        if self._trial is None and plan.gain_s > 0:
            saved = 1.0 - plan.predicted_s_after / plan.predicted_s_before
            self._trial = _Trial(before, saved, planned_at + self.trial_s)

    def cancel(self) -> None:
        """End the trial without a verdict, because the fleet has changed.

        Steps before and after a change of the fleet cannot be compared.
        """
        self._trial = None

    async def rollback(self, alive: Sequence[Shard], placement: Placement) -> Target | None:
        """Return the homes and standbys to go back to if the trial is over and the plan was harmful, else None.

        `placement` is the published placement. The verdict goes to the log of decisions. There is no verdict if a home
        or standby that the plan replaced was on a shard that is dead now.
        """
        trial, now = self._trial, self.clock()
        if trial is None or now < trial.ends_at:
            return None
        self._trial = None
        before = Placement(0, trial.before.homes, {}, standby=trial.before.standby)
        if not {shard.id for shard in alive} >= set(before.shard_ids):
            return None
        plan_before, plan_now = await self.planner(alive, before), await self.planner(alive, placement)
        achieved = saved_share(plan_before.predicted_s_before, plan_now.predicted_s_before)
        is_worse = achieved < -MAX_LOSS
        numbers = {"predicted": f"{trial.predicted:.4f}", "achieved": f"{achieved:.4f}"}
        await self.decisions.add({"kind": "rollback" if is_worse else "verdict", **numbers})
        if not is_worse:
            return None
        self._paused_until = now + self.pause_s
        return trial.before


def saved_share(before_s: float, after_s: float) -> float:
    """Return the share of `before_s` that a step of `after_s` saves; the share is negative if the step takes longer."""
    return 1.0 - after_s / before_s if before_s else 0.0
