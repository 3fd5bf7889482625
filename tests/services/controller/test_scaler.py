"""Test the scaler beside a real reconciler, with a registry in memory and a clock that the test sets."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.control.leader.reconciler import Reconciler
from cluster.control.memory_registry import MemoryRegistry
from cluster.control.operator_orders import OrderKind, PoolSize, StandingOrder
from cluster.control.scaling import PoolPolicy
from cluster.control.shard_control import LeaderOrder
from cluster.load import ExpectedLoad
from cluster.placement.migration import DEVICE, STANDBY, Holding
from cluster.placement.plan import Plan, PlanPolicy
from cluster.placement.planner import plan
from cluster.topology import CostModel, Experts, Placement, Shard, held_digest
from services.controller.scaler import Scaler
from tests.cluster.fleet import make_layers, make_shard

LAYERS = make_layers()
SLOW = CostModel(call_us=50.0, weight_us_per_mib=2e6, row_us_per_mib=4e5)
POLICY = PoolPolicy(min_shards=2, max_shards=6, target_busy=0.5, upscale_delay_s=5.0, downscale_delay_s=60.0)


@dataclass
class Hosts:
    """A `Hosts` is a `ShardControl` whose shards load and drop at once."""

    held: dict[str, set[tuple[int, int, str]]] = field(default_factory=dict)

    async def holding(self, shard: Shard) -> Holding:
        return Holding(frozenset(self.held.setdefault(shard.id, set())), 100 * len(self.held[shard.id]))

    async def load(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> Mapping[int, int]:
        self.held.setdefault(shard.id, set()).update(_flat(device, DEVICE), _flat(standby, STANDBY))
        return dict.fromkeys({*device, *standby}, 0)

    async def drop(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> None:
        self.held.setdefault(shard.id, set()).difference_update(_flat(device, DEVICE), _flat(standby, STANDBY))

    async def disagreements(self, old: Shard, new: Shard, experts: Experts) -> dict[int, list[int]]:
        return {}


def _flat(experts: Experts, tier: str) -> set[tuple[int, int, str]]:
    return {(layer, expert, tier) for layer, own in experts.items() for expert in own}


class World:
    """A `World` is a pool of slow shards with its reconciler, its scaler and a clock."""

    def __init__(self, num_shards: int = 3) -> None:
        self.now, self.rows_per_s = 1.8e9, 0.0
        self.registry, self.hosts = MemoryRegistry(lambda: self.now), Hosts()
        self.shards = [make_shard(i, memory_budget=10_000) for i in range(num_shards)]
        self.lead()

    def lead(self) -> None:
        clock = lambda: self.now  # noqa: E731
        self.reconciler = Reconciler("me", "m", LAYERS, {"cpu": 2}, self.registry, self.hosts, self.planner, clock)
        self.scaler = Scaler({"cpu": POLICY}, LAYERS, self.registry, self.reconciler, self.load, clock, PlanPolicy())

    async def planner(self, shards: Sequence[Shard], placement: Placement | None) -> Plan:
        return plan(LAYERS, shards, placement, {})

    async def load(self) -> Mapping[int, ExpectedLoad]:
        rate = self.rows_per_s * 4 / 32
        return {spec.layer: ExpectedLoad.steady(np.full(32, rate)) for spec in LAYERS} if rate else {}

    async def passes(self, seconds: int) -> int:
        """Let some seconds pass, with turns of both loops, and return the last decided size of the pool."""
        for _ in range(seconds):
            self.now += 1.0
            for shard in self.shards:
                held = self.hosts.held.get(shard.id, set())
                by_tier = [
                    {layer: [e for la, e, of in held if la == layer and of == tier] for layer, _, _ in held}
                    for tier in (DEVICE, STANDBY)
                ]
                record = replace(shard, cost_model=SLOW, rows_per_call=8.0, held_digest=held_digest(*by_tier))
                await self.registry.heartbeat(record)
            for _ in range(2):  # The reconciler takes two turns per second, as in production.
                await self.reconciler.turn()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            await self.scaler.turn()
        size = await self.registry.pool_size("cpu")
        assert size is not None
        return size.shards

    def start(self, number: int) -> None:
        self.shards.append(make_shard(number, memory_budget=10_000))


def test_a_pool_grows_after_its_delay_and_shrinks_after_a_longer_one_by_one_shard_at_a_time() -> None:
    async def run() -> None:
        world = World()
        assert await world.passes(10) == 3
        world.rows_per_s = 1200.0
        assert await world.passes(4) == 3
        grown = await world.passes(4)
        assert grown > 3
        for number in range(3, grown):
            world.start(number)
        assert await world.passes(30) == grown  # Shards without work yet do not make the pool grow further.
        world.rows_per_s = 1.0
        assert await world.passes(59) == grown
        assert await world.passes(3) == grown - 1
        assert await world.passes(100) == grown - 1  # The size stays until the shard that should stop is gone.
        world.shards[-1] = replace(world.shards[-1], draining=True)
        assert await world.passes(65) == grown - 1
        del world.shards[-1]
        assert await world.passes(80) == grown - 2
        kinds = [decision["kind"] for decision in await world.registry.decisions(100)]
        assert kinds.count("scale") == 3

    asyncio.run(run())


def test_an_order_is_followed_at_once_and_until_it_is_lifted() -> None:
    async def run() -> None:
        world = World()
        await world.passes(10)
        order = StandingOrder(OrderKind.SCALE, "cpu", 5, "ada", world.now)
        await world.registry.give_order(order)
        assert await world.passes(1) == 5
        world.start(3)
        world.start(4)
        assert await world.passes(70) == 5  # The order holds although there is no load at all.
        await world.registry.lift_order(order)
        assert await world.passes(62) == 4

    asyncio.run(run())


def test_a_dead_shard_does_not_make_the_pool_smaller() -> None:
    async def run() -> None:
        world = World()
        await world.passes(10)
        del world.shards[0]
        assert await world.passes(70) == 3

    asyncio.run(run())


def test_the_next_leader_goes_on_from_what_was_decided() -> None:
    async def run() -> None:
        world = World()
        await world.passes(10)
        await world.registry.set_pool_size("cpu", PoolSize(5, world.now))  # The leader that chose 5 has died.
        world.now += 10.0
        world.lead()
        assert await world.passes(5) == 5
        assert world.reconciler.is_leader

    asyncio.run(run())


def test_without_the_lease_nothing_is_decided() -> None:
    async def run() -> None:
        world = World()
        await world.passes(10)
        world.now += 10.0
        await world.registry.acquire_lease("another")
        before = await world.registry.pool_size("cpu")
        await world.passes(2)
        assert await world.registry.pool_size("cpu") == before

    asyncio.run(run())


def test_a_shard_that_an_operator_emptied_holds_up_no_order_to_shrink() -> None:
    async def run() -> None:
        world = World(4)
        assert await world.passes(10) == 4
        await world.registry.give_order(StandingOrder(OrderKind.DRAIN, "s03", by="ada", at=world.now))
        assert await world.passes(20) == 4
        assert not world.hosts.held["s03"]
        await world.registry.give_order(StandingOrder(OrderKind.SCALE, "cpu", 3, "ada", world.now))
        assert await world.passes(2) == 3

    asyncio.run(run())
