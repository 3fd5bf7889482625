from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import torch

from cluster.memory_registry import MemoryRegistry
from cluster.topology import Placement, Shard, held_digest
from model.family import ModelFamily, load_family
from services.controller.controller import Controller, ControllerConfig, layer_specs, stale_shards
from services.expert.shard import ExpertShard, ShardConfig
from tests.services.expert.checkpoint import LAYERS, NUM_EXPERTS, write_checkpoint

CONFIG = ControllerConfig({"experts-cpu": 3}, "digest", torch.float32, gone_after_s=0.0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    return load_family(write_checkpoint(tmp_path_factory.mktemp("model")))


def new_shard(family: ModelFamily, registry: MemoryRegistry, number: int) -> ExpertShard:
    return ExpertShard(ShardConfig(f"s{number}", memory_budget=1 << 30, leave_timeout_s=0.0), family, registry)


@asynccontextmanager
async def fleet(family: ModelFamily, registry: MemoryRegistry, count: int) -> AsyncGenerator[list[ExpertShard], None]:
    shards = [new_shard(family, registry, number) for number in range(count)]
    async with AsyncExitStack() as stack:
        for shard in shards:
            await shard.start()
            stack.push_async_callback(shard.stop)
        yield shards


async def beat(registry: MemoryRegistry, shards: list[ExpertShard]) -> None:
    for shard in shards:
        await registry.heartbeat(shard.record)


def test_the_planner_sees_every_expert_of_the_model(family: ModelFamily) -> None:
    specs = layer_specs(family.expert_shapes, torch.float32)
    assert [(spec.layer, spec.num_experts) for spec in specs] == [(layer, NUM_EXPERTS) for layer in LAYERS]
    assert {spec.expert_bytes for spec in specs} == {2 * 64 * 128 * 4}
    assert {spec.expert_bytes for spec in layer_specs(family.expert_shapes, torch.bfloat16)} == {2 * 64 * 128 * 2}


def test_only_shards_of_the_placement_that_hold_something_else_are_stale() -> None:
    placement = Placement(1, {1: (("a", "b"), ("a",))}, {1: 0})
    empty = Shard("a", "127.0.0.1:1", "n", "p", "cpu", "i", 10)
    right = replace(empty, id="b", held_digest=held_digest({1: [0]}))
    stranger = replace(empty, id="c")
    assert stale_shards(placement, [empty, right, stranger]) == [empty]


def test_the_first_placement_waits_for_all_shards_and_fills_them(family: ModelFamily) -> None:
    async def run() -> None:
        registry = MemoryRegistry(lambda: 0.0)
        controller = Controller(CONFIG, family.expert_shapes, registry)
        async with fleet(family, registry, 2) as shards:
            await controller.turn()
            assert await registry.placement() is None
            third = new_shard(family, registry, 2)
            await third.start()
            await controller.turn()
            placement = await registry.placement()
            assert placement is not None
            assert (placement.model, placement.cover()) == ("digest", 2)
            assert placement.epoch > 1_700_000_000  # the time, so that a store that lost its data repeats none
            assert sum(shard.host.num_held for shard in (*shards, third)) == 2 * NUM_EXPERTS * len(LAYERS)
            await third.stop()

    asyncio.run(run())


def test_a_new_shard_takes_the_place_of_one_that_is_gone(family: ModelFamily) -> None:
    async def run() -> None:
        registry = MemoryRegistry(lambda: 0.0)
        controller = Controller(CONFIG, family.expert_shapes, registry)
        async with fleet(family, registry, 2) as shards:
            third = new_shard(family, registry, 2)
            await third.start()
            await controller.turn()
            await controller.settled()
            await beat(registry, [*shards, third])
            num_held = third.host.num_held
            await third.stop()
            await controller.turn()  # a shard that is away is no reason to fail
            before = await registry.placement()
            again = new_shard(family, registry, 7)
            await again.start()
            assert again.host.num_held == 0
            await controller.turn()
            assert again.host.num_held == num_held
            after = await registry.placement()
            assert before is not None
            assert after is not None
            assert (before.shard_ids, after.shard_ids) == (("s0", "s1", "s2"), ("s0", "s1", "s7"))
            assert after.digest_of("s7") == before.digest_of("s2") == again.record.held_digest
            assert after.epoch == before.epoch + 1
            await again.stop()

    asyncio.run(run())


def test_a_store_that_comes_back_empty_gets_the_running_placement(family: ModelFamily) -> None:
    async def run() -> None:
        registry = MemoryRegistry(lambda: 0.0)
        controller = Controller(CONFIG, family.expert_shapes, registry)
        async with fleet(family, registry, 3) as shards:
            await controller.turn()
            await controller.turn()
            placement = await registry.placement()
            controller.registry = MemoryRegistry(lambda: 0.0)
            await beat(controller.registry, shards)
            await controller.turn()
            assert await controller.registry.placement() == placement

    asyncio.run(run())


def test_a_placement_of_another_fleet_or_checkpoint_is_replaced(family: ModelFamily) -> None:
    async def run() -> None:
        registry = MemoryRegistry(lambda: 0.0)
        async with fleet(family, registry, 3):
            first = Controller(CONFIG, family.expert_shapes, registry)
            await first.turn()
            old = await registry.placement()
            assert old is not None
            alive = await registry.shards()
            assert first.fits(old, alive)
            assert not first.fits(old, [])
            other = Controller(replace(CONFIG, model="other"), family.expert_shapes, registry)
            smaller = Controller(replace(CONFIG, num_shards={"experts-cpu": 2}), family.expert_shapes, registry)
            assert not other.fits(old, alive)
            assert not smaller.fits(old, alive)
            await other.turn()
            new = await registry.placement()
            assert new is not None
            assert (new.model, new.epoch > old.epoch) == ("other", True)

    asyncio.run(run())


def test_a_shard_that_cannot_be_filled_holds_up_none_of_the_others(family: ModelFamily) -> None:
    async def run() -> None:
        registry = MemoryRegistry(lambda: 0.0)
        controller = Controller(CONFIG, family.expert_shapes, registry)
        async with fleet(family, registry, 2) as shards:
            third = new_shard(family, registry, 2)
            await third.start()
            await controller.turn()
            await controller.settled()
            assert controller.placement is not None
            dead = replace(shards[0].record, endpoint="127.0.0.1:1", held_digest="")
            await registry.heartbeat(dead)
            await third.stop()
            again = new_shard(family, registry, 2)  # the same name: it is only filled again
            await again.start()
            await controller.turn()
            await controller.settled()
            assert again.record.held_digest == held_digest(controller.placement.experts_of("s2"))
            await again.stop()

    asyncio.run(run())
