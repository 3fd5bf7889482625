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

PATIENCE = 6  # While homes still move, plans for a changed load are made less often by this factor.


class PlanSchedule:
    """A `PlanSchedule` holds the target, which is where the last plan wants experts, and decides when to plan anew.

    - `num_expected`: the shards of each pool that must be there before the first placement is planned.
    - `planner`: makes plans; `ordered_planner` makes the plans that an operator has ordered.
    - `clock`: gives seconds since 1970.
    - `period_s`: the seconds between plans for a changed load.
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
        self._planned_for: object = None  # The fleet that the target was planned for.

    def forget(self) -> None:
        """Forget the target, so that the next turn plans; a new leader does not know its predecessor's target."""
        self.target, self._planned_for = None, None

    async def update(
        self, alive: Sequence[Shard], holdings: Mapping[str, Holding], ordered: StandingOrder | None
    ) -> Target | None:
        """Return the target to follow now, or None if no plan can be made for the shards `alive`.

        A new plan is made if the fleet has changed, if an operator has ordered one (`ordered`), or if the time for a
        plan for a changed load has come. A plan that made steps longer is rolled back first.
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

        All expected shards must be there. If they hold experts, a placement was lost, and backbones must have had the
        time to bring it back.
        """
        pools = Counter(shard.pool for shard in alive if not shard.draining)
        is_new = not any(shard.num_held for shard in alive)
        is_complete = all(pools[pool] >= count for pool, count in self.num_expected.items())
        return is_complete and (is_new or self.published.missing_s >= self.published.recovery_s)

    async def _report(self, plan: Plan, running: Target | None, ordered: StandingOrder | None) -> None:
        """Log the decision, put the plan on trial, and lift the order that asked for the plan."""
        if plan.moves or ordered is not None:
            await self.decisions.add(plan_decision(plan, ordered))
            if running is not None:
                self.trial.begin(running, plan, self._planned_at)
        # The order is lifted last: if this leader dies before that, the next leader follows the order.
        if ordered is not None:
            await self.registry.lift_order(ordered)


def plan_decision(plan: Plan, ordered: StandingOrder | None = None) -> dict[str, str]:
    """Return the entry of the log of decisions for a plan."""
    covers = {"cover_before": str(plan.cover_before), "cover_after": str(plan.cover_after)}
    numbers = {"moves": str(len(plan.moves)), "bytes": str(plan.num_bytes), "gain_s": f"{plan.gain_s:.4f}"}
    author = {} if ordered is None else {"ordered_by": ordered.by}
    return {"kind": "plan", **numbers, **covers, **author, "why": " ".join(plan.reasons)}


def placement_of(layers: Sequence[LayerSpec], holdings: Mapping[str, Holding]) -> Placement | None:
    """Return the experts that shards hold in device memory as a placement, from which a plan can start.

    Returns None if the shards hold nothing at all.
    """
    held = sorted(held_homes(holdings))
    homes: dict[int, list[list[str]]] = {spec.layer: [[] for _ in range(spec.num_experts)] for spec in layers}
    for home in held:
        if home.tier == DEVICE:
            homes[home.layer][home.expert].append(home.shard_id)
    found = {layer: tuple(map(tuple, homes_of_layer)) for layer, homes_of_layer in homes.items()}
    return Placement(0, found, {}) if held else None
