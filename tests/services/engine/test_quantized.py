"""The tests serve the demo model in every quantized format, alone and in company, locally and through shards.

No token of an answer may depend on the batch, on drafts, on preemption, on the prefix cache, on the number of shards,
on a move of experts or on a killed shard.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.placement.planner import plan
from cluster.topology import Homes, Placement
from model.blocks.expert_bank import Experts
from model.configs.model_files import SINGLE
from model.demo import DEMO
from model.demo.quantize import formats_of, write_quantized
from model.encoder import linear_modules
from model.families.registry import load_family
from model.family import LanguageModel, ModelFamily
from model.state import State
from services.controller.controller import layer_specs
from services.engine.contract.sampling_params import SamplingParams
from services.engine.drafting.draft_depth import DraftingState
from services.engine.engine import Engine
from services.engine.runner import Runner
from services.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from services.expert import control_client
from services.expert.client import RemoteExperts
from services.expert.weights.load_order import Sources
from tests.services.demo import held_out_prompts
from tests.services.expert.shard_process import ShardProcess

PROMPTS = held_out_prompts(8, 40)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "small chunks": {"max_batch_tokens": 37},
    "preemption and drafts": {"num_blocks": 12, "max_draft_tokens": 3},
    "cache, drafts and chunks": {"has_prefix_cache": True, "max_draft_tokens": 3, "max_batch_tokens": 40},
}


class QuantizedDemo:
    """A `QuantizedDemo` is the demo model in one format, with the answers to `PROMPTS` that it gives one by one."""

    def __init__(self, path: Path, format: Any) -> None:
        self.path = path
        write_quantized(DEMO, path, formats_of(format, linear_modules(load_file(DEMO / SINGLE))))
        self.family: ModelFamily = load_family(path)
        self.model = self.family.load_backbone(self.family.load_local_experts(torch.float32), torch.float32)
        self.alone = answers(self.family, self.model, together=1)

    def through(self, experts: Experts) -> LanguageModel:
        return self.family.load_backbone(experts, torch.float32)


def answers(family: ModelFamily, model: LanguageModel, together: int = len(PROMPTS), **limits: Any) -> list[list[int]]:
    """Return the greedy answers to `PROMPTS`, of which at most `together` are computed at a time."""
    defaults = {"num_slots": 16, "num_checkpoint_slots": 16, "num_blocks": 512, "max_draft_tokens": 0}
    spec = family.config.state_spec
    settings: dict[str, Any] = defaults | {"has_prefix_cache": False} | limits
    config = SchedulerConfig(block_size=spec.block_size, max_model_len=256, **settings)
    state = State(spec, config.num_slots + config.num_checkpoint_slots, config.num_blocks, torch.float32)
    engine = Engine(Runner(model, state), Scheduler(config), family.config.vocab_size, family.eos_token_ids)

    async def one(i: int, gate: asyncio.Semaphore) -> list[int]:
        async with gate:
            return [token async for output in engine.generate(f"{i}", PROMPTS[i], GREEDY) for token in output.token_ids]

    async def run() -> list[list[int]]:
        gate = asyncio.Semaphore(together)
        return await asyncio.gather(*(one(i, gate) for i in range(len(PROMPTS))))

    engine.start()
    try:
        return asyncio.run(run())
    finally:
        engine.stop()


@pytest.fixture(scope="module", params=["fp8", "fp8_blocks", "nvfp4"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QuantizedDemo:
    return QuantizedDemo(tmp_path_factory.mktemp("quantized") / str(request.param), request.param)


@pytest.fixture
def drafts_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every engine draft to the largest allowed depth, even if drafting makes the engine slower."""

    def depths(self: DraftingState, acceptances: Any, num_other_rows: int, allowed: Any) -> list[int]:
        return [min(self.max_depth, most) for most in allowed]

    monkeypatch.setattr(DraftingState, "depths", depths)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_changes_a_token(demo: QuantizedDemo, name: str, drafts_always: None) -> None:
    assert answers(demo.family, demo.model, **SETTINGS[name]) == demo.alone


@pytest.fixture(scope="module")
def fleet(demo: QuantizedDemo) -> Iterator[list[ShardProcess]]:
    """Start three shards without experts, each in a process of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(ShardProcess(demo.path, 1, name=f"p{n}-")) for n in range(3)]


def homes_of(demo: QuantizedDemo, fleet: list[ShardProcess]) -> dict[int, Homes]:
    shards = [process.shards[0] for process in fleet]
    return dict(plan(layer_specs(demo.family.expert_shapes, torch.float32), shards, None, {}).homes)


def test_three_shards_a_live_move_and_a_killed_shard_change_no_token(
    demo: QuantizedDemo, fleet: list[ShardProcess]
) -> None:
    shards, homes = [process.shards[0] for process in fleet], homes_of(demo, fleet)
    placement = asyncio.run(control_client.fill(shards, homes, epoch=1))
    remote = RemoteExperts()
    remote.update(placement, shards)
    model = demo.through(remote)
    assert answers(demo.family, model) == demo.alone

    # While the model answers, experts of the first layer move from their first home to the shard that lacks them.
    layer = min(homes)
    moving = {expert: pair[0] for expert, pair in enumerate(homes[layer]) if "p2-0" not in pair}
    endpoints = {shard.id: shard.endpoint for shard in shards}

    def move() -> None:
        sources = Sources({(layer, expert): endpoints[shard] for expert, shard in moving.items()})
        order = control_client.load(endpoints["p2-0"], {layer: sorted(moving)}, 2, sources=sources)
        asyncio.run(order)
        moved = tuple((pair[1], "p2-0") if expert in moving else pair for expert, pair in enumerate(homes[layer]))
        remote.update(Placement(2, homes | {layer: moved}, placement.gains), shards)

    mover = threading.Thread(target=move)
    mover.start()
    assert answers(demo.family, model) == demo.alone
    mover.join()
    assert moving
    assert answers(demo.family, model) == demo.alone

    killer = threading.Timer(0.1, os.kill, (fleet[1].process.pid, signal.SIGKILL))
    killer.start()
    assert answers(demo.family, model) == demo.alone
    killer.join()
    assert answers(demo.family, model) == demo.alone
    assert remote.down == {shards[1].id}
    remote.close()
