"""Test the registry in Redis and the registry in memory with the same cases, then failures that only Redis has."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from cluster.control import registry as redis_registry
from cluster.control.embedded_redis import EmbeddedRedis
from cluster.control.memory_registry import MemoryRegistry
from cluster.control.operator_orders import OrderKind, StandingOrder, scale_targets
from cluster.control.registry import Registry, connect, key_prefix
from cluster.control.registry_store import RegistryStore, StalePlacement, StoreUnavailable
from cluster.topology import Placement
from tests.cluster.fleet import make_shard

TTL_S = 0.3
MAX_ATTEMPTS = 20


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no call fail because a busy machine stalls for seconds."""
    monkeypatch.setattr(redis_registry, "CONNECT_TIMEOUT_S", 30.0)
    monkeypatch.setattr(redis_registry, "CALL_TIMEOUT_S", 30.0)


class Pauses:
    """`Pauses` wait on behalf of a contract, and measure how long everything else in the contract took."""

    def __init__(self) -> None:
        self._started_at, self._waited_s = time.monotonic(), 0.0

    async def wait(self, num_ttls: float) -> None:
        self._waited_s += num_ttls * TTL_S
        await asyncio.sleep(num_ttls * TTL_S)

    @property
    def has_stalled(self) -> bool:
        """Return True if everything else took so long that an entry may have expired early.

        The contracts expect entries to be alive 0.7 times TTL_S after the last heartbeat.
        """
        return time.monotonic() - self._started_at - self._waited_s > 0.25 * TTL_S


Contract = Callable[[RegistryStore, Pauses], Awaitable[None]]


async def check(contract: Contract, make_registry: Callable[[], RegistryStore]) -> None:
    """Check a contract with an empty registry; try again if the contract fails while the machine stalls."""
    for _ in range(MAX_ATTEMPTS):
        pauses = Pauses()
        try:
            await contract(make_registry(), pauses)
        except (AssertionError, StalePlacement):
            if not pauses.has_stalled:
                raise
        else:
            return
    raise AssertionError(f"The machine stalled in each of {MAX_ATTEMPTS} attempts.")


def placement_of(epoch: int) -> Placement:
    return Placement(epoch, {0: (("s00", "s01"),)}, {0: 3})


async def heartbeats_keep_shards_alive(registry: RegistryStore, pauses: Pauses) -> None:
    assert await registry.shards() == []
    await registry.heartbeat(make_shard(1))
    await registry.heartbeat(make_shard(0))
    busy = replace(make_shard(1), queue_depth=4)
    await registry.heartbeat(busy)
    assert await registry.shards() == [make_shard(0), busy]
    await pauses.wait(0.7)
    await registry.heartbeat(busy)
    await pauses.wait(0.7)
    assert await registry.shards() == [busy]
    await registry.heartbeat(make_shard(0))
    assert await registry.shards() == [make_shard(0), busy]


async def only_its_own_incarnation_says_goodbye(registry: RegistryStore, pauses: Pauses) -> None:
    old, new = make_shard(0), replace(make_shard(0), incarnation="i2")
    await registry.remove(old)
    await registry.heartbeat(old)
    await registry.heartbeat(new)
    await registry.remove(old)
    assert await registry.shards() == [new]
    await registry.remove(new)
    assert await registry.shards() == []


async def a_placement_replaces_only_the_one_it_knows(registry: RegistryStore, pauses: Pauses) -> None:
    assert (await registry.placement(), await registry.epoch()) == (None, 0)
    await registry.publish(placement_of(1), expected_epoch=0, fencing=0)
    assert (await registry.placement(), await registry.epoch()) == (placement_of(1), 1)
    with pytest.raises(StalePlacement, match="it replaces epoch 0 with fencing token 0, but epoch 1 "):
        await registry.publish(placement_of(2), expected_epoch=0, fencing=0)
    await registry.publish(placement_of(2), expected_epoch=1, fencing=0)
    assert await registry.placement() == placement_of(2)


async def an_empty_place_may_be_filled_by_anyone(registry: RegistryStore, pauses: Pauses) -> None:
    lease = await registry.acquire_lease("leader")
    assert lease is not None
    await registry.publish(placement_of(5), 0, fencing=0)
    await registry.publish(placement_of(6), 5, lease.fencing)
    with pytest.raises(StalePlacement):
        await registry.publish(placement_of(7), 6, fencing=0)


async def backbones_say_what_they_follow(registry: RegistryStore, pauses: Pauses) -> None:
    assert await registry.followers() == {}
    await registry.follow("b1", 4)
    await registry.follow("b0", 3)
    await registry.follow("b1", 5)
    assert await registry.followers() == {"b0": 3, "b1": 5}
    await registry.unfollow("b1")
    assert await registry.followers() == {"b0": 3}
    await pauses.wait(1.2)
    assert await registry.followers() == {}


async def the_newest_decisions_come_first(registry: RegistryStore, pauses: Pauses) -> None:
    assert await registry.decisions(3) == []
    for number in "1234":
        await registry.note_decision({"epoch": number, "why": "a reason"})
    assert [decision["epoch"] for decision in await registry.decisions(3)] == ["4", "3", "2"]


async def an_old_leader_cannot_publish(registry: RegistryStore, pauses: Pauses) -> None:
    first = await registry.acquire_lease("first")
    assert first is not None
    await registry.publish(placement_of(1), 0, first.fencing)
    await pauses.wait(1.2)
    second = await registry.acquire_lease("second")
    assert second is not None
    assert second.fencing > first.fencing
    with pytest.raises(StalePlacement, match=f"but epoch 1 with fencing token {second.fencing} is there"):
        await registry.publish(placement_of(2), 1, first.fencing)
    await registry.publish(placement_of(2), 1, second.fencing)
    with pytest.raises(StalePlacement, match=f"but epoch 2 with fencing token {second.fencing} is there"):
        await registry.publish(placement_of(3), 2, first.fencing)


async def one_leader_at_a_time(registry: RegistryStore, pauses: Pauses) -> None:
    first = await registry.acquire_lease("first")
    assert first is not None
    assert await registry.acquire_lease("second") is None
    await pauses.wait(0.7)
    assert await registry.renew_lease(first)
    await pauses.wait(0.7)
    assert await registry.acquire_lease("second") is None
    await registry.release_lease(first)
    second = await registry.acquire_lease("second")
    assert second is not None
    assert not await registry.renew_lease(first)
    await registry.release_lease(first)
    assert await registry.renew_lease(second)


async def a_leader_is_seen_as_long_as_it_leads(registry: RegistryStore, pauses: Pauses) -> None:
    assert not await registry.has_leader()
    lease = await registry.acquire_lease("first")
    assert lease is not None
    assert await registry.has_leader()
    await registry.release_lease(lease)
    assert not await registry.has_leader()
    await registry.acquire_lease("second")
    await pauses.wait(1.2)
    assert not await registry.has_leader()


async def the_first_checksum_of_an_expert_stays(registry: RegistryStore, pauses: Pauses) -> None:
    largest = 2**64 - 1
    assert await registry.checksums("w", 1) == {}
    assert await registry.note_checksums("w", 1, {}) == {}
    assert await registry.note_checksums("w", 1, {0: 5, 7: largest}) == {0: 5, 7: largest}
    assert await registry.note_checksums("w", 1, {7: 1, 8: 2}) == {7: largest, 8: 2}
    assert await registry.checksums("w", 1) == {0: 5, 7: largest, 8: 2}
    assert await registry.checksums("w", 2) == await registry.checksums("other", 1) == {}


async def an_order_stands_until_it_is_lifted(registry: RegistryStore, pauses: Pauses) -> None:
    assert await registry.orders() == {}
    drain = StandingOrder(OrderKind.DRAIN, "s00", by="ada", at=1.5)
    scale = StandingOrder(OrderKind.SCALE, "experts-cpu", 4, "ada", 2.0)
    for order in (scale, drain, StandingOrder(OrderKind.REBALANCE, by="bob", at=3.0)):
        await registry.give_order(order)
    assert list(await registry.orders()) == ["drain:s00", "rebalance:", "scale:experts-cpu"]
    assert scale_targets(await registry.orders()) == {"experts-cpu": 4}
    again = replace(drain, by="bob", at=9.0)
    await registry.give_order(again)
    assert not await registry.lift_order(drain)  # A newer order has replaced `drain`.
    assert (await registry.orders())["drain:s00"] == again
    assert await registry.lift_order(again)
    assert not await registry.lift_order(again)
    assert "drain:s00" not in await registry.orders()
    await registry.give_order(replace(scale, count=2))
    assert scale_targets(await registry.orders()) == {"experts-cpu": 2}


async def the_leader_has_a_name(registry: RegistryStore, pauses: Pauses) -> None:
    assert await registry.leader() is None
    lease = await registry.acquire_lease("the first of many")
    assert lease is not None
    assert await registry.leader() == "the first of many"
    await registry.release_lease(lease)
    assert await registry.leader() is None


CONTRACTS: list[Contract] = [
    a_leader_is_seen_as_long_as_it_leads,
    the_first_checksum_of_an_expert_stays,
    an_order_stands_until_it_is_lifted,
    the_leader_has_a_name,
    heartbeats_keep_shards_alive,
    only_its_own_incarnation_says_goodbye,
    a_placement_replaces_only_the_one_it_knows,
    an_empty_place_may_be_filled_by_anyone,
    backbones_say_what_they_follow,
    the_newest_decisions_come_first,
    an_old_leader_cannot_publish,
    one_leader_at_a_time,
]


@asynccontextmanager
async def registry_at(redis_url: str, model: str | None = None) -> AsyncIterator[Registry]:
    async with connect(redis_url) as redis:
        yield Registry(redis, model or uuid.uuid4().hex, ttl_s=3600, lease_ttl_s=3600)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_registry_in_memory(contract: Contract) -> None:
    async def run() -> None:
        await check(contract, lambda: MemoryRegistry(time.monotonic, ttl_s=TTL_S, lease_ttl_s=TTL_S))

    asyncio.run(run())


@pytest.mark.parametrize("contract", CONTRACTS)
def test_registry_in_redis(contract: Contract, redis_url: str) -> None:
    async def run() -> None:
        async with connect(redis_url) as redis:
            await check(contract, lambda: Registry(redis, uuid.uuid4().hex, ttl_s=TTL_S, lease_ttl_s=TTL_S))

    asyncio.run(run())


def test_only_one_of_many_publishers_wins(redis_url: str) -> None:
    async def run() -> list[BaseException | None]:
        async with registry_at(redis_url) as registry:
            attempts = [registry.publish(placement_of(1 + n), expected_epoch=0, fencing=0) for n in range(10)]
            return await asyncio.gather(*attempts, return_exceptions=True)

    outcomes = asyncio.run(run())
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, StalePlacement) for outcome in outcomes) == 9


def test_models_do_not_see_each_other(redis_url: str) -> None:
    async def run() -> None:
        async with registry_at(redis_url, "one") as one, registry_at(redis_url, "two") as two:
            await one.heartbeat(make_shard(0))
            await one.publish(placement_of(1), 0, 0)
            assert await two.shards() == []
            assert await two.placement() is None

    asyncio.run(run())


def test_an_empty_redis_heals_from_heartbeats(redis_url: str) -> None:
    async def run() -> None:
        async with registry_at(redis_url) as registry:
            await registry.heartbeat(make_shard(0))
            before = await registry.acquire_lease("leader")
            assert before is not None
            await registry.redis.flushall()
            assert await registry.shards() == []
            await registry.heartbeat(make_shard(0))
            assert await registry.shards() == [make_shard(0)]
            await asyncio.sleep(0.002)
            after = await registry.acquire_lease("leader")
            assert after is not None
            assert after.fencing > before.fencing

    asyncio.run(run())


def test_a_killed_and_a_hung_redis_are_said_within_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that calls fail in time; with redis-py's defaults they take 4 s and 59 s.

    One of several calls must be in time, because the machine may stall.
    """
    monkeypatch.undo()  # uses the timeouts of the product

    async def fails_within(seconds: float, registry: Registry, disturb: Callable[[], None]) -> bool:
        for _ in range(5):
            disturb()
            started_at = time.monotonic()
            with suppress(StoreUnavailable):
                await registry.shards()
                continue  # the killed server was replaced before the call
            if time.monotonic() - started_at < seconds:
                return True
        return False

    async def run() -> None:
        with EmbeddedRedis() as server:

            def send(signal_number: signal.Signals) -> None:
                with suppress(ProcessLookupError):
                    os.kill(server.pid, signal_number)

            async with registry_at(server.url) as registry:
                await registry.heartbeat(make_shard(0))
                assert await fails_within(1.5, registry, lambda: send(signal.SIGSTOP))
                send(signal.SIGCONT)
                await registry.heartbeat(make_shard(0))
                assert await registry.shards() == [make_shard(0)]
                assert await fails_within(0.5, registry, lambda: send(signal.SIGKILL))

    asyncio.run(run())


def test_an_order_that_cannot_be_read_is_passed_over(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> dict[str, StandingOrder]:
        async with registry_at(redis_url) as registry:
            await registry.redis.hset(registry.prefix + "orders", "drain:s1", '{"kind": "drian"}')
            await registry.give_order(StandingOrder(OrderKind.DRAIN, "s0"))
            return await registry.orders()

    assert asyncio.run(run()) == {"drain:s0": StandingOrder(OrderKind.DRAIN, "s0")}
    assert "is not one that Expertmesh wrote" in caplog.text


def test_bad_names_are_a_sentence() -> None:
    with pytest.raises(ValueError, match="The registry URL 'http://x' must start with redis://"):
        connect("http://x")
    for name in ("", "a{b", "a b"):
        with pytest.raises(ValueError, match="must not be empty and must not contain braces or white space"):
            key_prefix(name)
