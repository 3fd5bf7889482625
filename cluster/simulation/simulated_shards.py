"""The `SimShard` is a simulated shard, and `RemoteShards` carries a controller's orders to simulated shards."""

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
CONTROL_TIMEOUT_S = 2.0  # Seconds after which a controller gives up a call to a shard.

Held = tuple[int, int, str]  # The layer, the expert and the tier of a held expert.


class SimShard(SimProcess):
    """A `SimShard` holds experts within its budget and refuses the orders of a leader that has been replaced.

    - `load_s`: seconds to load one expert.
    - `is_fenced`: if False, the shard obeys any leader.
    """

    def __init__(self, record: Shard, layers: Sequence[LayerSpec], load_s: float, is_fenced: bool = True) -> None:
        super().__init__(record.id)
        self.base, self.load_s, self.is_fenced = record, load_s, is_fenced
        self.sizes = {spec.layer: spec.on_device(record.device) for spec in layers}
        self.held: set[Held] = set()
        self.epoch = self.fencing = 0
        self.is_draining = self.is_corrupt = False

    @property
    def used_bytes(self) -> int:
        """Return the bytes of device memory that the shard's experts take."""
        return sum(self.sizes[layer] for layer, _, tier in self.held if tier == DEVICE)

    @property
    def record(self) -> Shard:
        """Return the record that the shard's next heartbeat writes."""
        tiers = []
        for tier in (DEVICE, STANDBY):
            by_layer: dict[int, list[int]] = {}
            for layer, expert, held_tier in self.held:
                if held_tier == tier:
                    by_layer.setdefault(layer, []).append(expert)
            tiers.append(by_layer)
        fields = {name: getattr(self.base, name) for name in Shard.__dataclass_fields__}
        digest = held_digest(*tiers)
        return Shard(**{**fields, "held_digest": digest, "num_held": len(self.held), "draining": self.is_draining})

    def obey(self, order: LeaderOrder) -> None:
        """Record the epoch and the fencing token of `order`; raise ShardFailed if a newer fencing token is known."""
        if self.is_fenced and order.fencing < self.fencing:
            raise ShardFailed(f"token {order.fencing} is older than {self.fencing}")
        self.fencing, self.epoch = max(self.fencing, order.fencing), max(self.epoch, order.epoch)

    async def load(self, experts: set[Held], order: LeaderOrder) -> Mapping[int, int]:
        """Load `experts` into their tiers, and return a gain exponent for each layer.

        Raises ShardFailed if the order's leader has been replaced or if the experts exceed the memory budget.
        """
        self.obey(order)
        missing = sorted(experts - self.held)
        await asyncio.sleep(self.load_s * self.slowness * len(missing))
        num_bytes = sum(self.sizes[layer] for layer, _, tier in missing if tier == DEVICE)
        if self.used_bytes + num_bytes > self.base.memory_budget:
            raise ShardFailed(f"{num_bytes} bytes more are over the budget")
        if self.is_up:
            keys = {(layer, expert) for layer, expert, _ in experts}
            self.held = {held for held in self.held if held[:2] not in keys} | experts
        return {layer: 3 for layer, _, _ in experts}

    def drop(self, experts: set[Held], order: LeaderOrder) -> set[Held]:
        """Drop `experts`, and return the experts that the shard really held."""
        self.obey(order)
        dropped = self.held & experts
        self.held -= experts
        return dropped

    def has(self, layer: int, expert: int) -> bool:
        """Return True if the shard holds the expert in either tier."""
        return (layer, expert, DEVICE) in self.held or (layer, expert, STANDBY) in self.held


OnDrop = Callable[
    [SimShard, set[Held], str], None
]  # The callback receives the shard, the dropped experts and the controller's name.
BeforeDrop = Callable[
    [SimProcess, Experts], None
]  # The callback receives the controller and the experts that the controller orders a shard to drop.


class RemoteShards:
    """A `RemoteShards` carries one controller's orders to shards, over a network that loses and repeats messages.

    The class implements `ShardControl`. The callback `before_drop` is called before the controller orders a shard to
    drop experts. The callback `on_drop` is called after the shard has dropped experts.
    """

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
        """Start `work` as a task that goes on if the controller gives up or dies; errors of `work` are then ignored."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _do(self, target: SimShard, do: Callable[[SimShard], Awaitable[T]], delay_s: float = 0.0) -> T:
        if delay_s:
            await asyncio.sleep(delay_s)
        await target.wait_until_running()  # A message to a stopped process waits until the process goes on.
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
    tiers = ((DEVICE, device), (STANDBY, standby))
    return {(layer, id, tier) for tier, by_layer in tiers for layer, ids in by_layer.items() for id in ids}
