"""The parts of a simulated fleet: network, store, shards and backbones that fail as real ones do.

They stand in for what has a socket or a device. What decides anything is the real code: planner, migration, controller,
follower, and the clients' state machine.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, TypeVar

import numpy as np

from cluster.call_policy import CallPolicy
from cluster.calls import Ask, LayerCall, Refusal
from cluster.fleet import Fleet, FleetView
from cluster.follower import Follower
from cluster.health import Link, ShardHealth, Timing
from cluster.load import LoadCounter
from cluster.memory_registry import MemoryRegistry
from cluster.migration import DEVICE, STANDBY, Holding
from cluster.orders import StandingOrder
from cluster.reconciler import Order, ShardFailed
from cluster.registry import Lease, StoreUnavailable
from cluster.topology import Experts, LayerSpec, Placement, Shard, held_digest

T = TypeVar("T")
EPOCH_OF_CLOCK = 1_800_000_000.0  # seconds since 1970 when a simulation begins
STORE_TIMEOUT_S = 1.0
CONTROL_TIMEOUT_S = 2.0
HEARTBEAT_S = 1.0
REFRESH_S = 0.5
HOP_S = (0.0002, 0.004)

Held = tuple[int, int, str]  # layer, expert, tier


class Broken(AssertionError):
    """Something that must always hold did not."""


class Process:
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
class Network:
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


class Store:
    """A Redis: what it holds, and whether it answers. Wiping it leaves an empty one."""

    def __init__(self, is_fenced: bool = True) -> None:
        self.is_fenced = is_fenced
        self.process = Process("store")
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

    def __init__(self, process: Process, store: Store, network: Network) -> None:
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

    async def scale_targets(self) -> dict[str, int]:
        return await self._ask(lambda registry: registry.scale_targets())

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


class SimShard(Process):
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

    def obey(self, order: Order) -> None:
        """Raises ShardFailed for an order of a leader that has been replaced."""
        if self.is_fenced and order.fencing < self.fencing:
            raise ShardFailed(f"token {order.fencing} is older than {self.fencing}")
        self.fencing, self.epoch = max(self.fencing, order.fencing), max(self.epoch, order.epoch)

    async def load(self, wanted: set[Held], order: Order) -> Mapping[int, int]:
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

    def drop(self, unwanted: set[Held], order: Order) -> set[Held]:
        """Returns what it really held of them."""
        self.obey(order)
        dropped = self.held & unwanted
        self.held -= unwanted
        return dropped

    def has(self, layer: int, expert: int) -> bool:
        return (layer, expert, DEVICE) in self.held or (layer, expert, STANDBY) in self.held


OnDrop = Callable[[SimShard, set[Held], str], None]  # a shard, what it let go, who asked


class RemoteShards:
    """Shards as one controller reaches them: the controller's `Shards`, over a network that loses and repeats."""

    def __init__(self, process: Process, fleet: Mapping[str, SimShard], network: Network, on_drop: OnDrop) -> None:
        self._process, self._fleet, self._network, self._on_drop = process, fleet, network, on_drop
        self.before_drop: Callable[[Process, Experts], None] = lambda *_: None

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

    async def load(self, shard: Shard, device: Experts, standby: Experts, order: Order) -> Mapping[int, int]:
        return await self._ask(shard, lambda target: target.load(_flat(device, standby), order))

    async def drop(self, shard: Shard, device: Experts, standby: Experts, order: Order) -> None:
        self.before_drop(self._process, device)

        async def drop(target: SimShard) -> None:
            dropped = target.drop(_flat(device, standby), order)
            self._on_drop(target, dropped, self._process.name)

        await self._ask(shard, drop)

    async def disagreements(self, old: Shard, new: Shard, experts: Experts) -> dict[int, list[int]]:
        async def ask(target: SimShard) -> None:
            if any(not target.has(layer, expert) for layer, own in experts.items() for expert in own):
                raise ShardFailed(f"{target.name} does not hold all of them")

        await self._ask(old, ask)
        await self._ask(new, ask)
        return {}


def _flat(device: Experts, standby: Experts) -> set[Held]:
    both = ((DEVICE, device), (STANDBY, standby))
    return {(layer, expert, tier) for tier, by in both for layer, experts in by.items() for expert in experts}


class SimBackbone(Process):
    """A backbone without a model: it follows the placement, makes calls, and checks that each pick counts once."""

    def __init__(
        self,
        name: str,
        model: str,
        layers: Sequence[LayerSpec],
        shards: Mapping[str, SimShard],
        store: Store,
        network: Network,
        rng: Random,
    ) -> None:
        super().__init__(name)
        self.layers, self.shards, self.network, self.random = layers, shards, network, rng
        self.store = RemoteStore(self, store, network)
        self.follower = Follower(name, model, self.store, self._adopt)
        self.fleet = Fleet(CallPolicy(), {spec.layer: spec.expert_bytes / 2**20 for spec in layers})
        self.counter = LoadCounter({spec.layer: spec.num_experts for spec in layers})
        self.num_counted = self.num_in_flight = 0
        self.slowest_call_s = 0.0
        self.num_calls = self.num_done = 0
        self._healths: dict[tuple[str, str], ShardHealth] = {}
        self._under_way: dict[int, tuple[LayerCall, SimShard, list[int]]] = {}
        self._answers: dict[LayerCall, dict[int, list[int]]] = {}
        self._counts: dict[LayerCall, Counter[int]] = {}

    async def run(self) -> None:
        tasks = [asyncio.ensure_future(work) for work in (self._flush(), self._ask_experts())]
        try:
            while True:
                await self.runs()
                with suppress(StoreUnavailable):
                    await self.follower.refresh()
                await asyncio.sleep(REFRESH_S)
        finally:
            for task in tasks:
                task.cancel()

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            await self.runs()
            taken = self.counter.take()
            self.num_in_flight = sum(int(counts.sum()) for counts in taken.values())
            try:
                await self.store.add_loads(taken)
                self.counter.sent()
            except StoreUnavailable:
                self.counter.merge(taken)
            self.num_in_flight = 0

    # Calls

    def _adopt(self, placement: Placement, shards: Iterable[Shard]) -> None:
        epoch = self.fleet.view.placement.epoch if self.fleet.view else 0
        if placement.epoch < epoch:
            raise Broken(f"{self.name} went from epoch {epoch} back to {placement.epoch}")
        known = {shard.id: shard for shard in shards}
        healths = {}
        for id in placement.shard_ids:
            if id in known:
                key = id, known[id].incarnation
                if key not in self._healths:
                    self._healths[key] = ShardHealth(id, self.fleet.policy)
                    self._connect(self._healths[key])
                healths[id] = self._healths[key]
        paces = {id: shard.pace for id, shard in known.items()}
        draining = [id for id, shard in known.items() if shard.draining]
        self.fleet.adopt(FleetView(placement, healths, paces, draining, self.fleet.view), self._now)
        self._changed()

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _connect(self, health: ShardHealth) -> None:
        def settle() -> None:
            shard = self.shards.get(health.shard_id)
            health.link = Link.UP if shard is not None and shard.is_up else Link.DOWN
            self.fleet.is_changed = True
            self._changed()

        asyncio.get_running_loop().call_later(self.network.hop_s(), settle)

    def lose(self, shard: SimShard) -> None:
        """The connection to a shard breaks; a shard that lives is connected to again."""
        for (id, _), health in self._healths.items():
            if id == shard.name:
                health.link = Link.DOWN
                self.fleet.is_changed = True
                self._connect(health)
        for request_id in [id for id, (_, asked, _) in self._under_way.items() if asked is shard]:
            call, _, _ = self._under_way.pop(request_id)
            self._take(call, call.on_lost(request_id, self._now))

    def _changed(self) -> None:
        for call in list(self._counts):
            self._take(call, call.on_change(self._now))

    async def _ask_experts(self) -> None:
        while True:
            await asyncio.sleep(0.1 + 0.5 * self.random.random())
            await self.runs()
            if self.fleet.view is not None:
                self._start(self.random.choice(self.layers))

    def _start(self, spec: LayerSpec) -> None:
        num_rows = self.random.randint(1, 3)
        rows = [self._pick(spec) for _ in range(num_rows)]
        expert_P = np.array(list(itertools.chain(*rows)), np.int64)
        self.counter.add(spec.layer, expert_P)
        self.num_counted += len(expert_P)
        call = LayerCall(self.fleet, spec.layer, expert_P, spec.top_k, 64, self._now)
        self._counts[call], self._answers[call] = Counter(), {}
        self.num_calls += 1
        self._take(call, call.start(self._now))

    def _pick(self, spec: LayerSpec) -> list[int]:
        """The experts of one row; low numbers are popular."""
        picked: list[int] = []
        while len(picked) < spec.top_k:
            expert = int(spec.num_experts * self.random.random() ** 3)
            if expert not in picked:
                picked.append(expert)
        return picked

    def _take(self, call: LayerCall, asks: list[Ask]) -> None:
        for ask in asks:
            self._send(call, ask)
        if call not in self._counts:
            return
        if call.is_done:
            self._finish(call)
        else:
            asyncio.get_running_loop().call_at(max(call.wake_at, self._now + 0.001), self._tick, call)

    def _tick(self, call: LayerCall) -> None:
        if call in self._counts and call.wake_at <= self._now and not self.is_stopped:
            self._take(call, call.on_tick(self._now))
        elif call in self._counts and self.is_stopped:
            asyncio.get_running_loop().call_later(0.2, self._tick, call)

    def _send(self, call: LayerCall, ask: Ask) -> None:
        shard = self.shards.get(ask.shard_id)
        if shard is None or not shard.is_up:
            asyncio.get_running_loop().call_soon(self._lost, call, ask.id)
            return
        self._under_way[ask.id] = call, shard, ask.picks.tolist()
        self._transmit(shard, partial(self._arrive, call, ask, shard))

    def _transmit(self, shard: SimShard, deliver: Callable[[], None], after_s: float = 0.0) -> None:
        """As TCP does: what is lost is sent again until it arrives, or the connection breaks."""
        network, loop = self.network, asyncio.get_running_loop()
        if frozenset((self.name, shard.name)) in network.cut:
            loop.call_later(0.2, self._transmit, shard, deliver, after_s)
        elif not network.loses(self.name, shard.name):
            loop.call_later(after_s + network.hop_s(), deliver)
        elif self.random.random() < 0.5:
            loop.call_later(after_s + self.random.uniform(0.2, 2.0), deliver)
        else:
            loop.call_later(network.hop_s(), self.lose, shard)

    def _lost(self, call: LayerCall, request_id: int) -> None:
        self._under_way.pop(request_id, None)
        self._take(call, call.on_lost(request_id, self._now))

    def _arrive(self, call: LayerCall, ask: Ask, shard: SimShard) -> None:
        """At the shard. A stopped one leaves it in its socket until it goes on."""
        if shard.is_stopped:
            asyncio.get_running_loop().call_later(0.1, self._arrive, call, ask, shard)
            return
        if not shard.is_up:
            return  # which breaks the connection
        compute_s = 0.0005 * shard.slowness
        experts = {int(call.expert_P[pick]) for pick in ask.picks}
        missing = [expert for expert in sorted(experts) if not shard.has(call.layer, expert)]
        self._reply(call, ask, shard, missing, compute_s)
        if self.network.is_repeated():
            self._reply(call, ask, shard, missing, compute_s)

    def _reply(self, call: LayerCall, ask: Ask, shard: SimShard, missing: list[int], compute_s: float) -> None:
        self._transmit(shard, partial(self._on_reply, call, ask, shard, missing, compute_s), compute_s)

    def _on_reply(self, call: LayerCall, ask: Ask, shard: SimShard, missing: list[int], compute_s: float) -> None:
        if self.is_stopped:
            asyncio.get_running_loop().call_later(0.1, self._on_reply, call, ask, shard, missing, compute_s)
            return
        if self._under_way.pop(ask.id, None) is None and not self.network.repeats:
            return  # the connection had broken by then
        if missing:
            code = Refusal.STALE_EPOCH if self.follower.epoch < shard.epoch else Refusal.NOT_HOSTED
            self._take(call, call.on_refusal(ask.id, code, f"{missing} are not here", self._now))
            return
        if shard.is_corrupt and self.random.random() < 0.5:
            self._take(call, call.on_corrupt(ask.id, "the checksum is wrong", self._now))
            return
        if call in self._answers and ask.id not in self._answers[call]:
            self._answers[call][ask.id] = ask.picks.tolist()
        for counted in call.on_reply(ask.id, Timing(0, round(1e6 * compute_s), 0), self._now):
            if call in self._counts:
                self._counts[call].update(self._answers[call][counted])
        self._take(call, [])

    def _finish(self, call: LayerCall) -> None:
        counts = self._counts.pop(call)
        self._answers.pop(call)
        if call.failure is not None:
            raise Broken(f"{self.name}: {call.failure}")
        if counts != Counter(range(len(call.expert_P))):
            raise Broken(
                f"{self.name} combined picks {dict(counts)} of {len(call.expert_P)}, each of which counts once"
            )
        self.num_done += 1
        self.slowest_call_s = max(self.slowest_call_s, self._now - call.started_at)

    @property
    def open_calls(self) -> list[LayerCall]:
        return list(self._counts)
