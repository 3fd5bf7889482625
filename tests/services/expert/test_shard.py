"""These tests check over real gRPC that an `ExpertShard` registers, loads, computes, refuses requests and drains."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.control.embedded_redis import EmbeddedRedis
from cluster.control.memory_registry import MemoryRegistry
from cluster.control.registry import Registry, connect
from cluster.topology import Shard
from model.families.registry import load_family
from model.family import ModelFamily
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from services.expert import control_client
from services.expert import shard as shard_module
from services.expert.service import MAX_UNREAD
from services.expert.shard import SERVICE_NAME, ExpertShard
from tests.services.expert.checkpoint import LATENT, WIDTH, write_checkpoint
from tests.services.expert.requests import make_request
from tests.services.expert.serving import CONFIG, run, serving, stream_to


def test_it_registers_loads_computes_and_leaves(family: ModelFamily) -> None:
    async def test() -> None:
        registry = MemoryRegistry(time.monotonic)
        async with serving(family, registry) as shard:
            assert await registry.shards() == [shard.record]
            assert (shard.record.num_held, shard.record.node, shard.record.pool) == (0, "n0", "experts-cpu")
            loaded = await control_client.load(shard.endpoint, {1: [0, 1], 3: [2]}, epoch=7)
            assert loaded.gains == shard.host.gains({1: [], 3: []})
            assert {layer: list(of) for layer, of in loaded.checksums.items()} == {1: [0, 1], 3: [2]}
            async with stream_to(shard) as stream:
                await stream.write(make_request(id=42))
                reply = await stream.read()
            assert (reply.id, reply.HasField("sums"), reply.queue_depth) == (42, True, 0)
            assert reply.compute_us > 0
            status = await control_client.status(shard.endpoint)
            assert {entry.layer: list(entry.experts) for entry in status.held} == {1: [0, 1], 3: [2]}
            assert (status.epoch, status.used_bytes) == (7, 3 * 2 * LATENT * WIDTH * 4)
            assert (status.counters.num_requests, status.counters.num_rows, status.counters.num_picks) == (1, 1, 2)
            await control_client.unload(shard.endpoint, {1: [0, 1]}, epoch=8)
            assert (shard.host.held, shard.host.epoch) == ({3: [2]}, 8)
        assert await registry.shards() == []

    run(test)


def test_a_load_that_fails_says_why_and_changes_nothing(tmp_path: Path) -> None:
    missing = "backbone.layers.1.mixer.experts.5.down_proj.weight"
    family = load_family(write_checkpoint(tmp_path, without=missing))

    async def test() -> None:
        async with serving(family) as shard:
            for experts, sentence in (({1: [4, 5]}, missing), ({9: [0]}, "Layer 9 has no routed experts")):
                with pytest.raises(control_client.ShardError, match=sentence) as error:
                    await control_client.load(shard.endpoint, experts)
                assert error.value.code == grpc.StatusCode.INVALID_ARGUMENT
            assert shard.host.held == {}

    run(test)


def test_beyond_the_bound_it_refuses_and_late_requests_are_not_computed(family: ModelFamily) -> None:
    async def test() -> None:
        async with serving(family) as shard, stream_to(shard) as stream:
            await control_client.load(shard.endpoint, {1: [0, 1]})
            gate = threading.Event()
            shard.service.worker.submit(lambda: gate.wait() and None)
            await stream.write(make_request(id=1, timeout_us=1))
            await stream.write(make_request(id=2))
            overloaded = await stream.read()
            assert (overloaded.id, overloaded.refusal.code) == (2, pb.Refusal.OVERLOADED)
            assert overloaded.refusal.detail == "2 requests wait here already; the bound max_queue is 2."
            gate.set()
            late = await stream.read()
            assert (late.id, late.refusal.code) == (1, pb.Refusal.DEADLINE)
            assert (await control_client.status(shard.endpoint)).counters.num_refusals == 2

    run(test)


def test_draining_answers_what_was_accepted_and_refuses_the_rest(family: ModelFamily) -> None:
    async def test() -> None:
        registry = MemoryRegistry(time.monotonic)
        async with serving(family, registry) as shard, stream_to(shard) as stream:
            await control_client.load(shard.endpoint, {1: [0, 1]})
            gate = threading.Event()
            shard.service.worker.submit(lambda: gate.wait() and None)
            await stream.write(make_request(id=1))
            while await control_client.drain(shard.endpoint) < 2:
                await asyncio.sleep(0.01)
            await stream.write(make_request(id=2))
            refused = await stream.read()
            assert (refused.id, refused.refusal.code) == (2, pb.Refusal.DRAINING)
            gate.set()
            answered = await stream.read()
            assert (answered.id, answered.HasField("sums")) == (1, True)
            while not (await registry.shards())[0].draining:
                await asyncio.sleep(0.05)
            assert await health_of(shard) == health_pb2.HealthCheckResponse.NOT_SERVING

    run(test)


async def health_of(shard: ExpertShard) -> int:
    async with grpc.aio.insecure_channel(shard.endpoint) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        return int((await health_pb2_grpc.HealthStub(channel).Check(request)).status)


def test_health_and_reflection_are_the_standard_ones(family: ModelFamily) -> None:
    async def test() -> None:
        async with serving(family) as shard, grpc.aio.insecure_channel(shard.endpoint) as channel:
            assert await health_of(shard) == health_pb2.HealthCheckResponse.SERVING
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            names = {service.name async for reply in call for service in reply.list_services_response.service}
            assert names >= {"expertmesh.expert.v1.Expert", "grpc.health.v1.Health"}

    run(test)


def test_a_client_that_leaves_does_not_disturb_the_others(family: ModelFamily) -> None:
    async def test() -> None:
        async with serving(family) as shard:
            await control_client.load(shard.endpoint, {1: [0, 1]})
            async with stream_to(shard) as leaving:
                await leaving.write(make_request(id=1))
            async with stream_to(shard) as staying:
                await staying.write(make_request(id=2))
                await staying.done_writing()
                replies = [reply async for reply in staying]
            assert [reply.id for reply in replies] == [2]

    run(test)


def test_a_client_that_does_not_read_is_not_read_from(family: ModelFamily) -> None:
    num_taken = 0

    async def requests() -> AsyncIterator[pb.ComputeRequest]:
        nonlocal num_taken
        for num_taken in range(1, 2 * MAX_UNREAD):
            yield make_request(id=num_taken)

    async def test() -> None:
        async with serving(family) as shard:
            context: Any = None
            replies = aiter(shard.service.Compute(requests(), context))
            ids = [(await anext(replies)).id]
            await shard.service.worker.idle()
            assert num_taken == MAX_UNREAD + 1
            ids += [reply.id async for reply in replies]
            assert sorted(ids) == list(range(1, 2 * MAX_UNREAD))

    run(test)


@pytest.mark.parametrize("method", ["Load", "Unload"])
def test_a_caller_that_leaves_does_not_free_the_lock(family: ModelFamily, method: str) -> None:
    async def test() -> None:
        async with serving(family) as shard, grpc.aio.insecure_channel(shard.endpoint) as channel:
            stub: Any = expert_pb2_grpc.ExpertStub(channel)  # type: ignore[no-untyped-call]
            await control_client.load(shard.endpoint, {1: [0, 1]})
            gate = threading.Event()
            worker = shard.service.worker  # `Unload` and the last step of `Load` run on the worker
            worker.submit(gate.wait)
            request: Any = getattr(pb, f"{method}Request")
            call = getattr(stub, method)(request(experts=[pb.LayerExperts(layer=1, experts=[1, 2])], epoch=5))
            while not shard.service._changing.locked():
                await asyncio.sleep(0.01)
            call.cancel()
            waiting = asyncio.create_task(control_client.load(shard.endpoint, {3: [0]}))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            gate.set()
            await waiting
            assert shard.host.held == ({1: [0], 3: [0]} if method == "Unload" else {1: [0, 1, 2], 3: [0]})
            assert shard.host.epoch == 5

    run(test)


class StumblingRegistry(MemoryRegistry):
    """A `StumblingRegistry` raises an unexpected error at the second heartbeat."""

    num_beats = 0

    async def heartbeat(self, shard: Shard) -> None:
        self.num_beats += 1
        if self.num_beats == 2:
            raise ZeroDivisionError("stumbled")
        await super().heartbeat(shard)


def test_a_heartbeat_that_fails_is_logged_and_followed_by_the_next(
    family: ModelFamily, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        registry = StumblingRegistry(time.monotonic)
        async with serving(family, registry) as shard:
            while registry.num_beats < 3:
                await asyncio.sleep(0.05)
            assert shard.is_healthy
            assert "Shard s0 failed to register itself and will try again." in caplog.text
            assert "ZeroDivisionError: stumbled" in caplog.text

    run(test)


def test_it_is_healthy_while_it_beats_and_computes(family: ModelFamily) -> None:
    async def test() -> None:
        async with serving(family) as shard:
            assert shard.is_healthy
            shard._beating.cancel()
            await asyncio.gather(shard._beating, return_exceptions=True)
            assert not shard.is_healthy

    run(test)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_shard_whose_worker_has_ended_leaves_the_registry_and_stops(family: ModelFamily) -> None:
    async def test() -> None:
        registry = MemoryRegistry(time.monotonic)
        async with serving(family, registry) as shard, grpc.aio.insecure_channel(shard.endpoint) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[no-untyped-call]
            shard.service.worker.submit(sys.exit)
            while shard.service.worker.is_alive:
                await asyncio.sleep(0.01)
            assert not shard.is_healthy
            while await registry.shards():
                await asyncio.sleep(0.05)
            health = await check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await registry.shards() == []

    run(test)


def test_a_shard_that_can_compute_again_registers_itself_again(family: ModelFamily) -> None:
    async def test() -> None:
        registry = MemoryRegistry(time.monotonic)
        async with serving(family, registry) as shard:
            shard.service.handler.num_failed_in_a_row = shard_module.MAX_FAILED
            while await registry.shards():
                await asyncio.sleep(0.05)
            shard.service.handler.num_failed_in_a_row = 0
            while not await registry.shards():
                await asyncio.sleep(0.05)

    run(test)


def test_a_device_that_always_fails_or_hangs_is_not_healthy(
    family: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with serving(family) as shard:
            shard.service.handler.num_failed_in_a_row = shard_module.MAX_FAILED
            assert not shard.is_healthy
            shard.service.handler.num_failed_in_a_row = 0
            monkeypatch.setattr(shard_module, "MAX_BUSY_S", 0.1)
            hang = threading.Event()
            shard.service.worker.submit(hang.wait)
            while shard.is_healthy:
                await asyncio.sleep(0.01)
            hang.set()
            while not shard.is_healthy:
                await asyncio.sleep(0.01)

    run(test)


def test_it_serves_on_without_redis(family: ModelFamily) -> None:
    server = EmbeddedRedis()

    async def test() -> None:
        redis = connect(server.url)
        registry = Registry(redis, "tiny")
        async with serving(family, registry) as shard, stream_to(shard) as stream:
            assert await registry.shards() == [shard.record]
            await control_client.load(shard.endpoint, {1: [0, 1]})
            server.stop()
            await asyncio.sleep(1.5)
            await stream.write(make_request())
            assert (await stream.read()).HasField("sums")
        await redis.aclose()

    run(test)


def test_a_port_in_use_is_said_in_one_sentence(family: ModelFamily) -> None:
    async def test() -> None:
        async with serving(family) as shard:
            taken = replace(CONFIG, port=int(shard.endpoint.rpartition(":")[2]))
            with pytest.raises(RuntimeError, match=f"Shard s0 cannot listen on {shard.endpoint}"):
                await ExpertShard(taken, family, shard.registry).start()

    run(test)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shard_id": ""}, "shard_id must not be empty."),
        ({"memory_budget": 0}, "memory_budget is 0 and max_queue 2, but both must be above 0."),
        ({"dtype": torch.float16}, "dtype is torch.float16, but a shard computes in float32 or bfloat16."),
    ],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(CONFIG, **changes)
