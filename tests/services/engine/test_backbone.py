"""The tests run a whole backbone over the demo model, with shards in another process and a real store."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cluster.control.embedded_redis import EmbeddedRedis
from cluster.control.load_store import LoadStore
from cluster.control.memory_registry import MemoryRegistry
from cluster.control.registry import Registry, connect
from cluster.control.registry_store import RegistryStore
from cluster.placement.planner import plan
from cluster.topology import Homes, Shard, held_digest
from model.blocks.expert_bank import Experts, LocalExperts
from model.families.nemotron_h import NemotronH
from model.families.registry import load_family
from model.family import ModelFamily
from model.state import Batch, State
from services.controller.controller import layer_specs
from services.engine.backbone import WARM_UP_TOKENS, Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.contract.sampling_params import SamplingParams
from services.engine.scheduling.memory import plan_memory
from services.expert import control_client
from services.expert.client import RemoteExperts
from tests.cluster.recent_windows import recent_windows
from tests.services.demo import MODEL, held_out_prompts
from tests.services.expert.shard_process import ShardProcess

MAX_LEN = 1024
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
NUM_SHARDS = 5


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    return load_family(MODEL)


@pytest.fixture(scope="module")
def local(family: ModelFamily) -> LocalExperts:
    return family.load_local_experts(torch.float32)


@pytest.fixture(scope="module")
def shards() -> Iterator[list[Shard]]:
    """Start shards without experts in one process; the tests load experts into the shards."""
    with ShardProcess(MODEL, NUM_SHARDS) as process:
        yield process.shards


def make_backbone(
    family: ModelFamily, registry: RegistryStore | None, loads: LoadStore | None, draft_tokens: int | None = None
) -> Backbone:
    memory = plan_memory(family.config.state_spec, torch.float32, 64 << 20, MAX_LEN, 4)
    config = BackboneConfig(
        torch.float32, "cpu", MAX_LEN, max_batch_tokens=256, memory=memory, num_threads=1, draft_tokens=draft_tokens
    )
    return Backbone(config, family, registry, loads)


def planned(family: ModelFamily, shards: Sequence[Shard]) -> dict[int, Homes]:
    return dict(plan(layer_specs(family.expert_shapes, torch.float32), shards, None, {}).homes)


def shuffled(homes: dict[int, Homes], seed: int) -> dict[int, Homes]:
    """Return `homes`, but assign the pairs of homes of each layer to the layer's experts in a random order."""
    chooser = random.Random(seed)
    return {layer: tuple(chooser.sample(of_layer, len(of_layer))) for layer, of_layer in homes.items()}


# Placements -----------------------------------------------------------------------------------------------------------


class Naive:
    """A `Naive` generator generates greedily without an engine; tests can replace its `experts`."""

    def __init__(self, family: ModelFamily, experts: Experts) -> None:
        self.experts, self.spec = experts, family.config.state_spec
        self.model: NemotronH = family.load_backbone(lambda *call: self.experts(*call), torch.float32)

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], num_tokens: int) -> tuple[Tensor, list[int]]:
        """Return the logits at every position of the prompt, and the `num_tokens` tokens that follow the prompt."""
        num_blocks = self.spec.num_blocks(len(prompt) + num_tokens)
        state, table = State(self.spec, 1, num_blocks, torch.float32), (tuple(range(num_blocks)),)
        logits = self._logits(prompt, 0, table, state)
        generated = [int(logits[-1].argmax())]
        while len(generated) < num_tokens:
            context_len = len(prompt) + len(generated) - 1
            generated.append(int(self._logits(generated[-1:], context_len, table, state)[-1].argmax()))
        return logits, generated

    def _logits(self, token_ids: Sequence[int], context: int, table: tuple[tuple[int, ...]], state: State) -> Tensor:
        batch = Batch(torch.tensor(token_ids), (len(token_ids),), (context,), (0,), table)
        return self.model.logits(self.model(batch, state))


@pytest.fixture(scope="module")
def naive(family: ModelFamily, local: LocalExperts) -> Naive:
    return Naive(family, local)


@pytest.fixture(scope="module")
def undisturbed(naive: Naive) -> tuple[Tensor, list[int]]:
    return naive.run(held_out_prompts(1, 100)[0], 64)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "place", [lambda homes: homes, lambda homes: shuffled(homes, seed=3)], ids=["planned", "random"]
)
def test_logits_and_tokens_are_the_same_to_the_bit_under_any_placement(
    num_shards: int,
    place: Callable[[dict[int, Homes]], dict[int, Homes]],
    family: ModelFamily,
    shards: list[Shard],
    local: LocalExperts,
    naive: Naive,
    undisturbed: tuple[Tensor, list[int]],
) -> None:
    homes = place(planned(family, shards[:num_shards]))
    placement = asyncio.run(control_client.fill(shards[:num_shards], homes, epoch=1))
    assert placement.gains == local.gains
    naive.experts = remote = RemoteExperts()
    remote.update(placement, shards)
    logits, token_ids = naive.run(held_out_prompts(1, 100)[0], 64)
    assert torch.equal(logits, undisturbed[0])
    assert token_ids == undisturbed[1]
    assert remote.traffic.num_rows == (100 + 63) * family.config.layers[: family.config.num_layers].count("E")
    remote.close()


# The backbone ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(
    family: ModelFamily, registry: RegistryStore | None, loads: LoadStore | None, draft_tokens: int | None = None
) -> AsyncGenerator[Backbone, None]:
    backbone = make_backbone(family, registry, loads, draft_tokens)
    await backbone.start()
    yield backbone
    await backbone.stop()


async def generate(backbone: Backbone, prompt: list[int]) -> list[int]:
    return [token async for output in backbone.engine.generate("r", prompt, GREEDY) for token in output.token_ids]


async def wait_until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_true():
            await asyncio.sleep(0.05)


async def publish(registry: RegistryStore, family: ModelFamily, shards: list[Shard], epoch: int = 1) -> None:
    """Load the experts of a placement into the shards, and publish the placement in the registry."""
    placement = await control_client.fill(shards, planned(family, shards), epoch)
    for shard in shards:
        await registry.heartbeat(replace(shard, held_digest=held_digest(placement.experts_of(shard.id))))
    placement = replace(placement, model=family.checkpoint.digest)
    await registry.publish(placement, expected_epoch=epoch - 1, fencing=1 << 60)


@pytest.fixture(scope="module")
def expected(naive: Naive, local: LocalExperts) -> list[int]:
    naive.experts = local
    return naive.run(held_out_prompts(1)[0], 12)[1]


def test_without_a_registry_the_experts_are_local(family: ModelFamily, expected: list[int]) -> None:
    async def run() -> None:
        async with running(family, None, None) as backbone:
            assert await generate(backbone, held_out_prompts(1)[0]) == expected
            assert "epoch" not in backbone.status()

    asyncio.run(run())


def test_it_waits_for_a_placement_and_follows_the_next(
    family: ModelFamily, shards: list[Shard], expected: list[int]
) -> None:
    async def run() -> None:
        registry = MemoryRegistry(lambda: 0.0)
        backbone = make_backbone(family, registry, NoLoads())
        starting = asyncio.create_task(backbone.start())
        await asyncio.sleep(0.3)
        assert not starting.done()
        await publish(registry, family, shards[:2], epoch=1)
        await starting
        assert await generate(backbone, held_out_prompts(1)[0]) == expected
        await publish(registry, family, shards[:3], epoch=2)
        await wait_until(lambda: backbone.status()["epoch"] == 2)
        assert await generate(backbone, held_out_prompts(1)[0]) == expected
        status = backbone.status()
        assert [shard["id"] for shard in status["shards"]] == [shard.id for shard in shards[:3]]
        assert status["cover"] == 2
        await backbone.stop()

    asyncio.run(run())


class NoLoads(LoadStore):
    """A `NoLoads` is a load store that cannot be reached, for registries without Redis."""

    def __init__(self) -> None:
        super().__init__(connect("redis://127.0.0.1:1/0"), "demo")


def test_a_shard_that_never_registered_is_unreachable_and_not_needed(
    family: ModelFamily, shards: list[Shard], expected: list[int]
) -> None:
    async def run() -> None:
        registry = MemoryRegistry(lambda: 0.0)
        await publish(registry, family, shards[:3])
        await registry.remove(shards[1])
        async with running(family, registry, NoLoads()) as backbone:
            assert await generate(backbone, held_out_prompts(1)[0]) == expected
            status = backbone.status()
            assert status["down"] == [shards[1].id]
            states = {shard["id"]: shard["state"] for shard in status["shards"]}
            assert states == {shards[0].id: "live", shards[1].id: "unreachable", shards[2].id: "live"}

    asyncio.run(run())


def test_expert_load_reaches_the_store_and_the_loss_of_the_store_is_survived(
    family: ModelFamily, shards: list[Shard], expected: list[int]
) -> None:
    async def run(server: EmbeddedRedis) -> None:
        redis = connect(server.url)
        registry, loads = Registry(redis, "demo", ttl_s=3600), LoadStore(redis, "demo")
        await publish(registry, family, shards[:3])
        async with running(family, registry, loads, draft_tokens=0) as backbone:
            assert await generate(backbone, held_out_prompts(1)[0]) == expected
            shape = family.expert_shapes[0]
            num_rows = (3 + WARM_UP_TOKENS - 1) + (64 + 11)  # rows of the warm-up and of the request above
            counted = 0
            async with asyncio.timeout(60):
                while counted < num_rows * shape.top_k:
                    counts_WE = await loads.read(shape.layer, shape.num_experts, recent_windows(loads, time.time()))
                    counted = int(counts_WE.sum())
                    await asyncio.sleep(0.05)
            assert counted == num_rows * shape.top_k
            assert sum(shard["picks_per_s"] for shard in backbone.status()["shards"]) > 0
            server.stop()
            await asyncio.sleep(1.2)
            assert await generate(backbone, held_out_prompts(1)[0]) == expected
            assert backbone.status()["epoch"] == 1
            assert not backbone.status()["down"]
        await redis.aclose()

    with EmbeddedRedis() as server:
        asyncio.run(run(server))
