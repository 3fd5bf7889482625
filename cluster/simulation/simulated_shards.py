"""The shards of a simulated fleet, and how a controller reaches them over the network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from cluster.control.shard_control import LeaderOrder, ShardFailed, WitnessFailed
from cluster.placement.migration import DEVICE, STANDBY, Holding
from cluster.simulation.simulated_network import SimNetwork
from cluster.simulation.simulated_process import SimProcess
from cluster.topology import Experts, LayerSpec, Shard, held_digest

T = TypeVar("T")
CONTROL_TIMEOUT_S = 2.0

Held = tuple[int, int, str]  # layer, expert, tier


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


OnDrop = Callable[[SimShard, set[Held], str], None]  # Gets the shard, what it has dropped, and who asked for it.
BeforeDrop = Callable[[SimProcess, Experts], None]  # Gets the controller that asks, and the experts to drop.


class RemoteShards:
    """Shards as one controller reaches them: the controller's `ShardControl`, over a network that loses and repeats."""

    def __init__(
        self, process: SimProcess, fleet: Mapping[str, SimShard], network: SimNetwork, on_drop: OnDrop
    ) -> None:
        self._process, self._fleet, self._network, self._on_drop = process, fleet, network, on_drop
        self.before_drop: BeforeDrop = lambda *_: None

    async def _call(self, shard: Shard, do: Callable[[SimShard], Awaitable[T]]) -> T:
        await self._process.wait_until_running()
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
        await self._process.wait_until_running()
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
        await target.wait_until_running()  # what reached a stopped process is done when it goes on
        if not target.is_up:
            raise ShardFailed(f"{target.name} is gone")
        result = await do(target)
        if not target.is_up:
            raise ShardFailed(f"{target.name} is gone")
        return result

    async def holding(self, shard: Shard) -> Holding:
        async def ask(target: SimShard) -> Holding:
            return Holding(frozenset(target.held), target.used_bytes)

        return await self._call(shard, ask)

    async def load(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> Mapping[int, int]:
        return await self._call(shard, lambda target: target.load(_flat(device, standby), order))

    async def drop(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> None:
        self.before_drop(self._process, device)

        async def drop(target: SimShard) -> None:
            dropped = target.drop(_flat(device, standby), order)
            self._on_drop(target, dropped, self._process.name)

        await self._call(shard, drop)

    async def disagreements(self, old: Shard, new: Shard, experts: Experts) -> dict[int, list[int]]:
        async def ask(target: SimShard) -> None:
            if any(not target.has(layer, expert) for layer, own in experts.items() for expert in own):
                raise ShardFailed(f"{target.name} does not hold all of them")

        try:
            await self._call(old, ask)
        except ShardFailed as error:
            raise WitnessFailed(str(error)) from error
        await self._call(new, ask)
        return {}


def _flat(device: Experts, standby: Experts) -> set[Held]:
    both = ((DEVICE, device), (STANDBY, standby))
    return {(layer, expert, tier) for tier, by in both for layer, experts in by.items() for expert in experts}
