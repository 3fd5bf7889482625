"""The `PlanSchedule` decides when the leader plans, and keeps the target of the last plan."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from cluster.control.leader.decision_log import DecisionLog
from cluster.control.leader.plan_trial import Planner, PlanTrial
from cluster.control.leader.published_placement import PublishedPlacement
from cluster.control.operator_orders import StandingOrder
from cluster.control.registry_store import RegistryStore
from cluster.placement.migration import DEVICE, Holding, Target, held_homes
from cluster.placement.plan import Plan
from cluster.topology import LayerSpec, Placement, Shard

log = logging.getLogger(__name__)

PATIENCE = 6  # While homes still move, the time between plans for a changed load is this many times longer.


class PlanSchedule:
    """A `PlanSchedule` decides when to plan, and holds the target: the homes and standbys of the last plan.

    - `num_expected`: the number of shards of each pool that must be alive before the first placement is planned.
    - `planner`: makes the plans for a changed fleet or a changed load.
    - `ordered_planner`: makes the plans that an operator has ordered.
    - `clock`: gives seconds since 1970.
    - `period_s`: the seconds from one plan to the next plan for a changed load.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        num_expected: Mapping[str, int],
        published: PublishedPlacement,
        registry: RegistryStore,
        planner: Planner,
        ordered_planner: Planner,
        trial: PlanTrial,
        decisions: DecisionLog,
        clock: Callable[[], float],
        period_s: float,
    ) -> None:
        self.layers, self.num_expected, self.published, self.registry = layers, num_expected, published, registry
        self.planner, self.ordered_planner, self.trial, self.decisions = planner, ordered_planner, trial, decisions
        self.clock, self.period_s = clock, period_s
        self.target: Target | None = None
        self._planned_at = 0.0
        self._planned_for: object = None  # The fleet for which the target was planned.

    def forget(self) -> None:
        """Forget the target, so that the next turn plans: a new leader does not know the last leader's target."""
        self.target, self._planned_for = None, None

    async def update(
        self, alive: Sequence[Shard], holdings: Mapping[str, Holding], ordered: StandingOrder | None
    ) -> Target | None:
        """Return the homes and standbys that the fleet should move to, or None if no plan can be made yet.

        - `alive`: the live shards.
        - `holdings`: the experts that each live shard holds, by shard id.
        - `ordered`: the operator's order to plan now, or None.

        The leader makes a new plan if the fleet has changed, if `ordered` is not None, or if a plan for a changed load
        is due. If the trial of the last plan shows that the plan made steps longer, the leader makes no new plan. The
        method then returns the homes and standbys that the last plan replaced.
        """
        running = self.published.target
        if running is None and not self._may_begin(alive):
            return None
        now, fleet = self.clock(), [(shard.id, shard.incarnation, shard.draining) for shard in alive]
        is_moving = self.target is not None and self.target != running
        patience_s = self.period_s * (PATIENCE if is_moving else 1)
        is_due = now - self._planned_at >= patience_s and not self.trial.is_paused
        if fleet != self._planned_for:
            self.trial.cancel()
        elif not is_due and ordered is None:
            return self.target
        if self.published.placement is not None and not is_moving and ordered is None:
            before = await self.trial.rollback(alive, self.published.placement)
            if before is not None:
                self.target = before
                return before
        planner = self.planner if ordered is None else self.ordered_planner
        try:
            plan = await planner(alive, self.published.placement or placement_of(self.layers, holdings))
        except ValueError as error:
            log.warning("No plan for these shards: %s", error)
            return None
        self._planned_at, self._planned_for = now, fleet
        self.target = Target(plan.homes, plan.standby)
        await self._report(plan, running, ordered)
        return self.target

    def _may_begin(self, alive: Sequence[Shard]) -> bool:
        """Return True if a first placement may be planned.

        All expected shards must be alive. If any shard holds experts, the store has lost a placement. In that case, the
        placement must have been missing for `recovery_s` seconds, so that backbones had time to publish it again.
        """
        pools = Counter(shard.pool for shard in alive if not shard.draining)
        is_new = not any(shard.num_held for shard in alive)
        is_complete = all(pools[pool] >= count for pool, count in self.num_expected.items())
        return is_complete and (is_new or self.published.missing_s >= self.published.recovery_s)

    async def _report(self, plan: Plan, running: Target | None, ordered: StandingOrder | None) -> None:
        """Log the decision, start the trial of `plan`, and lift the order that asked for the plan.

        `running` lists the homes and standbys that the plan replaces, or is None before the first placement.
        """
        if plan.moves or ordered is not None:
            await self.decisions.add(plan_decision(plan, ordered))
            if running is not None:
                self.trial.begin(running, plan, self._planned_at)
        # The order is lifted last. If this leader dies before, the next leader carries out the order.
        if ordered is not None:
            await self.registry.lift_order(ordered)


def plan_decision(plan: Plan, ordered: StandingOrder | None = None) -> dict[str, str]:
    """Return the entry for `plan` in the log of decisions; `ordered` is the order that asked for the plan, if any."""
    covers = {"cover_before": str(plan.cover_before), "cover_after": str(plan.cover_after)}
    numbers = {"moves": str(len(plan.moves)), "bytes": str(plan.num_bytes), "gain_s": f"{plan.gain_s:.4f}"}
    author = {} if ordered is None else {"ordered_by": ordered.by}
    return {"kind": "plan", **numbers, **covers, **author, "why": " ".join(plan.reasons)}


def placement_of(layers: Sequence[LayerSpec], holdings: Mapping[str, Holding]) -> Placement | None:
    """Return the present homes as a placement from which a plan can start, or None if no shard holds any expert.

    The homes of an expert are the shards in `holdings` that hold the expert in device memory. The placement has no
    standbys. If shards hold only standbys, the placement has no homes either, but is not None.
    """
    held = sorted(held_homes(holdings))
    homes: dict[int, list[list[str]]] = {spec.layer: [[] for _ in range(spec.num_experts)] for spec in layers}
    for home in held:
        if home.tier == DEVICE:
            homes[home.layer][home.expert].append(home.shard_id)
    found = {layer: tuple(map(tuple, homes_of_layer)) for layer, homes_of_layer in homes.items()}
    return Placement(0, found, {}) if held else None
