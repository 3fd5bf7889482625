"""The controller's loop: one leader that brings the fleet to where the planner wants it, a round at a time.

It talks to the registry and to shards through two small protocols, so that the simulator runs this very code. It keeps
nothing that the next leader would need: what is published, and what shards hold, is all there is to know.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.control.operator_orders import OrderKind, StandingOrder, with_drain_orders
from cluster.control.registry_store import LEASE_TTL_S, Lease, RegistryStore, StalePlacement, StoreUnavailable
from cluster.placement.migration import (
    DEVICE,
    STANDBY,
    Holding,
    Home,
    Limits,
    Target,
    by_shard,
    held_homes,
    leftovers,
    next_round,
    next_target,
)
from cluster.placement.plan import Plan
from cluster.topology import Experts, LayerSpec, Placement, Shard

log = logging.getLogger(__name__)

REGRET = 0.01  # a plan that made steps longer by this part is taken back
MAX_TURN_S = 60.0  # after which a leader that is still at a turn loses the lease


class ShardFailed(RuntimeError):
    """A shard did not do what it was asked; the message says what."""


class WitnessFailed(ShardFailed):
    """Of two shards that were to be compared, it was the old one, which says nothing of the new one."""


@dataclass(frozen=True)
class LeaderOrder:
    """What every change on a shard carries: the newest epoch, and the leader's token. Shards refuse older tokens."""

    epoch: int
    fencing: int


class Shards(Protocol):
    """What the controller asks of shards; every method may raise ShardFailed, and ends in bounded time."""

    async def holding(self, shard: Shard) -> Holding: ...

    async def load(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> Mapping[int, int]:
        """Loads and verifies; returns the largest gain exponent of each of these layers."""

    async def drop(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> None: ...

    async def disagreements(self, old: Shard, new: Shard, experts: Experts) -> dict[int, list[int]]:
        """The experts for which the two do not compute the same. Raises WitnessFailed where `old` is to blame."""


Planner = Callable[[Sequence[Shard], Placement | None], Awaitable[Plan]]


@dataclass(frozen=True)
class ControllerTiming:
    """Seconds.

    period_s, plan_every_s: between turns, and between plans for the load's sake.
    ask_s: that shards have to say what they hold, and to show that they live before homes are given up for theirs.
    drain_s: from all backbones following an epoch to dropping what it gave up.
    shun_s: that a shard which failed to load is left alone.
    first_wait_s: that backbones are given to bring back a placement that the store has lost.
    judge_s: until a plan is judged by the load that came.
    regret_s: without plans for the load's sake after one was taken back.
    """

    period_s: float = 0.5
    plan_every_s: float = 10.0
    ask_s: float = 0.5
    drain_s: float = 1.0
    shun_s: float = 10.0
    first_wait_s: float = 2.0
    judge_s: float = 60.0
    regret_s: float = 300.0


@dataclass
class _Ready:
    """Homes that this leader has had loaded and verified on one start of a shard."""

    incarnation: str
    homes: set[Home] = field(default_factory=set)


def as_placement(layers: Sequence[LayerSpec], holdings: Mapping[str, Holding]) -> Placement | None:
    """What shards hold as if it were published, for a plan that makes the most of it; None if they hold nothing."""
    held = sorted(held_homes(holdings))
    homes: dict[int, list[list[str]]] = {spec.layer: [[] for _ in range(spec.num_experts)] for spec in layers}
    for home in held:
        if home.tier == DEVICE:
            homes[home.layer][home.expert].append(home.shard_id)
    found = {layer: tuple(tuple(own) for own in of_layer) for layer, of_layer in homes.items()}
    return Placement(0, found, {}) if held else None


@dataclass(frozen=True)
class _PlanTrial:
    """A plan that has yet to prove itself."""

    before: Target
    predicted: float  # part of the time per step that it saves
    judge_at: float


class Reconciler:
    """`turn` is the loop's body; `clock` gives seconds since 1970; `ordered_planner` makes the plans of operators."""

    def __init__(
        self,
        owner: str,
        model: str,
        layers: Sequence[LayerSpec],
        num_expected: Mapping[str, int],
        registry: RegistryStore,
        shards: Shards,
        planner: Planner,
        clock: Callable[[], float],
        timing: ControllerTiming = ControllerTiming(),
        limits: Limits | None = None,
        ordered_planner: Planner | None = None,
    ) -> None:
        self.owner, self.model, self.layers, self.num_expected = owner, model, layers, num_expected
        self.registry, self.shards, self.planner, self.clock = registry, shards, planner, clock
        self.timing, self.limits = timing, limits or Limits()
        self.ordered_planner = ordered_planner or planner
        self.placement: Placement | None = None
        self.target: Target | None = None
        self._lease: Lease | None = None
        self._bare_since: float | None = None  # since when no placement is published
        self._turn_began = self._planned_at = 0.0
        self._planned_for: object = None
        self._trial: _PlanTrial | None = None
        self._regrets_until = 0.0
        self._rest: Sequence[object] | None = None  # what was looked at when there was nothing to do
        self._followed_since: tuple[int, float] | None = None
        self._work: dict[str, asyncio.Task[None]] = {}
        self._held: dict[str, tuple[tuple[str, str], Holding]] = {}  # with the start and the digest that it belongs to
        self._to_ask: set[str] = set()  # shards that hold something else by now
        self._ready: dict[str, _Ready] = {}
        self._gains: dict[int, int] = {}
        self._shunned: dict[str, float] = {}

    async def run(self) -> None:
        """Until cancelled. A store or a shard that fails is tried again at the next turn."""
        keeping = asyncio.create_task(self._keep_lease())
        try:
            while True:
                self._turn_began = self.clock()
                try:
                    await self.turn()
                except (StoreUnavailable, StalePlacement, ShardFailed) as error:
                    log.warning("This turn of the controller failed: %s", error)
                    self._bare_since = None  # backbones could not bring back what was lost either
                except Exception:
                    log.exception("This turn of the controller failed.")
                await asyncio.sleep(self.timing.period_s)
        finally:
            for task in (keeping, *self._work.values()):
                task.cancel()
            await self._resign()

    async def _keep_lease(self) -> None:
        """Renews it during turns that take longer than it lasts, as with a thousand shards; whether it is lost is found
        out when a turn begins."""
        while True:
            await asyncio.sleep(LEASE_TTL_S / 3)
            if self._lease is not None and self.clock() - self._turn_began < MAX_TURN_S:
                with suppress(StoreUnavailable):
                    await self.registry.renew_lease(self._lease)

    async def turn(self) -> None:
        if not await self._lead():
            return
        orders = await self.registry.orders()
        known = {shard.id: shard for shard in with_drain_orders(await self.registry.shards(), orders)}
        self.placement = await self._published()
        holdings = await self._holdings(known)
        alive = [known[id] for id in sorted(holdings)]
        ordered = next((order for order in orders.values() if order.kind is OrderKind.REBALANCE), None)
        if not await self._plan(alive, holdings, ordered) or self.target is None:
            return
        target, followed = self.target, [*(await self.registry.followers()).values()]
        is_overtaken = self.placement is not None and max(followed, default=0) > self.placement.epoch
        sight = (self.placement, target, is_overtaken, *holdings.values())
        if not self._is_news(sight):
            return
        wanted = next_round(self.layers, target, self.placement, alive, holdings, self.limits)
        ready = {home for shard in alive for home in self._ready_on(shard)} & held_homes(holdings)
        done = wanted.without(wanted.loads - ready)
        if next_target(target, self.placement, done, holdings, self.limits):
            # A heartbeat may be seconds old: a home that goes must leave others that answer now.
            sure = await self._ask_again(alive)
            done = done.without(done.loads - held_homes(sure))
            if after := next_target(target, self.placement, done, sure, self.limits):
                await self._publish(after)
        elif self.placement is not None and is_overtaken:
            await self._publish(Target.of(self.placement))  # a store that lost one got an older one back
        unwanted, too_high = leftovers(self.placement, target, holdings)
        if self._is_drained(followed):
            self._start_drops(known, unwanted)
            self._start_loads(known, too_high)
        self._start_loads(known, wanted.loads - ready)
        is_at_rest = not (wanted.loads or wanted.num_left or unwanted or too_high)
        self._rest = sight if is_at_rest else None

    def _is_news(self, sight: Sequence[object]) -> bool:
        """Whether there may be something to do: finding out takes a second where there are a thousand shards."""
        rest = self._rest
        return rest is None or len(rest) != len(sight) or any(a is not b for a, b in zip(rest, sight, strict=True))

    @property
    def leads(self) -> bool:
        """Whether this controller decided at its last turn."""
        return self._lease is not None

    @property
    def is_settled(self) -> bool:
        """Whether what is published is what was planned for the shards that there are."""
        return self.placement is not None and self.target == Target.of(self.placement)

    async def _resign(self) -> None:
        """Lets another lead at once."""
        if self._lease is not None:
            with suppress(StoreUnavailable):
                await self.registry.release_lease(self._lease)

    async def _lead(self) -> bool:
        """Whether this controller decides; a lease that is lost ends what it has begun."""
        lease = self._lease
        if lease is not None and await self.registry.renew_lease(lease):
            return True
        self._lease = await self.registry.acquire_lease(self.owner)
        self.target, self._ready, self._followed_since, self._planned_for, self._rest = None, {}, None, None, None
        if self._lease is None:  # whoever leads may do away with what this one knows of
            self.placement = None
            return False
        log.info("%s leads, with token %d.", self.owner, self._lease.fencing)
        return True

    @property
    def _order(self) -> LeaderOrder:
        assert self._lease is not None
        return LeaderOrder(self.placement.epoch if self.placement else 0, self._lease.fencing)

    async def _published(self) -> Placement | None:
        """The placement that is published for this checkpoint; a store that lost it gets it back."""
        stored_epoch, known = await self.registry.epoch(), self.placement
        if known is not None and stored_epoch < known.epoch:
            await self.registry.publish(known, stored_epoch, self._order.fencing)
        if known is not None and stored_epoch <= known.epoch:
            return known
        stored = await self.registry.placement()
        layers = {spec.layer: spec.num_experts for spec in self.layers}
        if stored is None or stored.model != self.model:
            return None
        return stored if {layer: len(homes) for layer, homes in stored.homes.items()} == layers else None

    async def _holdings(self, known: Mapping[str, Shard]) -> dict[str, Holding]:
        """Of every shard, asked again when its digest has changed. One that does not answer is taken to hold what it
        held: whether it is alive is for its heartbeat to say."""
        self._held = {
            id: held for id, held in self._held.items() if id in known and held[0][0] == known[id].incarnation
        }
        is_old = [
            shard
            for id, shard in sorted(known.items())
            if id not in self._held or id in self._to_ask or self._held[id][0] != (shard.incarnation, shard.held_digest)
        ]
        self._to_ask.clear()
        answered = await self._ask_again(is_old)
        self._to_ask |= {shard.id for shard in is_old} - answered.keys()
        return {id: holding for id, (_, holding) in self._held.items()}

    async def _ask_again(self, shards: Sequence[Shard]) -> dict[str, Holding]:
        """What those that answer, in time, hold at this moment."""

        async def ask(shard: Shard) -> Holding | None:
            try:
                holding = await self.shards.holding(shard)
            except ShardFailed as error:
                log.warning("Shard %s does not say what it holds: %s", shard.id, error)
                return None
            self._held[shard.id] = (shard.incarnation, shard.held_digest), holding
            return holding

        tasks = {shard.id: asyncio.ensure_future(ask(shard)) for shard in shards}
        if tasks:
            await asyncio.wait(tasks.values(), timeout=self.timing.ask_s)
        answers = {id: task.result() if task.done() else None for id, task in tasks.items()}
        return {id: holding for id, holding in answers.items() if holding is not None}

    async def _plan(
        self, alive: Sequence[Shard], holdings: Mapping[str, Holding], ordered: StandingOrder | None
    ) -> bool:
        """Plans anew when the fleet has changed, when it is ordered, or now and then for load's sake; whether there is
        a plan to follow."""
        if self.placement is None and not self._may_begin(alive):
            return False
        if self.placement is not None:
            self._bare_since = None
        now, fleet = self.clock(), [(shard.id, shard.incarnation, shard.draining) for shard in alive]
        running = Target.of(self.placement) if self.placement else None
        is_under_way = self.target is not None and self.target != running
        patience = self.timing.plan_every_s * (6 if is_under_way else 1)
        is_due = now - self._planned_at >= patience and now >= self._regrets_until
        if fleet != self._planned_for:
            self._trial = None  # what was before is no place to go back to, nor a time to compare with
        elif not is_due and ordered is None:
            return True
        if running is not None and not is_under_way and ordered is None and await self._take_back(alive, holdings):
            return True
        try:
            planner = self.planner if ordered is None else self.ordered_planner
            plan = await planner(alive, self.placement or as_placement(self.layers, holdings))
        except ValueError as error:
            log.warning("No plan for these shards: %s", error)
            return False
        self._planned_at, self._planned_for = now, fleet
        self.target = Target(plan.homes, plan.standby)
        if plan.moves or ordered is not None:
            await self._note(plan, ordered)
            if plan.gain_s > 0 and self._trial is None and running is not None:
                saved = 1.0 - plan.predicted_s_after / plan.predicted_s_before
                self._trial = _PlanTrial(running, saved, now + self.timing.judge_s)
        if ordered is not None:  # last: who dies before it leaves the order to a successor
            await self.registry.lift_order(ordered)
        return True

    async def _take_back(self, alive: Sequence[Shard], holdings: Mapping[str, Holding]) -> bool:
        """Judges the last plan by the load that has come since: whether it made things worse and is taken back."""
        trial, now = self._trial, self.clock()
        if trial is None or now < trial.judge_at:
            return False
        self._trial = None
        before = Placement(0, trial.before.homes, {}, standby=trial.before.standby)
        if not holdings.keys() >= set(before.shard_ids):
            return False  # it cannot be had back
        was, now_is = await self.planner(alive, before), await self.planner(alive, self.placement)
        achieved = 1.0 - now_is.predicted_s_before / was.predicted_s_before if was.predicted_s_before else 0.0
        is_worse = achieved < -REGRET
        numbers = {"predicted": f"{trial.predicted:.4f}", "achieved": f"{achieved:.4f}"}
        await self._record({"kind": "rollback" if is_worse else "verdict", **numbers})
        if is_worse:
            self.target, self._regrets_until = trial.before, now + self.timing.regret_s
        return is_worse

    async def _note(self, plan: Plan, ordered: StandingOrder | None = None) -> None:
        covers = {"cover_before": str(plan.cover_before), "cover_after": str(plan.cover_after)}
        numbers = {"moves": str(len(plan.moves)), "bytes": str(plan.num_bytes), "gain_s": f"{plan.gain_s:.4f}"}
        asked = {} if ordered is None else {"ordered_by": ordered.by}
        await self._record({"kind": "plan", **numbers, **covers, **asked, "why": " ".join(plan.reasons)})

    async def _record(self, decision: Mapping[str, str]) -> None:
        log.info("Decided: %s", decision)
        with suppress(StoreUnavailable):
            await self.registry.note_decision({"at": f"{self.clock():.3f}", "by": self.owner, **decision})

    def _may_begin(self, alive: Sequence[Shard]) -> bool:
        """Whether a first placement may be made: the fleet is there, and no backbone brings one back."""
        now, pools = self.clock(), Counter(shard.pool for shard in alive if not shard.draining)
        self._bare_since = now if self._bare_since is None else self._bare_since
        is_new = not any(shard.num_held for shard in alive)
        is_complete = all(pools[pool] >= count for pool, count in self.num_expected.items())
        return is_complete and (is_new or now - self._bare_since >= self.timing.first_wait_s)

    async def _publish(self, after: Target) -> None:
        assert self._lease is not None
        stored = await self.registry.placement()
        before = stored.epoch if stored else 0
        known = self.placement.gains if self.placement else {}
        gains = {layer: max(gain, known.get(layer, gain)) for layer, gain in {**known, **self._gains}.items()}
        epoch = max(before + 1, round(1000 * self.clock()))
        placement = Placement(epoch, after.homes, gains, self.model, after.standby)
        await self.registry.publish(placement, before, self._lease.fencing)
        self.placement = placement
        log.info("Epoch %d is published; cover %d.", epoch, placement.cover())

    def _is_drained(self, followed: Collection[int]) -> bool:
        """Whether every backbone has followed the placement for long enough that no call of an older one is left."""
        if self.placement is None:  # then what is held is either wanted, or in the way of a first placement
            bare_s = 0.0 if self._bare_since is None else self.clock() - self._bare_since
            return not followed and bare_s > self.timing.first_wait_s
        if any(epoch != self.placement.epoch for epoch in followed):
            self._followed_since = None
        elif self._followed_since is None or self._followed_since[0] != self.placement.epoch:
            self._followed_since = self.placement.epoch, self.clock()
        return self._followed_since is not None and self.clock() - self._followed_since[1] >= self.timing.drain_s

    def _ready_on(self, shard: Shard) -> set[Home]:
        ready = self._ready.get(shard.id)
        return ready.homes if ready and ready.incarnation == shard.incarnation else set()

    def _start_drops(self, known: Mapping[str, Shard], unwanted: set[Home]) -> None:
        for id in sorted({home.shard_id for home in unwanted}):
            homes = {home for home in unwanted if home.shard_id == id}
            self._start(known[id], self._drop(known[id], homes))

    def _start_loads(self, known: Mapping[str, Shard], homes: Iterable[Home]) -> None:
        now = self.clock()
        self._shunned = {id: until for id, until in self._shunned.items() if until > now}
        for id in sorted({home.shard_id for home in homes} - self._shunned.keys()):
            own = {home for home in homes if home.shard_id == id}
            self._start(known[id], self._load(known, known[id], own))

    def _start(self, shard: Shard, work: Coroutine[Any, Any, None]) -> None:
        """One thing at a time on each shard, none of which holds up another shard."""
        self._work = {id: task for id, task in self._work.items() if not task.done()}
        if shard.id in self._work:
            work.close()
        else:
            self._work[shard.id] = asyncio.create_task(self._guarded(shard, work))

    async def _guarded(self, shard: Shard, work: Awaitable[None]) -> None:
        try:
            await work
        except ShardFailed as error:
            log.warning("Shard %s loads nothing for %.0f s: %s", shard.id, self.timing.shun_s, error)
            self._shunned[shard.id] = self.clock() + self.timing.shun_s
        finally:
            self._to_ask.add(shard.id)

    async def _drop(self, shard: Shard, homes: set[Home]) -> None:
        self._ready_on(shard).difference_update(homes)
        device, standby = (by_shard(homes, tier).get(shard.id, {}) for tier in (DEVICE, STANDBY))
        await self.shards.drop(shard, device, standby, self._order)

    async def _load(self, known: Mapping[str, Shard], shard: Shard, homes: set[Home]) -> None:
        """Loads, then has each expert's sums compared with those of a home that serves it."""
        device, standby = (by_shard(homes, tier).get(shard.id, {}) for tier in (DEVICE, STANDBY))
        gains = await self.shards.load(shard, device, standby, self._order)
        for layer, gain in gains.items():
            self._gains[layer] = max(gain, self._gains.get(layer, gain))
        for other_id, experts in self._witnesses(known, shard.id, homes).items():
            try:
                different = await self.shards.disagreements(known[other_id], shard, experts)
            except WitnessFailed as error:
                log.warning("No comparison of %s with %s: %s", shard.id, other_id, error)
                continue
            if different:
                await self.shards.drop(shard, different, {}, self._order)
                raise ShardFailed(f"it computes the experts {different} (by layer) otherwise than {other_id}")
        ready = self._ready.get(shard.id)
        if ready is None or ready.incarnation != shard.incarnation:
            ready = self._ready[shard.id] = _Ready(shard.incarnation)
        ready.homes |= homes

    def _witnesses(self, known: Mapping[str, Shard], shard_id: str, homes: Iterable[Home]) -> dict[str, Experts]:
        """A serving home for each expert that has one, as experts by layer of each such home."""
        if self.placement is None:
            return {}
        chosen = set()
        for home in homes:
            others = [id for id in self.placement.homes[home.layer][home.expert] if id in known and id != shard_id]
            if home.tier == DEVICE and others:
                chosen.add(Home(home.layer, home.expert, others[0]))
        return dict(by_shard(chosen, DEVICE))
