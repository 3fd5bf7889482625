"""The parts of a simulated fleet: network, store, shards and backbones that fail as real ones do.

They stand in for what has a socket or a device. What decides anything is the real code: planner, migration, controller,
follower, and the clients' state machine (`cluster.simulation.simulated_backbone`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from cluster.control.memory_registry import MemoryRegistry
from cluster.control.operator_orders import PoolSize, StandingOrder
from cluster.control.registry_store import Lease, StoreUnavailable
from cluster.control.shard_control import LeaderOrder, ShardFailed, WitnessFailed
from cluster.placement.migration import DEVICE, STANDBY, Holding
from cluster.topology import Experts, LayerSpec, Placement, Shard, held_digest

T = TypeVar("T")
EPOCH_OF_CLOCK = 1_800_000_000.0  # seconds since 1970 when a simulation begins
STORE_TIMEOUT_S = 1.0
CONTROL_TIMEOUT_S = 2.0
HEARTBEAT_S = 1.0
HOP_S = (0.0002, 0.004)

Held = tuple[int, int, str]  # layer, expert, tier


class Broken(AssertionError):
    """Something that must always hold did not."""


class SimProcess:
    """What can be killed, and stopped and resumed."""

    def __init__(self, name: str) -> None:
        self.name, self.is_up = name, True
        self.died_at = 0.0
        self.slowness = 1.0
        self._running = asyncio.Event()
        self._running.set()

    @property
    def is_stopped(self) -> bool:
        return not self._running.is_set()

    def stop(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    async def runs(self) -> None:
        """Returns when the process is not stopped."""
        if not self._running.is_set():
            await self._running.wait()


@dataclass
class SimNetwork:
    """Delays, loses and repeats messages; `cut` holds pairs of names that do not hear each other."""

    random: Random
    loss: float = 0.0
    repeats: float = 0.0
    cut: set[frozenset[str]] = field(default_factory=set)

    def hop_s(self) -> float:
        low, high = HOP_S
        return low + self.random.random() ** 3 * (high - low)

    def loses(self, source: str, target: str) -> bool:
        is_lost = self.loss > 0 and self.random.random() < self.loss
        return is_lost or (bool(self.cut) and frozenset((source, target)) in self.cut)

    def is_repeated(self) -> bool:
        return self.repeats > 0 and self.random.random() < self.repeats


class SimStore:
    """A Redis: what it holds, and whether it answers. Wiping it leaves an empty one."""

    def __init__(self, is_fenced: bool = True) -> None:
        self.is_fenced = is_fenced
        self.process = SimProcess("store")
        self.loads: Counter[tuple[int, int]] = Counter()  # wiping spares them, or nothing could be said of them
        self.on_publish: Callable[[Placement], None] = lambda _: None
        self.wipe()

    def wipe(self) -> None:
        self.registry = MemoryRegistry(now)
        self.was_wiped = True


def now() -> float:
    """Virtual seconds since 1970."""
    return EPOCH_OF_CLOCK + asyncio.get_running_loop().time()


class RemoteStore:
    """The store as one process reaches it: a `RegistryStore` whose calls take time, and fail before or after they were
    done."""

    def __init__(self, process: SimProcess, store: SimStore, network: SimNetwork) -> None:
        self._process, self._store, self._network = process, store, network

    async def _ask(self, do: Callable[[MemoryRegistry], Awaitable[T]]) -> T:
        await self._process.runs()
        if not self._process.is_up:
            raise StoreUnavailable("the process that asks is dead")
        await asyncio.sleep(self._network.hop_s())
        store = self._store.process
        if not store.is_up:
            raise StoreUnavailable("the store is down")
        if store.is_stopped or self._network.loses(self._process.name, "store"):
            await asyncio.sleep(STORE_TIMEOUT_S)
            raise StoreUnavailable("the store does not answer")
        result = await do(self._store.registry)  # the way back is part of the hop
        if self._network.loses(self._process.name, "store"):
            await asyncio.sleep(STORE_TIMEOUT_S)
            raise StoreUnavailable("the store's answer was lost")
        await self._process.runs()
        return result

    async def heartbeat(self, shard: Shard) -> None:
        await self._ask(lambda registry: registry.heartbeat(shard))

    async def remove(self, shard: Shard) -> None:
        await self._ask(lambda registry: registry.remove(shard))

    async def shards(self) -> list[Shard]:
        return await self._ask(lambda registry: registry.shards())

    async def epoch(self) -> int:
        return await self._ask(lambda registry: registry.epoch())

    async def placement(self) -> Placement | None:
        return await self._ask(lambda registry: registry.placement())

    async def publish(self, placement: Placement, expected_epoch: int, fencing: int) -> None:
        async def publish(registry: MemoryRegistry) -> None:
            token = fencing if self._store.is_fenced or not fencing else 1 << 62
            await registry.publish(placement, expected_epoch, token)
            self._store.on_publish(placement)

        await self._ask(publish)

    async def follow(self, follower: str, epoch: int) -> None:
        await self._ask(lambda registry: registry.follow(follower, epoch))

    async def unfollow(self, follower: str) -> None:
        await self._ask(lambda registry: registry.unfollow(follower))

    async def followers(self) -> dict[str, int]:
        return await self._ask(lambda registry: registry.followers())

    async def note_decision(self, decision: Mapping[str, str]) -> None:
        await self._ask(lambda registry: registry.note_decision(decision))

    async def decisions(self, count: int) -> list[dict[str, str]]:
        return await self._ask(lambda registry: registry.decisions(count))

    async def leader(self) -> str | None:
        return await self._ask(lambda registry: registry.leader())

    async def give_order(self, order: StandingOrder) -> None:
        await self._ask(lambda registry: registry.give_order(order))

    async def lift_order(self, order: StandingOrder) -> bool:
        return await self._ask(lambda registry: registry.lift_order(order))

    async def orders(self) -> dict[str, StandingOrder]:
        return await self._ask(lambda registry: registry.orders())

    async def set_pool_size(self, pool: str, wanted: PoolSize) -> None:
        await self._ask(lambda registry: registry.set_pool_size(pool, wanted))

    async def pool_size(self, pool: str) -> PoolSize | None:
        return await self._ask(lambda registry: registry.pool_size(pool))

    async def has_leader(self) -> bool:
        return await self._ask(lambda registry: registry.has_leader())

    async def checksums(self, weights: str, layer: int) -> dict[int, int]:
        return await self._ask(lambda registry: registry.checksums(weights, layer))

    async def note_checksums(self, weights: str, layer: int, seen: Mapping[int, int]) -> dict[int, int]:
        return await self._ask(lambda registry: registry.note_checksums(weights, layer, seen))

    async def acquire_lease(self, owner: str) -> Lease | None:
        return await self._ask(lambda registry: registry.acquire_lease(owner))

    async def renew_lease(self, lease: Lease) -> bool:
        return await self._ask(lambda registry: registry.renew_lease(lease))

    async def release_lease(self, lease: Lease) -> None:
        await self._ask(lambda registry: registry.release_lease(lease))

    async def add_loads(self, taken: Mapping[int, Any]) -> None:
        """Adds a backbone's counts, once even where the answer is lost."""

        async def add(_: MemoryRegistry) -> None:
            for layer, counts_E in taken.items():
                for expert in counts_E.nonzero()[0].tolist():
                    self._store.loads[layer, expert] += int(counts_E[expert])

        await self._ask(add)


class SimShard(SimProcess):
    """A generic host of experts, with a budget that it never exceeds and the newest leader that it has heard of."""

    def __init__(self, record: Shard, layers: Sequence[LayerSpec], load_s: float, is_fenced: bool = True) -> None:
        super().__init__(record.id)
        self.base, self.load_s, self.is_fenced = record, load_s, is_fenced
        self.sizes = {spec.layer: spec.expert_bytes for spec in layers}
        self.held: set[Held] = set()
        self.epoch = self.fencing = 0
        self.is_draining = self.is_corrupt = False

    @property
    def used_bytes(self) -> int:
        return sum(self.sizes[layer] for layer, _, tier in self.held if tier == DEVICE)

    @property
    def record(self) -> Shard:
        tiers = []
        for wanted in (DEVICE, STANDBY):
            by_layer: dict[int, list[int]] = {}
            for layer, expert, tier in self.held:
                if tier == wanted:
                    by_layer.setdefault(layer, []).append(expert)
            tiers.append(by_layer)
        fields = {name: getattr(self.base, name) for name in Shard.__dataclass_fields__}
        digest = held_digest(*tiers)
        return Shard(**{**fields, "held_digest": digest, "num_held": len(self.held), "draining": self.is_draining})

    def obey(self, order: LeaderOrder) -> None:
        """Raises ShardFailed for an order of a leader that has been replaced."""
        if self.is_fenced and order.fencing < self.fencing:
            raise ShardFailed(f"token {order.fencing} is older than {self.fencing}")
        self.fencing, self.epoch = max(self.fencing, order.fencing), max(self.epoch, order.epoch)

    async def load(self, wanted: set[Held], order: LeaderOrder) -> Mapping[int, int]:
        self.obey(order)
        missing = sorted(wanted - self.held)
        await asyncio.sleep(self.load_s * self.slowness * len(missing))
        num_bytes = sum(self.sizes[layer] for layer, _, tier in missing if tier == DEVICE)
        if self.used_bytes + num_bytes > self.base.memory_budget:
            raise ShardFailed(f"{num_bytes} bytes more are over the budget")
        if self.is_up:
            keys = {one[:2] for one in wanted}
            self.held = {one for one in self.held if one[:2] not in keys} | wanted
        return {layer: 3 for layer, _, _ in wanted}

    def drop(self, unwanted: set[Held], order: LeaderOrder) -> set[Held]:
        """Returns what it really held of them."""
        self.obey(order)
        dropped = self.held & unwanted
        self.held -= unwanted
        return dropped

    def has(self, layer: int, expert: int) -> bool:
        return (layer, expert, DEVICE) in self.held or (layer, expert, STANDBY) in self.held


OnDrop = Callable[[SimShard, set[Held], str], None]  # a shard, what it let go, who asked


class RemoteShards:
    """Shards as one controller reaches them: the controller's `ShardControl`, over a network that loses and repeats."""

    def __init__(
        self, process: SimProcess, fleet: Mapping[str, SimShard], network: SimNetwork, on_drop: OnDrop
    ) -> None:
        self._process, self._fleet, self._network, self._on_drop = process, fleet, network, on_drop
        self.before_drop: Callable[[SimProcess, Experts], None] = lambda *_: None

    async def _ask(self, shard: Shard, do: Callable[[SimShard], Awaitable[T]]) -> T:
        await self._process.runs()
        target = self._fleet.get(shard.id)
        await asyncio.sleep(self._network.hop_s())
        if target is None or not target.is_up or target.base.incarnation != shard.incarnation:
            raise ShardFailed(f"{shard.id} is gone")
        if self._network.loses(self._process.name, shard.id):
            await asyncio.sleep(CONTROL_TIMEOUT_S)
            raise ShardFailed(f"{shard.id} does not answer")
        job = self._start(self._do(target, do))
        if self._network.is_repeated():
            self._start(self._do(target, do, 3 * self._network.hop_s()))
        done, _ = await asyncio.wait([job], timeout=CONTROL_TIMEOUT_S)
        if not done or self._network.loses(shard.id, self._process.name):
            raise ShardFailed(f"{shard.id} does not answer")
        await self._process.runs()
        return job.result()

    @staticmethod
    def _start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Goes on whatever becomes of the one who asked, who may not be there to hear of an error."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _do(self, target: SimShard, do: Callable[[SimShard], Awaitable[T]], delay_s: float = 0.0) -> T:
        if delay_s:
            await asyncio.sleep(delay_s)
        await target.runs()  # what reached a stopped process is done when it goes on
        if not target.is_up:
            raise ShardFailed(f"{target.name} is gone")
        result = await do(target)
        if not target.is_up:
            raise ShardFailed(f"{target.name} is gone")
        return result

    async def holding(self, shard: Shard) -> Holding:
        async def ask(target: SimShard) -> Holding:
            return Holding(frozenset(target.held), target.used_bytes)

        return await self._ask(shard, ask)

    async def load(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> Mapping[int, int]:
        return await self._ask(shard, lambda target: target.load(_flat(device, standby), order))

    async def drop(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> None:
        self.before_drop(self._process, device)

        async def drop(target: SimShard) -> None:
            dropped = target.drop(_flat(device, standby), order)
            self._on_drop(target, dropped, self._process.name)

        await self._ask(shard, drop)

    async def disagreements(self, old: Shard, new: Shard, experts: Experts) -> dict[int, list[int]]:
        async def ask(target: SimShard) -> None:
            if any(not target.has(layer, expert) for layer, own in experts.items() for expert in own):
                raise ShardFailed(f"{target.name} does not hold all of them")

        try:
            await self._ask(old, ask)
        except ShardFailed as error:
            raise WitnessFailed(str(error)) from error
        await self._ask(new, ask)
        return {}


def _flat(device: Experts, standby: Experts) -> set[Held]:
    both = ((DEVICE, device), (STANDBY, standby))
    return {(layer, expert, tier) for tier, by in both for layer, experts in by.items() for expert in experts}
