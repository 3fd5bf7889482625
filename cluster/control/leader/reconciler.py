"""The `Reconciler` is the controller's loop: the leader moves the fleet towards the planned placement turn by turn.

The reconciler talks to the registry and to shards through two small protocols, so that the simulator can run the same
code. A new leader needs nothing from the memory of the last leader: the new leader reads the published placement from
the registry, and asks the shards for the experts that they hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.control.leader.decision_log import DecisionLog
from cluster.control.leader.fleet_observer import FleetObserver
from cluster.control.leader.lease_keeper import LeaseKeeper
from cluster.control.leader.plan_schedule import PlanSchedule
from cluster.control.leader.plan_trial import Planner, PlanTrial
from cluster.control.leader.published_placement import PublishedPlacement
from cluster.control.leader.shard_work import ShardWork
from cluster.control.operator_orders import rebalance_order, with_drain_orders
from cluster.control.registry_store import RegistryStore, StalePlacement, StoreUnavailable
from cluster.control.shard_control import ShardControl, ShardFailed
from cluster.placement.migration import Holding, Limits, Target, held_homes, leftovers, next_round, next_target
from cluster.topology import LayerSpec, Placement, Shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControllerTiming:
    """A `ControllerTiming` holds the controller's waiting times, all in seconds.

    - `period_s`: the pause between two turns.
    - `plan_every_s`: the time from one plan to the next plan for a changed load.
    - `answer_s`: the time that shards have to report their experts, or more if their answers came late before. A home
      can replace another home only if the shard of the new home answers within this time.
    - `drain_s`: shards keep the homes that an epoch removed until all backbones have followed the epoch for this time.
    - `failure_pause_s`: the time without loads on a shard after a job on the shard has failed.
    - `recovery_s`: after the store has lost the placement, backbones have this time to publish the placement again.
    - `trial_s`: the time from a plan to the verdict on the plan.
    - `rollback_pause_s`: the time after a rollback in which the leader makes no plan for a changed load.
    """

    period_s: float = 0.5
    plan_every_s: float = 10.0
    answer_s: float = 0.5
    drain_s: float = 1.0
    failure_pause_s: float = 10.0
    recovery_s: float = 2.0
    trial_s: float = 60.0
    rollback_pause_s: float = 300.0


class Reconciler:
    """A `Reconciler` runs the loop of one controller; if there are several controllers, the holder of the lease leads.

    - `owner`: the controller's name in the lease.
    - `model`, `layers`: the digest of the checkpoint, and the checkpoint's MoE layers.
    - `num_expected`: the number of shards of each pool that must be alive before the first placement is planned.
    - `planner`: makes the plans for a changed fleet or a changed load.
    - `ordered_planner`: makes the plans that an operator has ordered.
    - `clock`: gives seconds since 1970.
    """

    def __init__(
        self,
        owner: str,
        model: str,
        layers: Sequence[LayerSpec],
        num_expected: Mapping[str, int],
        registry: RegistryStore,
        shards: ShardControl,
        planner: Planner,
        clock: Callable[[], float],
        timing: ControllerTiming = ControllerTiming(),
        limits: Limits | None = None,
        ordered_planner: Planner | None = None,
    ) -> None:
        self.owner, self.layers, self.registry, self.timing = owner, layers, registry, timing
        self.limits = limits or Limits()
        self.lease = LeaseKeeper(owner, registry, clock)
        self.observer = FleetObserver(shards, timing.answer_s)
        self.published = PublishedPlacement(
            model, layers, registry, self.lease, clock, timing.drain_s, timing.recovery_s
        )
        decisions = DecisionLog(owner, registry, clock)
        self.plans = PlanSchedule(
            layers,
            num_expected,
            self.published,
            registry,
            planner,
            ordered_planner or planner,
            PlanTrial(planner, decisions, clock, timing.trial_s, timing.rollback_pause_s),
            decisions,
            clock,
            timing.plan_every_s,
        )
        self.work = ShardWork(shards, self.observer, self.published, clock, timing.failure_pause_s)
        self._inputs_at_rest: Sequence[object] | None = None  # The inputs of the last turn that found nothing to do.

    @property
    def is_leader(self) -> bool:
        """Return True if this controller led at its last turn."""
        return self.lease.lease is not None

    @property
    def placement(self) -> Placement | None:
        """Return the published placement, or None if no placement is published or another controller leads."""
        return self.published.placement

    @property
    def is_settled(self) -> bool:
        """Return True if the published placement has exactly the homes and standbys of the target."""
        return self.placement is not None and self.plans.target == self.published.target

    async def run(self) -> None:
        """Run turns until cancelled; after a failure of the store or of a shard, the next turn tries again."""
        renewing = asyncio.create_task(self.lease.renew_during_long_turns())
        try:
            while True:
                self.lease.begin_turn()
                try:
                    await self.turn()
                except (StoreUnavailable, StalePlacement, ShardFailed) as error:
                    log.warning("This turn of the controller failed: %s", error)
                    self.published.restart_absence()
                except Exception:
                    log.exception("This turn of the controller failed.")
                await asyncio.sleep(self.timing.period_s)
        finally:
            renewing.cancel()
            self.work.cancel()
            await self.lease.release()

    async def turn(self) -> None:
        """Take one turn towards the target: renew the lease, observe the fleet, plan, publish, drop and load.

        Raises StoreUnavailable, StalePlacement or ShardFailed.
        """
        if not await self._lead():
            return
        orders = await self.registry.orders()
        known = {shard.id: shard for shard in with_drain_orders(await self.registry.shards(), orders)}
        await self.published.refresh()
        holdings = await self.observer.holdings(known)
        alive = [known[id] for id in sorted(holdings)]
        self.published.time_absence()
        target = await self.plans.update(alive, holdings, rebalance_order(orders))
        if target is None:
            return
        followed = [*(await self.registry.followers()).values()]
        inputs = (self.placement, target, self._is_overtaken(followed), *holdings.values())
        if self._are_at_rest(inputs):
            return
        is_at_rest = await self._take_round(target, known, alive, holdings, followed)
        self._inputs_at_rest = inputs if is_at_rest else None

    async def _lead(self) -> bool:
        """Renew or acquire the lease, and return True if this controller leads.

        If the old lease cannot be renewed, another leader may have changed the fleet. The controller then forgets three
        things: the target, the homes that are verified, and since when all backbones follow the placement.
        """
        if await self.lease.renew():
            return True
        is_leader = await self.lease.acquire()
        self.plans.forget()
        self.work.forget_verified()
        self.published.forget_followers()
        self._inputs_at_rest = None
        if not is_leader:
            self.published.forget()
        return is_leader

    def _is_overtaken(self, followed: Collection[int]) -> bool:
        """Return True if a backbone uses an epoch that is newer than the published epoch.

        In this case the store has lost the newest placement, and a process has published an older placement again.
        """
        return self.placement is not None and max(followed, default=0) > self.placement.epoch

    def _are_at_rest(self, inputs: Sequence[object]) -> bool:
        """Return True if the last round left nothing to do and its inputs were the same as `inputs`.

        In a fleet with a thousand shards, this check saves a second of computing at every turn.
        """
        before = self._inputs_at_rest
        return (
            before is not None
            and len(before) == len(inputs)
            and all(a is b for a, b in zip(before, inputs, strict=True))
        )

    async def _take_round(
        self,
        target: Target,
        known: Mapping[str, Shard],
        alive: Sequence[Shard],
        holdings: Mapping[str, Holding],
        followed: Collection[int],
    ) -> bool:
        """Publish the homes that are verified, then start drops and loads; return True if nothing is left to do."""
        missing = next_round(self.layers, target, self.placement, alive, holdings, self.limits)
        verified = {home for shard in alive for home in self.work.verified_on(shard)} & held_homes(holdings)
        done = missing.without(missing.loads - verified)
        if next_target(target, self.placement, done, holdings, self.limits):
            # A shard may have died after its last heartbeat. Before a home is removed, the shards of the other homes
            # must answer now.
            confirmed = await self.observer.ask(alive)
            done = done.without(done.loads - held_homes(confirmed))
            if after := next_target(target, self.placement, done, confirmed, self.limits):
                await self.published.publish(after, self.work.gains)
        elif self.placement is not None and self._is_overtaken(followed):
            await self.published.publish(Target.of(self.placement), self.work.gains)
        unwanted, too_high = leftovers(self.placement, target, holdings)
        if self.published.is_drained(followed):
            self.work.start_drops(known, unwanted)
            self.work.start_loads(known, too_high)
        self.work.start_loads(known, missing.loads - verified)
        return not (missing.loads or missing.num_left or unwanted or too_high)
