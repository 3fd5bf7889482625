"""These tests stop a shard. It must serve until its experts have moved, or until no process can move the experts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import torch

from cluster.control.memory_registry import MemoryRegistry
from cluster.topology import Homes, Placement, Shard
from model.blocks.expert_bank import LocalExperts
from model.family import ModelFamily
from services.expert import control_client, drain
from services.expert.client import RemoteExperts
from services.expert.drain import ABANDONED_S, CUT_OFF_S, QUIET_S, DrainState, DrainTimes, drain_state, may_stop
from services.expert.shard import ExpertShard, ShardConfig
from tests.cluster.fleet import make_shard
from tests.services.expert.checkpoint import LAYERS, NUM_EXPERTS
from tests.services.expert.requests import make_request
from tests.services.expert.serving import run, stream_to
from tests.services.expert.test_client import make_rows

PLACED = Placement(3, {1: (("s00", "s01"),)}, {1: 0})
DRAINING, OTHER = make_shard(0, draining=True), make_shard(1)


@pytest.mark.parametrize(
    ("placement", "shards", "has_leader", "expected"),
    [
        (None, [DRAINING, OTHER], True, DrainState.NEVER_PLACED),
        (replace(PLACED, homes={1: (("s01",),)}), [DRAINING, OTHER], True, DrainState.MOVED),
        (
            replace(PLACED, homes={1: (("s01",),)}, standby={1: (("s00",),)}),
            [DRAINING, OTHER],
            True,
            DrainState.WAITING,
        ),
        (PLACED, [DRAINING, OTHER], True, DrainState.WAITING),
        (PLACED, [DRAINING, OTHER], False, DrainState.ABANDONED),
        (PLACED, [DRAINING], True, DrainState.ALONE),
        (PLACED, [DRAINING, replace(OTHER, draining=True)], True, DrainState.ALONE),
        (PLACED, [], True, DrainState.ALONE),
    ],
)
def test_the_outlook(placement: Placement | None, shards: list[Shard], has_leader: bool, expected: DrainState) -> None:
    assert drain_state("s00", placement, shards, has_leader) is expected


def test_it_goes_when_nobody_calls_any_more_or_nobody_moves_anything() -> None:
    forever = DrainTimes(1e9, 1e9)
    assert not may_stop(DrainState.WAITING, forever)
    assert not may_stop(DrainState.MOVED, DrainTimes(QUIET_S / 2, 1e9))
    assert may_stop(DrainState.MOVED, DrainTimes(QUIET_S, 0))
    assert not may_stop(DrainState.ABANDONED, DrainTimes(1e9, ABANDONED_S / 2))
    assert may_stop(DrainState.ABANDONED, DrainTimes(0, ABANDONED_S))
    assert not may_stop(DrainState.CUT_OFF, DrainTimes(1e9, CUT_OFF_S / 2))
    assert may_stop(DrainState.CUT_OFF, DrainTimes(0, CUT_OFF_S))
    assert may_stop(DrainState.ALONE, DrainTimes(0, 0))
    assert may_stop(DrainState.NEVER_PLACED, DrainTimes(0, 0))


def homes_on(*ids: str) -> dict[int, Homes]:
    """Return homes by layer. Expert e has the homes `ids[e]` and `ids[e + 1]`; both indices are modulo `len(ids)`."""
    return {layer: tuple((ids[e % len(ids)], ids[(e + 1) % len(ids)]) for e in range(NUM_EXPERTS)) for layer in LAYERS}


@asynccontextmanager
async def fleet(
    family: ModelFamily, registry: MemoryRegistry, move_timeout_s: float
) -> AsyncIterator[dict[str, ExpertShard]]:
    """Serve three shards that hold experts; at the end, stop all three shards at the same time."""
    configs = [ShardConfig(f"s{i}", 1 << 30, move_timeout_s=move_timeout_s) for i in range(3)]
    shards = {config.shard_id: ExpertShard(config, family, registry) for config in configs}
    async with AsyncExitStack() as stack:
        for shard in shards.values():
            await shard.start()
        stack.push_async_callback(lambda: asyncio.gather(*(shard.stop() for shard in shards.values())))
        await registry.publish(await control_client.fill(await registry.shards(), homes_on(*shards), 1), 0, 0)
        yield shards


class Client:
    """A `Client` makes layer calls without pauses on its own thread. It follows the placement as a backbone does."""

    def __init__(self, registry: MemoryRegistry, local: LocalExperts) -> None:
        self.registry, self.local, self.remote = registry, local, RemoteExperts()
        self.num_right = self.num_wrong = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._call_on_and_on)

    def _call_on_and_on(self) -> None:
        while not self._is_over.is_set():
            rows = make_rows(3, seed=self.num_right)
            for layer in LAYERS:
                is_right = torch.equal(self.remote(layer, *rows)(), self.local(layer, *rows)())
                self.num_right, self.num_wrong = self.num_right + is_right, self.num_wrong + (not is_right)

    async def _follow(self) -> None:
        while True:
            placement = await self.registry.placement()
            assert placement is not None
            self.remote.update(placement, await self.registry.shards())
            await asyncio.sleep(0.1)

    async def __aenter__(self) -> Client:
        self._following = asyncio.create_task(self._follow())
        await asyncio.sleep(0.3)
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over.set()
        await asyncio.to_thread(self._thread.join)
        self._following.cancel()
        await asyncio.to_thread(self.remote.close)


def test_a_shard_leaves_under_calls_and_refuses_none(family: ModelFamily) -> None:
    async def test() -> None:
        registry = MemoryRegistry(time.monotonic, lease_ttl_s=60.0)
        await registry.acquire_lease("controller")
        local = family.load_local_experts(torch.float32)
        async with fleet(family, registry, 20.0) as shards, Client(registry, local) as client:
            leaving = asyncio.create_task(shards["s0"].stop())
            while not (await registry.shards())[0].draining:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            assert not leaving.done()
            async with stream_to(shards["s0"]) as stream:  # the shard serves clients that do not know of the drain
                await stream.write(make_request((0, 2), id=1))
                assert (await stream.read()).HasField("sums")
            staying = [shard for shard in await registry.shards() if shard.id != "s0"]
            moved = await control_client.fill(staying, homes_on("s1", "s2"), 2)
            await registry.publish(moved, 1, 0)
            before = client.num_right
            await leaving
            await asyncio.sleep(0.3)
            assert [shard.id for shard in await registry.shards()] == ["s1", "s2"]
            assert shards.pop("s0").service.handler.counters.num_refusals == 0
            assert client.remote.traffic.refusals == {}
            assert (client.num_wrong, client.num_right > before > 0) == (0, True)

    run(test)


@pytest.mark.parametrize(("has_leader", "move_timeout_s", "seconds"), [(True, 3.0, 3.0), (False, 60.0, 1.0)])
def test_without_a_new_placement_it_goes_after_its_bound(
    family: ModelFamily, has_leader: bool, move_timeout_s: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a shard stops after `seconds`, or up to 20 seconds later on a busy machine.

    Without a leader, a shard that waits for `move_timeout_s` needs 60 seconds. With a leader, a shard without this
    limit waits for ever.
    """
    monkeypatch.setattr(drain, "ABANDONED_S", 1.0)

    async def test() -> None:
        registry = MemoryRegistry(time.monotonic, lease_ttl_s=60.0)
        if has_leader:
            await registry.acquire_lease("controller")
        async with fleet(family, registry, move_timeout_s) as shards:
            started = time.monotonic()
            await shards.pop("s0").stop()
            assert seconds <= time.monotonic() - started < seconds + 20

    run(test)


def test_where_all_stop_at_once_nobody_waits(family: ModelFamily) -> None:
    async def test() -> None:
        registry = MemoryRegistry(time.monotonic, lease_ttl_s=60.0)
        await registry.acquire_lease("controller")
        async with fleet(family, registry, 20.0):
            started = time.monotonic()
        # usually 0.5 s; a shard that waits needs `move_timeout_s`, which is 20 s
        assert time.monotonic() - started < 15
        assert await registry.shards() == []

    run(test)


def test_it_can_be_told_to_drain_and_serve_on(family: ModelFamily) -> None:
    async def test() -> None:
        registry = MemoryRegistry(time.monotonic)
        async with fleet(family, registry, 0.0) as shards:
            assert await control_client.drain(shards["s1"].endpoint, keep_serving=True) == 0
            assert (await control_client.status(shards["s1"].endpoint)).draining
            assert shards["s1"].record.draining
            async with stream_to(shards["s1"]) as stream:
                await stream.write(make_request((0, 1)))
                assert (await stream.read()).HasField("sums")

    run(test)
