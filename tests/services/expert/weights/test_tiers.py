"""In these tests, requests need standbys: a shard promotes standbys from host memory and disk, and evicts experts."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.control.memory_registry import MemoryRegistry
from cluster.placement.migration import DEVICE, STANDBY
from cluster.topology import Placement, held_digest
from model import kernels
from model.family import ModelFamily
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.controller.shards import GrpcShards
from services.expert import compute_handler, control_client
from services.expert.client import RemoteExperts
from services.expert.shard import ExpertShard, ShardConfig
from services.expert.transport.checksum import checksum_of_reply
from services.expert.weights.load_order import ExpertsByLayer
from services.expert.weights.standbys import PinnedMemory
from tests.services.expert.checkpoint import LATENT, NUM_EXPERTS, WIDTH
from tests.services.expert.requests import make_request
from tests.services.expert.serving import ask, run, serving, stream_to
from tests.services.expert.test_client import make_rows
from tests.services.expert.weights.test_standbys import Slabs

ONE = 2 * LATENT * WIDTH * 4
CONFIG = ShardConfig("s0", memory_budget=4 * ONE, max_queue=64)
ALL = list(range(NUM_EXPERTS))


def config(num_on_device: int, num_in_memory: int = 0, **changes: Any) -> ShardConfig:
    return replace(CONFIG, memory_budget=num_on_device * ONE, host_budget=num_in_memory * ONE, **changes)


@asynccontextmanager
async def filled(
    family: ModelFamily, chosen: ShardConfig, homes: ExpertsByLayer, standby: ExpertsByLayer
) -> AsyncIterator[ExpertShard]:
    async with serving(family, config=chosen) as shard:
        await control_client.load(shard.endpoint, homes, 1, standby)
        yield shard


async def expected(family: ModelFamily, requests: Sequence[pb.ComputeRequest]) -> dict[int, bytes]:
    """Return the right sums of `requests`, by request id. They come from a shard with all experts in device memory."""
    async with filled(family, config(64), {1: ALL, 3: ALL}, {}) as shard:
        return sums(await ask(shard, *requests))


def sums(replies: dict[int, pb.ComputeReply]) -> dict[int, bytes]:
    return {id: reply.sums.data for id, reply in replies.items()}


def hold_back(shard: ExpertShard) -> threading.Event:
    """Make every read of the shard's checkpoint wait for a `threading.Event`, and return the `threading.Event`."""
    gate, read = threading.Event(), shard.service.source.read

    def read_later(layer: int, expert: int) -> Any:
        assert gate.wait(30)
        return read(layer, expert)

    shard.service.source.read = read_later
    return gate


def test_what_stands_by_is_told_and_digested(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(4, 2), {1: [0, 1]}, {1: [5, 6], 3: [7]}) as shard:
            status = await control_client.status(shard.endpoint)
            held, standby, in_memory = (
                {of.layer: list(of.experts) for of in named}
                for named in (status.held, status.standby, status.in_host_memory)
            )
            assert (held, standby, in_memory) == ({1: [0, 1]}, {1: [5, 6], 3: [7]}, {1: [5, 6]})
            assert (status.used_bytes, status.host_used_bytes, status.host_budget) == (2 * ONE, 2 * ONE, 2 * ONE)
            assert shard.record.held_digest == held_digest({1: [0, 1]}, {3: [7], 1: [6, 5]})
            assert (shard.record.host_budget, shard.record.num_held) == (2 * ONE, 2)
            await control_client.unload(shard.endpoint, {1: [0]}, 2, {1: [5]})
            assert shard.record.held_digest == held_digest({1: [1]}, {1: [6], 3: [7]})
            assert shard.host.standbys.used_bytes == ONE

    run(test)


def test_gains_and_checksums_are_of_what_stands_by_too(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(64), {1: ALL, 3: ALL}, {}) as whole:
            everything = await control_client.load(whole.endpoint, {1: ALL, 3: ALL})
        async with serving(family, config=config(4, 4)) as shard:
            loaded = await control_client.load(shard.endpoint, {1: [0]}, 1, {1: ALL[1:], 3: ALL})
        assert loaded.gains == everything.gains
        assert loaded.checksums == everything.checksums

    run(test)


@pytest.mark.parametrize("num_in_memory", [0, 1, 8])
def test_a_call_promotes_what_stands_by(family: ModelFamily, num_in_memory: int) -> None:
    async def test() -> None:
        requests = [make_request((0, 5, 6), id=1), make_request((5,), id=2)]
        async with filled(family, config(4, num_in_memory), {1: [0]}, {1: [5, 6], 3: [7]}) as shard:
            replies = await ask(shard, requests[0])
            replies |= await ask(shard, requests[1])
            assert sums(replies) == await expected(family, requests)
            assert shard.host.promoted == {1: [5, 6]}
            assert shard.host.held == {1: [0]}
            counters = (await control_client.status(shard.endpoint)).counters
            assert (counters.num_promotions, counters.promotion_us > 0, counters.num_refusals) == (2, True, 0)

    run(test)


def test_page_locked_standbys_replace_each_other(family: ModelFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a shard without the CPU kernels whose standbys are in slabs, as those of a shard on a GPU are."""
    monkeypatch.setattr(kernels, "has_compiled", lambda: False)
    slabs = Slabs()

    async def test() -> None:
        requests = [make_request((0, expert), id=expert) for expert in (5, 6, 7, 5)]
        async with serving(family, config=config(2, 2)) as shard:
            standbys = shard.host.standbys
            standbys.pinned = PinnedMemory(standbys.host_budget, slabs)
            await control_client.load(shard.endpoint, {1: [0]}, 1, {1: [5, 6, 7]})
            assert {*standbys.in_host_memory} == {(1, 5), (1, 6)}
            for request in requests:
                replies = await ask(shard, request)
                assert sums(replies) == await expected(family, [request])
            assert {*standbys.in_host_memory} == {(1, 7), (1, 5)}
            assert (standbys.used_bytes, slabs.sizes) == (2 * ONE, [2 * ONE])
            assert shard.host.used_bytes == 2 * ONE

    run(test)


def test_what_a_call_waits_for_does_not_give_way_and_what_is_loaded_does(family: ModelFamily) -> None:
    readers: list[str] = []

    async def test() -> None:
        async with filled(family, config(4), {1: [0]}, {1: [5]}) as shard:
            read = shard.service.source.read

            def note_reader(layer: int, expert: int) -> Any:
                readers.append(threading.current_thread().name)
                return read(layer, expert)

            shard.service.source.read = note_reader
            await ask(shard, make_request((5,)))
            await control_client.load(shard.endpoint, {1: [3]})

    run(test)
    assert [name.startswith("background") for name in readers] == [False, True]


def test_calls_at_once_get_the_right_sums_in_little_memory(
    family: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute_handler, "PROMOTE_TIMEOUT_S", 60.0)  # no request is too late on a busy machine
    chooser = random.Random(3)
    requests = [
        make_request(tuple(sorted(chooser.sample(ALL, chooser.randint(1, 6)))), id=n, layer=chooser.choice((1, 3)))
        for n in range(1, 61)
    ]
    highest = 0

    async def watch(shard: ExpertShard) -> None:
        nonlocal highest
        while True:
            highest = max(highest, shard.host.used_bytes)
            await asyncio.sleep(0)

    async def test() -> None:
        async with filled(family, config(4, 5), {1: [0]}, {1: ALL[1:], 3: ALL}) as shard:
            watching = asyncio.create_task(watch(shard))
            replies = await ask(shard, *requests)
            watching.cancel()
            assert [reply.refusal.detail for reply in replies.values() if not reply.HasField("sums")] == []
            assert sums(replies) == await expected(family, requests)
            assert highest <= 4 * ONE
            assert shard.host.used_bytes == ONE * (1 + sum(map(len, shard.host.promoted.values())))
            assert shard.host.standbys.used_bytes <= 5 * ONE
            assert not any(on.num_pins for on in shard.host.on_device._slots.values())
            assert {layer: len(bank.held) for layer, bank in shard.host.on_device.banks.items()} == {
                layer: len(shard.host.held.get(layer, [])) + len(shard.host.promoted.get(layer, [])) for layer in (1, 3)
            }

    run(test)


def test_those_who_wait_for_an_expert_share_its_load_and_hold_up_nobody(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(4), {1: [0, 1]}, {1: [5]}) as shard, stream_to(shard) as stream:
            gate = hold_back(shard)
            for number in range(1, 11):
                await stream.write(make_request((0, 5), id=number))
            await stream.write(make_request((0, 1), id=99))
            assert (await stream.read()).id == 99
            await control_client.load(shard.endpoint, {1: [0]})  # this load waits for no read, because expert 0 is held
            gate.set()
            replies = [await stream.read() for _ in range(10)]
            assert sorted(reply.id for reply in replies) == list(range(1, 11))
            assert len({reply.sums.data for reply in replies}) == 1
            assert shard.service.promoter.num_promotions == 1

    run(test)


def test_a_call_waits_no_longer_than_its_time(family: ModelFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_handler, "PROMOTE_TIMEOUT_S", 60.0)

    async def test() -> None:
        async with filled(family, config(4, max_queue=2), {1: [0]}, {1: [5, 6]}) as shard, stream_to(shard) as stream:
            gate = hold_back(shard)
            await stream.write(make_request((0, 5), id=1, timeout_us=1_000_000))
            reply = await asyncio.wait_for(stream.read(), 20)  # comes before the read, for which `gate` waits
            assert not gate.is_set()
            assert (reply.id, reply.refusal.code, list(reply.refusal.missing)) == (1, pb.Refusal.OVERLOADED, [5])
            for n in (1, 2):  # one at a time, because the bound also holds for requests that wait to be computed
                await stream.write(make_request((6,), id=1 + n))
                while shard.service.promotion_queue.num_parked < n:
                    await asyncio.sleep(0.01)
            await stream.write(make_request((6,), id=4))
            reply = await stream.read()
            assert (reply.id, reply.refusal.code) == (4, pb.Refusal.OVERLOADED)
            assert reply.refusal.detail == "2 requests wait for experts that stand by; the bound is 2."
            gate.set()
            assert {(await stream.read()).id for _ in range(2)} == {2, 3}

    run(test)


def test_without_device_memory_it_is_refused_in_a_sentence(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(2), {1: [0, 1]}, {1: [5]}) as shard:
            reply = (await ask(shard, make_request((0, 5), id=1)))[1]
            refusal = reply.refusal
            # A client ignores a reply with a wrong checksum, because the reply may be damaged.
            assert reply.checksum == checksum_of_reply(reply)
            assert (refusal.code, list(refusal.missing)) == (pb.Refusal.NOT_HOSTED, [5])
            assert refusal.detail == (
                "Experts [5] of layer 1 stand by, but no device memory is left to promote them to."
            )

    run(test)


def test_what_is_promoted_makes_room_for_homes(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(3), {1: [0]}, {1: [5, 6]}) as shard:
            await ask(shard, make_request((5, 6)))
            await ask(shard, make_request((5,)))
            await control_client.load(shard.endpoint, {1: [1]})
            assert (shard.host.held, shard.host.promoted) == ({1: [0, 1]}, {1: [5]})
            await control_client.load(shard.endpoint, {1: [2]})
            assert (shard.host.held, shard.host.promoted) == ({1: [0, 1, 2]}, {})
            with pytest.raises(control_client.ShardError, match="over a budget"):
                await control_client.load(shard.endpoint, {1: [5]})

    run(test)


def test_a_home_that_is_to_stand_by_serves_on_and_comes_back(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(4, 1), {1: [0, 1]}, {}) as shard:
            loaded = await control_client.load(shard.endpoint, {}, 2, {1: [1]})
            assert list(loaded.checksums[1]) == [1]
            assert (shard.host.held, shard.host.standby, shard.host.promoted) == ({1: [0]}, {1: [1]}, {1: [1]})
            assert (shard.host.standbys.used_bytes, shard.host.used_bytes) == (ONE, 2 * ONE)
            assert (await ask(shard, make_request((0, 1))))[1].HasField("sums")
            await control_client.load(shard.endpoint, {1: [1]}, 3)
            assert (shard.host.held, shard.host.standby, shard.host.promoted) == ({1: [0, 1]}, {}, {})
            assert (shard.host.standbys.used_bytes, shard.service.promoter.num_promotions) == (0, 0)
            with pytest.raises(control_client.ShardError, match="are in both homes and standbys"):
                await control_client.load(shard.endpoint, {1: [1]}, 4, {1: [1]})

    run(test)


def test_a_controller_finds_room_for_homes_in_what_is_promoted(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(3), {1: [0, 1]}, {1: [2]}) as shard:
            assert (await ask(shard, make_request((0, 2))))[1].HasField("sums")
            assert (shard.host.promoted, shard.host.used_bytes) == ({1: [2]}, 3 * ONE)
            shards = GrpcShards(MemoryRegistry(time.monotonic), family.expert_shapes, "m", CONFIG.dtype)
            holding = await shards.holding(shard.record)
            assert holding.experts == {(1, 0, DEVICE), (1, 1, DEVICE), (1, 2, STANDBY)}
            assert holding.used_bytes == 2 * ONE
            await control_client.load(shard.endpoint, {1: [2]}, 2)
            assert shard.host.held == {1: [0, 1, 2]}

    run(test)


def test_a_load_joins_a_promotion_that_is_under_way(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(2), {1: [0]}, {1: [5]}) as shard, stream_to(shard) as stream:
            gate = hold_back(shard)
            await stream.write(make_request((0, 5)))
            while not shard.service.promoter.in_progress:
                await asyncio.sleep(0.01)
            loading = asyncio.create_task(control_client.load(shard.endpoint, {1: [5]}, 2))
            await asyncio.sleep(0.1)
            assert not loading.done()
            gate.set()
            await loading
            assert (await stream.read()).HasField("sums")
            assert (shard.host.held, shard.host.standby, shard.host.used_bytes) == ({1: [0, 5]}, {}, 2 * ONE)

    run(test)


def test_what_is_unloaded_while_it_is_promoted_is_refused_and_gone(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(4), {1: [0]}, {1: [5]}) as shard, stream_to(shard) as stream:
            gate = hold_back(shard)
            await stream.write(make_request((0, 5)))
            while not shard.service.promoter.in_progress:
                await asyncio.sleep(0.01)
            await control_client.unload(shard.endpoint, {}, 2, {1: [5]})
            gate.set()
            assert (await stream.read()).refusal.code == pb.Refusal.NOT_HOSTED
            assert (shard.host.used_bytes, shard.host.on_device.banks[1].held) == (ONE, {0})

    run(test)


def test_the_least_recently_used_goes_first_and_hot_ones_last(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(2), {}, {1: ALL}) as shard:
            for experts, left in (((1,), [1]), ((2,), [1, 2]), ((1,), [1, 2]), ((3,), [1, 3])):
                await ask(shard, make_request(experts))
                assert shard.host.promoted == {1: left}
            for _ in range(3):
                await ask(shard, make_request((7, 8)))
                await ask(shard, make_request((1, 2)))
            await ask(shard, make_request((9,)))
            await ask(shard, make_request((10,)))
            # Many requests picked experts 1 and 2. Therefore one of these two experts is still promoted, but the shard
            # has evicted expert 9.
            [kept] = set(shard.host.promoted[1]) - {10}
            assert kept in (1, 2)

    run(test)


def test_stopping_answers_those_who_wait(family: ModelFamily) -> None:
    async def test() -> None:
        async with filled(family, config(4), {1: [0]}, {1: [5]}) as shard, stream_to(shard) as stream:
            gate = hold_back(shard)
            await stream.write(make_request((0, 5)))
            while not shard.service.promotion_queue.num_parked:
                await asyncio.sleep(0.01)
            reading = asyncio.create_task(stream.read())
            asyncio.get_running_loop().call_later(0.3, gate.set)
            await shard.service.handler.idle()
            assert (await reading).HasField("sums")

    run(test)


def test_the_front_serves_what_stands_by_too(family: ModelFamily, remote: RemoteExperts) -> None:
    async def test() -> None:
        async with filled(family, config(6, 4), {}, {1: ALL, 3: ALL}) as shard:
            local = family.load_local_experts(torch.float32)
            homes = dict.fromkeys((1, 3), (("s0",),) * NUM_EXPERTS)
            remote.update(Placement(1, homes, local.gains), [shard.record])
            rows = make_rows(9)
            for layer in (1, 3):
                y_NL = await asyncio.to_thread(lambda layer=layer: remote(layer, *rows)())
                assert torch.equal(y_NL, local(layer, *rows)())

    run(test)
