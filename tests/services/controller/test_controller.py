"""Test the controller with real shards: gRPC, a checkpoint on disk, and a registry in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest
import torch

from cluster.control.leader.reconciler import ControllerTiming
from cluster.control.manifest import weights_name
from cluster.control.memory_registry import MemoryRegistry
from cluster.control.operator_orders import OrderKind, StandingOrder
from cluster.topology import Placement
from model.configs.expert_memory import PINNED_SLAB
from model.families.registry import load_family
from model.family import ModelFamily
from services.controller.controller import Controller, ControllerConfig, layer_specs
from services.expert import control_client
from services.expert.client import CallPolicy, RemoteExperts
from services.expert.shard import ExpertShard, ShardConfig
from tests.services.expert.checkpoint import LAYERS, NUM_EXPERTS, write_checkpoint
from tests.services.expert.swiglu import HIDDEN, MIXED, write_swiglu_checkpoint

POOL = "experts-cpu"
TIMING = ControllerTiming(period_s=0.1, drain_s=0.2, recovery_s=0.5, failure_pause_s=1.0)
TIMEOUT_S = 120.0  # The timeout is long, because kernels may have to be compiled.


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    return load_family(write_checkpoint(tmp_path_factory.mktemp("model")))


@dataclass
class Fleet:
    """A `Fleet` consists of shards that a test starts and ends, a registry, and controllers that may be replaced."""

    family: ModelFamily
    stack: AsyncExitStack
    registry: MemoryRegistry = field(default_factory=lambda: MemoryRegistry(time.time))
    shards: dict[str, ExpertShard] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)

    async def add(self) -> ExpertShard:
        id = f"s{len(self.shards)}"
        shard = self.shards[id] = ExpertShard(ShardConfig(id, memory_budget=1 << 30), self.family, self.registry)
        await shard.start()
        self.stack.push_async_callback(self.kill, shard)
        return shard

    async def kill(self, shard: ExpertShard) -> None:
        """End a shard at once, without draining or unregistering it."""
        id = shard.config.shard_id
        if id not in self.dead and shard.service.worker.is_alive:
            self.dead.add(id)
            shard._beating.cancel()
            await shard._server.stop(0)
            await shard.service.close_compute_port()

    def start_controller(self, timing: ControllerTiming = TIMING) -> asyncio.Task[None]:
        config = ControllerConfig({POOL: 3}, "digest", torch.float32, timing=timing)
        return asyncio.create_task(Controller(config, self.family.expert_shapes, self.registry).run())

    async def placement(self) -> Placement:
        found = await self.registry.placement()
        assert found is not None
        return found

    async def reaches(self, is_so: Callable[[Placement], bool]) -> Placement:
        async with asyncio.timeout(TIMEOUT_S):
            while (found := await self.registry.placement()) is None or not is_so(found):
                await asyncio.sleep(0.05)
        return found

    def is_settled_on(self, *ids: str) -> Callable[[Placement], bool]:
        """Return a function that says whether a placement uses exactly the shards `ids`, with a cover of at least 2.

        The shards must hold exactly the experts of the placement. The cover may be higher, because each plan for a new
        shard copies experts to this shard and removes no home.
        """

        def is_so(placement: Placement) -> bool:
            holds = all(self.shards[id].host.digest == placement.digest_of(id) for id in ids)
            return placement.cover() >= 2 and set(placement.shard_ids) == set(ids) and holds

        return is_so


@asynccontextmanager
async def fleet(family: ModelFamily, num_shards: int = 3) -> AsyncGenerator[Fleet, None]:
    async with AsyncExitStack() as stack:
        made = Fleet(family, stack)
        for _ in range(num_shards):
            await made.add()
        yield made


def test_the_planner_sees_every_expert_of_the_model(family: ModelFamily) -> None:
    specs = layer_specs(family.expert_shapes, torch.float32)
    assert [(spec.layer, spec.num_experts) for spec in specs] == [(layer, NUM_EXPERTS) for layer in LAYERS]
    assert {spec.expert_bytes for spec in specs} == {2 * 64 * 128 * 4}
    assert {spec.expert_bytes for spec in layer_specs(family.expert_shapes, torch.bfloat16)} == {2 * 64 * 128 * 2}


def test_the_planner_counts_memory_as_the_shards_do(family: ModelFamily) -> None:
    """Check that quantized experts are counted packed on a CPU, and in slots of bf16 numbers on a GPU."""
    shapes = [replace(shape, formats=("fp8", "fp8")) for shape in family.expert_shapes]
    [spec, _] = layer_specs(shapes, torch.bfloat16)
    assert spec.expert_bytes == spec.on_device("cpu") == spec.in_host_memory("cpu") == 2 * (64 * 128 + 4)
    assert spec.on_device("cuda") == 2 * 64 * 128 * 2
    slot = 2 * (64 * 128 + 512)
    assert spec.in_host_memory("cuda") == PINNED_SLAB // (PINNED_SLAB // slot)


def test_the_first_placement_waits_for_all_shards(family: ModelFamily) -> None:
    async def run() -> None:
        async with fleet(family, 2) as ours:
            controller = ours.start_controller()
            await asyncio.sleep(0.6)
            assert await ours.registry.placement() is None
            await ours.add()
            placement = await ours.reaches(ours.is_settled_on("s0", "s1", "s2"))
            assert placement.model == "digest"
            assert set(placement.gains) == set(LAYERS)
            # Epochs are the clock's milliseconds, so that no epoch is used again after the store has lost its data.
            assert placement.epoch > 1_700_000_000_000
            controller.cancel()

    asyncio.run(run())


def test_a_shard_that_dies_is_replaced_by_those_that_are_left_and_a_new_one_is_used(family: ModelFamily) -> None:
    async def run() -> None:
        async with fleet(family) as ours:
            controller = ours.start_controller()
            await ours.reaches(ours.is_settled_on("s0", "s1", "s2"))
            await ours.kill(ours.shards["s1"])
            await ours.reaches(ours.is_settled_on("s0", "s2"))
            await ours.add()
            await ours.reaches(lambda placement: "s3" in placement.shard_ids and placement.cover() >= 2)
            controller.cancel()

    asyncio.run(run())


def test_a_shard_that_leaves_hands_over_first(family: ModelFamily) -> None:
    async def run() -> None:
        async with fleet(family) as ours:
            controller = ours.start_controller()
            await ours.reaches(ours.is_settled_on("s0", "s1", "s2"))
            covers = []
            leaving = asyncio.create_task(ours.shards["s2"].stop())
            while not leaving.done():
                placement = await ours.placement()
                held = {id for id, shard in ours.shards.items() if shard.host.num_held}
                covers.append(placement.cover(held))
                await asyncio.sleep(0.02)
            assert min(covers) == 2
            assert ours.is_settled_on("s0", "s1")(await ours.placement())
            assert ours.shards["s2"].service.handler.counters.num_refusals == 0
            controller.cancel()

    asyncio.run(run())


def test_an_order_to_drain_empties_a_shard_that_goes_on_and_is_filled_again_once_it_is_lifted(
    family: ModelFamily,
) -> None:
    async def run() -> None:
        async with fleet(family) as ours:
            controller = ours.start_controller()
            await ours.reaches(ours.is_settled_on("s0", "s1", "s2"))
            order = StandingOrder(OrderKind.DRAIN, "s1", by="a test", at=time.time())
            await ours.registry.give_order(order)
            await ours.reaches(ours.is_settled_on("s0", "s2"))
            async with asyncio.timeout(TIMEOUT_S):
                while ours.shards["s1"].host.num_held:
                    await asyncio.sleep(0.05)
            assert not ours.shards["s1"].record.draining  # The shard does not know of the order and may be used again.
            await ours.registry.lift_order(order)
            await ours.reaches(lambda placement: "s1" in placement.shard_ids and placement.cover() >= 2)
            controller.cancel()

    asyncio.run(run())


def test_swiglu_experts_move_while_they_compute(tmp_path: Path) -> None:
    """Check that no sum changes while a shard hands over quantized experts, and gets experts again."""
    family = write_swiglu_checkpoint(tmp_path, MIXED)
    local, remote = family.load_local_experts(torch.float32), RemoteExperts(CallPolicy(timeout_s=20.0))

    def ask(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        weights, ids = torch.rand(8, NUM_EXPERTS, generator=generator).topk(4, dim=-1)
        x = torch.randn(8, HIDDEN, generator=generator)
        for layer in LAYERS:
            assert torch.equal(remote(layer, x, ids, weights)(), local(layer, x, ids, weights)())

    async def ask_until(ours: Fleet, is_so: Callable[[Placement], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            number, is_done = 0, False
            while not is_done:
                placement = await ours.placement()
                is_done, number = is_so(placement), number + 1
                remote.update(placement, await ours.registry.shards())
                await asyncio.to_thread(ask, number)
                await asyncio.sleep(0.02)
        assert number > 1

    async def run() -> None:
        async with fleet(family) as ours:
            controller = ours.start_controller()
            everyone = ours.is_settled_on("s0", "s1", "s2")
            assert (await ours.reaches(everyone)).gains == local.gains
            order = StandingOrder(OrderKind.DRAIN, "s1", by="a test", at=time.time())
            await ours.registry.give_order(order)
            await ask_until(ours, ours.is_settled_on("s0", "s2"))
            await ours.registry.lift_order(order)
            await ask_until(ours, lambda placement: "s1" in placement.shard_ids and placement.cover() >= 2)
            controller.cancel()

    asyncio.run(run())
    remote.close()


def test_an_order_to_rebalance_is_followed_at_once_and_only_once(family: ModelFamily) -> None:
    async def run() -> None:
        async with fleet(family) as ours:
            controller = ours.start_controller(replace(TIMING, plan_every_s=1e6))
            await ours.reaches(ours.is_settled_on("s0", "s1", "s2"))
            order = StandingOrder(OrderKind.REBALANCE, by="a test", at=time.time())
            await ours.registry.give_order(order)
            async with asyncio.timeout(TIMEOUT_S):
                while await ours.registry.orders():
                    await asyncio.sleep(0.02)
            await asyncio.sleep(3 * TIMING.period_s)
            decisions = await ours.registry.decisions(20)
            assert [one["kind"] for one in decisions if one.get("ordered_by") == "a test"] == ["plan"]
            controller.cancel()

    asyncio.run(run())


def test_a_controller_that_dies_at_any_step_is_succeeded(family: ModelFamily) -> None:
    async def run() -> None:
        async with fleet(family) as ours:
            for number in range(12):
                controller = ours.start_controller()
                if number % 4 == 3:
                    await ours.add()
                await asyncio.sleep(0.15 * number % 0.7)
                controller.cancel()
                await asyncio.gather(controller, return_exceptions=True)
                ours.registry.lease = None  # The lease has expired.
            controller = ours.start_controller()
            everyone = ours.is_settled_on(*ours.shards)
            await ours.reaches(everyone)
            controller.cancel()

    asyncio.run(run())


def test_a_store_that_comes_back_empty_gets_the_running_placement(family: ModelFamily) -> None:
    async def run() -> None:
        async with fleet(family) as ours:
            controller = ours.start_controller()
            placement = await ours.reaches(ours.is_settled_on("s0", "s1", "s2"))
            ours.registry.__init__(time.time)  # type: ignore[misc]
            assert await ours.reaches(lambda found: True) == placement
            controller.cancel()

    asyncio.run(run())


def test_an_expert_made_of_other_bytes_is_not_served(family: ModelFamily) -> None:
    async def run() -> None:
        async with fleet(family) as ours:
            await ours.registry.note_checksums(weights_name("digest", "float32"), LAYERS[0], {1: 12345})
            controller = ours.start_controller()
            await asyncio.sleep(2.0)
            assert await ours.registry.placement() is None
            assert all(1 not in shard.host.held.get(LAYERS[0], []) for shard in ours.shards.values())
            controller.cancel()

    asyncio.run(run())


def test_the_orders_of_a_leader_that_was_replaced_are_refused(family: ModelFamily) -> None:
    async def run() -> None:
        async with fleet(family, 1) as ours:
            endpoint = ours.shards["s0"].endpoint
            await control_client.load(endpoint, {LAYERS[0]: [0, 1]}, fencing=7)
            for order in (
                control_client.unload(endpoint, {LAYERS[0]: [0]}, epoch=1, fencing=6),
                control_client.load(endpoint, {LAYERS[0]: [2]}, fencing=6),
            ):
                with pytest.raises(
                    control_client.ShardError, match="The token 6 is older than 7: there is a new leader"
                ):
                    await order
            assert ours.shards["s0"].host.held == {LAYERS[0]: [0, 1]}
            with pytest.raises(control_client.ShardError) as refusal:
                await control_client.unload(endpoint, {LAYERS[0]: [0]}, epoch=1, fencing=6)
            assert refusal.value.code == grpc.StatusCode.FAILED_PRECONDITION
            # An order without a fencing token comes from an operator, and is obeyed.
            await control_client.unload(endpoint, {LAYERS[0]: [0]}, epoch=1)

    asyncio.run(run())
