"""The tests check that four patterns of prompts hit the prefix cache, and that the cache changes no token.

The demo's prompts are held-out files. The prompts of a tiny checkpoint of each other family are random tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from model.families.registry import load_family
from model.family import ModelFamily
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.engine.scheduling.memory import plan_memory
from tests.model.steps import random_tokens
from tests.model.variants import write_variant
from tests.services.demo import MODEL, held_out_prompts

NUM_REQUESTS, TOGETHER, MAX_LEN = 64, 8, 2048
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
Answers = dict[str, list[TokenOutput]]


@dataclass(frozen=True)
class Checkpoint:
    """A `Checkpoint` is a model, and a text from whose pieces its prompts are made."""

    family: ModelFamily
    text: list[int]

    def make_backbone(self, has_cache: bool) -> Backbone:
        spec, share = self.family.config.state_spec, 0.25 if has_cache else 0
        memory = plan_memory(spec, torch.float32, 256 << 20, MAX_LEN, TOGETHER, checkpoint_share=share)
        config = BackboneConfig(torch.float32, "cpu", MAX_LEN, 2048, memory, num_threads=1, prefix_cache=has_cache)
        return Backbone(config, self.family, None, None)

    def piece(self, place: int, length: int) -> list[int]:
        """Return `length` tokens of the text from position 2000 + `place` on.

        Pieces at distant places do not overlap.
        """
        return self.text[2000 + place : 2000 + place + length]

    def answers(self, has_cache: bool, prompts: dict[str, list[int]]) -> Answers:
        async def run() -> Answers:
            backbone = self.make_backbone(has_cache)
            await backbone.start()
            try:
                return await ask(backbone, prompts)
            finally:
                await backbone.stop()

        return asyncio.run(run())


@pytest.fixture(scope="module", params=["demo", "deepseek", "qwen"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    if request.param == "demo":
        return Checkpoint(load_family(MODEL), [token for prompt in held_out_prompts(200) for token in prompt])
    tiny = write_variant(tmp_path_factory.mktemp("model"), request.param, max_position_embeddings=MAX_LEN)
    return Checkpoint(load_family(tiny.path), random_tokens(10_000))


def token_ids(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def ask(backbone: Backbone, prompts: dict[str, list[int]]) -> Answers:
    gate = asyncio.Semaphore(TOGETHER)

    async def one(name: str) -> list[TokenOutput]:
        async with gate:
            return [output async for output in backbone.engine.generate(name, prompts[name], GREEDY)]

    return dict(zip(prompts, await asyncio.gather(*map(one, prompts)), strict=True))


def num_hits(found: Answers) -> int:
    return sum(outputs[0].num_cached > 0 for outputs in found.values())


@pytest.mark.parametrize(("num_shared", "num_own"), [(1000, 30), (1100, 30), (300, 200)], ids=str)
def test_prompts_with_a_shared_beginning(checkpoint: Checkpoint, num_shared: int, num_own: int) -> None:
    shared = checkpoint.text[:num_shared]
    prompts = {str(i): [*shared, *checkpoint.piece(100 * i, num_own - i % 20)] for i in range(NUM_REQUESTS)}
    found = checkpoint.answers(True, prompts)
    assert num_hits(found) >= 60
    some = {name: prompts[name] for name in ("0", "1", "2", "33", "63")}
    for name, outputs in checkpoint.answers(False, some).items():
        assert token_ids(found[name]) == token_ids(outputs)
        assert (outputs[0].num_cached, outputs[0].cache_reason) == (0, "disabled")


def test_conversations(checkpoint: Checkpoint) -> None:
    """Run eight conversations of eight turns.

    A prompt consists of the previous prompt, the answer to the previous prompt, and the user's next message.
    """
    [end] = checkpoint.family.config.eos_token_ids[:1]
    first, found, prompts = [*checkpoint.piece(0, 100), end], Answers(), dict[str, list[int]]()
    histories = {str(i): first for i in range(8)}

    async def run() -> None:
        backbone = checkpoint.make_backbone(has_cache=True)
        await backbone.start()
        for turn in range(8):
            messages = {i: checkpoint.piece(3000 + 40 * int(i) + turn, 20) for i in histories}
            asked = {f"{i} {turn}": [*histories[i], *messages[i], end] for i in histories}
            prompts.update(asked)
            found.update(turn_answers := await ask(backbone, asked))
            for name, outputs in turn_answers.items():
                histories[name.split()[0]] = [*asked[name], *token_ids(outputs)]
        stats = backbone.engine.stats()
        await backbone.stop()
        assert stats.num_slots_taken == stats.num_blocks_taken == 0
        assert stats.num_cached_tokens > 0.8 * stats.num_prompt_tokens

    asyncio.run(run())
    assert num_hits(found) >= 60
    some = {name: prompts[name] for name in ("0 0", "1 0", "3 4", "7 7")}
    for name, outputs in checkpoint.answers(False, some).items():
        assert token_ids(found[name]) == token_ids(outputs)
