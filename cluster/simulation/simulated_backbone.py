"""The `SimBackbone` is a backbone without a model; its layer calls use simulated connections, which may break."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from random import Random

import numpy as np

from cluster.control.follower import Follower
from cluster.control.registry_store import StoreUnavailable
from cluster.dispatch.call_policy import CallPolicy
from cluster.dispatch.fleet_view import FleetView, ShardFleet
from cluster.dispatch.layer_call import LayerCall
from cluster.dispatch.shard_health import LinkState, ReplyTiming, ShardHealth
from cluster.dispatch.shard_request import RefusalCode, ShardRequest
from cluster.load import LoadCounter
from cluster.simulation.simulated_network import SimNetwork
from cluster.simulation.simulated_process import InvariantViolated, SimProcess
from cluster.simulation.simulated_shards import SimShard
from cluster.simulation.simulated_store import RemoteStore, SimStore
from cluster.topology import LayerSpec, Placement, Shard

REFRESH_S = 0.5  # Seconds between readings of the placement.


class SimBackbone(SimProcess):
    """A `SimBackbone` follows the placement, makes layer calls, and checks that each pick counts exactly once.

    The classes `Follower` and `LayerCall` are the real classes; only the messages are simulated.
    """

    def __init__(
        self,
        name: str,
        model: str,
        layers: Sequence[LayerSpec],
        shards: Mapping[str, SimShard],
        store: SimStore,
        network: SimNetwork,
        rng: Random,
    ) -> None:
        super().__init__(name)
        self.layers, self.shards, self.network, self.random = layers, shards, network, rng
        self.store = RemoteStore(self, store, network)
        self.follower = Follower(name, model, self.store, self._adopt)
        self.fleet = ShardFleet(CallPolicy(), {spec.layer: spec.expert_bytes / 2**20 for spec in layers})
        self.counter = LoadCounter({spec.layer: spec.num_experts for spec in layers})
        self.num_counted = self.num_in_flight = 0
        self.slowest_call_s = 0.0
        self.num_calls = 0
        self._healths: dict[tuple[str, str], ShardHealth] = {}  # Each shard's health, by id and incarnation.
        self._in_flight: dict[int, tuple[LayerCall, SimShard]] = {}  # By request id, until the reply.
        # For each call, the picks of each request that has a reply, by request id.
        self._replied: dict[LayerCall, dict[int, list[int]]] = {}
        self._counts: dict[LayerCall, Counter[int]] = {}  # How often each pick of an open call has been summed.

    async def run(self) -> None:
        """Follow the placement, make layer calls and send the counts of picks until cancelled."""
        tasks = [asyncio.ensure_future(work) for work in (self._send_counts(), self._make_calls())]
        try:
            while True:
                await self.wait_until_running()
                with suppress(StoreUnavailable):
                    await self.follower.refresh()
                await asyncio.sleep(REFRESH_S)
        finally:
            for task in tasks:
                task.cancel()

    async def _send_counts(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            await self.wait_until_running()
            taken = self.counter.take()
            self.num_in_flight = sum(int(counts.sum()) for counts in taken.values())
            try:
                await self.store.add_loads(taken)
                self.counter.mark_sent()
            except StoreUnavailable:
                self.counter.merge(taken)
            self.num_in_flight = 0

    # Calls

    def _adopt(self, placement: Placement, shards: Iterable[Shard]) -> None:
        epoch = self.fleet.view.placement.epoch if self.fleet.view else 0
        if placement.epoch < epoch:
            raise InvariantViolated(f"{self.name} went from epoch {epoch} back to {placement.epoch}")
        known = {shard.id: shard for shard in shards}
        healths = {}
        for id in placement.shard_ids:
            if id in known:
                key = id, known[id].incarnation
                if key not in self._healths:
                    self._healths[key] = ShardHealth(id, self.fleet.policy)
                    self._connect(self._healths[key])
                healths[id] = self._healths[key]
        cost_models = {id: shard.cost_model for id, shard in known.items()}
        draining = [id for id, shard in known.items() if shard.draining]
        self.fleet.adopt(FleetView(placement, healths, cost_models, draining, self.fleet.view), self._now)
        self._notify_calls()

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _connect(self, health: ShardHealth) -> None:
        def settle() -> None:
            shard = self.shards.get(health.shard_id)
            health.link = LinkState.UP if shard is not None and shard.is_up else LinkState.DOWN
            self.fleet.is_changed = True
            self._notify_calls()

        asyncio.get_running_loop().call_later(self.network.hop_s(), settle)

    def lose(self, shard: SimShard) -> None:
        """Break the connection to a shard; the backbone connects again if the shard is alive."""
        for (id, _), health in self._healths.items():
            if id == shard.name:
                health.link = LinkState.DOWN
                self.fleet.is_changed = True
                self._connect(health)
        for request_id in [id for id, (_, target) in self._in_flight.items() if target is shard]:
            call, _ = self._in_flight.pop(request_id)
            self._advance(call, call.on_lost(request_id, self._now))

    def _notify_calls(self) -> None:
        for call in list(self._counts):
            self._advance(call, call.on_change(self._now))

    async def _make_calls(self) -> None:
        while True:
            await asyncio.sleep(0.1 + 0.5 * self.random.random())
            await self.wait_until_running()
            if self.fleet.view is not None:
                self._start(self.random.choice(self.layers))

    def _start(self, spec: LayerSpec) -> None:
        num_rows = self.random.randint(1, 3)
        rows = [self._pick(spec) for _ in range(num_rows)]
        expert_P = np.array(list(itertools.chain(*rows)), np.int64)
        self.counter.add(spec.layer, expert_P)
        self.num_counted += len(expert_P)
        call = LayerCall(self.fleet, spec.layer, expert_P, spec.top_k, 64, self._now)
        self._counts[call], self._replied[call] = Counter(), {}
        self.num_calls += 1
        self._advance(call, call.start(self._now))

    def _pick(self, spec: LayerSpec) -> list[int]:
        """Draw the experts of one row; experts with low numbers are popular."""
        picked: list[int] = []
        while len(picked) < spec.top_k:
            expert = int(spec.num_experts * self.random.random() ** 3)
            if expert not in picked:
                picked.append(expert)
        return picked

    def _advance(self, call: LayerCall, requests: list[ShardRequest]) -> None:
        """Send the call's new requests, and end the call if it is done.

        If the call is not done, a timer continues the call at `call.wake_at`.
        """
        for request in requests:
            self._send(call, request)
        if call not in self._counts:
            return
        if call.is_done:
            self._finish(call)
        else:
            asyncio.get_running_loop().call_at(max(call.wake_at, self._now + 0.001), self._tick, call)

    def _tick(self, call: LayerCall) -> None:
        if call in self._counts and call.wake_at <= self._now and not self.is_stopped:
            self._advance(call, call.on_tick(self._now))
        elif call in self._counts and self.is_stopped:
            asyncio.get_running_loop().call_later(0.2, self._tick, call)

    def _send(self, call: LayerCall, request: ShardRequest) -> None:
        shard = self.shards.get(request.shard_id)
        if shard is None or not shard.is_up:
            asyncio.get_running_loop().call_soon(self._on_lost, call, request.id)
            return
        self._in_flight[request.id] = call, shard
        self._transmit(shard, partial(self._arrive, call, request, shard))

    def _transmit(self, shard: SimShard, deliver: Callable[[], None], after_s: float = 0.0) -> None:
        """Deliver a message to or from `shard` as TCP does: a lost message arrives late, or the connection breaks."""
        network, loop = self.network, asyncio.get_running_loop()
        if frozenset((self.name, shard.name)) in network.cut:
            loop.call_later(0.2, self._transmit, shard, deliver, after_s)
        elif not network.loses(self.name, shard.name):
            loop.call_later(after_s + network.hop_s(), deliver)
        elif self.random.random() < 0.5:
            loop.call_later(after_s + self.random.uniform(0.2, 2.0), deliver)
        else:
            loop.call_later(network.hop_s(), self.lose, shard)

    def _on_lost(self, call: LayerCall, request_id: int) -> None:
        self._in_flight.pop(request_id, None)
        self._advance(call, call.on_lost(request_id, self._now))

    def _arrive(self, call: LayerCall, request: ShardRequest, shard: SimShard) -> None:
        """Make the shard answer a request that has arrived; a stopped shard answers after it has resumed."""
        if shard.is_stopped:
            asyncio.get_running_loop().call_later(0.1, self._arrive, call, request, shard)
            return
        if not shard.is_up:
            return  # Killing the shard has broken the connection already.
        compute_s = 0.0005 * shard.slowness
        experts = {int(call.expert_P[pick]) for pick in request.picks}
        missing = [expert for expert in sorted(experts) if not shard.has(call.layer, expert)]
        self._reply(call, request, shard, missing, compute_s)
        if self.network.is_repeated():
            self._reply(call, request, shard, missing, compute_s)

    def _reply(
        self, call: LayerCall, request: ShardRequest, shard: SimShard, missing: list[int], compute_s: float
    ) -> None:
        self._transmit(shard, partial(self._on_reply, call, request, shard, missing, compute_s), compute_s)

    def _on_reply(
        self, call: LayerCall, request: ShardRequest, shard: SimShard, missing: list[int], compute_s: float
    ) -> None:
        if self.is_stopped:
            asyncio.get_running_loop().call_later(0.1, self._on_reply, call, request, shard, missing, compute_s)
            return
        if self._in_flight.pop(request.id, None) is None and not self.network.repeats:
            return  # The connection had broken before the reply came.
        if missing:
            code = RefusalCode.STALE_EPOCH if self.follower.epoch < shard.epoch else RefusalCode.NOT_HOSTED
            self._advance(call, call.on_refusal(request.id, code, f"{missing} are not here", self._now))
            return
        if shard.is_corrupt and self.random.random() < 0.5:
            self._advance(call, call.on_corrupt(request.id, "the checksum is wrong", self._now))
            return
        if call in self._replied and request.id not in self._replied[call]:
            self._replied[call][request.id] = request.picks.tolist()
        for counted in call.on_reply(request.id, ReplyTiming(0, round(1e6 * compute_s), 0), self._now):
            if call in self._counts:
                self._counts[call].update(self._replied[call][counted])
        self._advance(call, [])

    def _finish(self, call: LayerCall) -> None:
        counts = self._counts.pop(call)
        self._replied.pop(call)
        if call.failure is not None:
            raise InvariantViolated(f"{self.name}: {call.failure}")
        if counts != Counter(range(len(call.expert_P))):
            raise InvariantViolated(
                f"{self.name} combined picks {dict(counts)} of {len(call.expert_P)}, each of which counts once"
            )
        self.slowest_call_s = max(self.slowest_call_s, self._now - call.started_at)

    @property
    def open_calls(self) -> list[LayerCall]:
        """Return the layer calls that have not ended."""
        return list(self._counts)
