"""The tests check that batches, chunks, drafts, preemption and the prefix cache change no bit of an answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from model.families.nemotron_h import NemotronH
from model.families.registry import load_family
from model.state import State
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenLogprob
from services.engine.drafting.draft_depth import DraftingState
from services.engine.engine import Engine
from services.engine.runner import Runner
from services.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.services.demo import MODEL, held_out_prompts

FAMILY = load_family(MODEL)
NUM_PROMPTS = 1_000
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
Answer = tuple[list[int], list[TokenLogprob]]


@cache
def model(dtype: torch.dtype) -> NemotronH:
    return FAMILY.load_backbone(FAMILY.load_local_experts(dtype), dtype)


@contextmanager
def engine(dtype: torch.dtype = torch.float32, **limits: Any) -> Iterator[Engine]:
    defaults = {"num_slots": 32, "num_checkpoint_slots": 32, "num_blocks": 2048, "max_draft_tokens": 0}
    defaults |= {"has_prefix_cache": False}
    spec = FAMILY.config.state_spec
    config = SchedulerConfig(block_size=spec.block_size, max_model_len=1024, **(defaults | limits))
    state = State(spec, config.num_slots + config.num_checkpoint_slots, config.num_blocks, dtype)
    ends = FAMILY.config.eos_token_ids
    made = Engine(Runner(model(dtype), state), Scheduler(config), FAMILY.config.vocab_size, ends)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def drafts_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every engine draft to the largest allowed depth, even if drafting makes the engine slower."""

    def depths(self: DraftingState, acceptances: Any, num_other_rows: int, allowed: Any) -> list[int]:
        return [min(self.max_depth, most) for most in allowed]

    monkeypatch.setattr(DraftingState, "depths", depths)


@cache
def prompts(count: int) -> list[list[int]]:
    """Return `count` pieces of held-out files; the length and the start of each piece are random."""
    chooser, texts, found = random.Random(0), held_out_prompts(60, 320), list[list[int]]()
    while len(found) < count:
        text, length = chooser.choice(texts), chooser.randint(1, 60)
        start = chooser.randint(0, len(text) - length)
        found.append(text[start : start + length])
    return found


def answers(made: Engine, asked: list[list[int]], num_tokens: int, together: int, **params: Any) -> list[Answer]:
    async def one(i: int, gate: asyncio.Semaphore) -> Answer:
        tokens, logprobs = list[int](), list[TokenLogprob]()
        async with gate:
            sampling = SamplingParams(max_tokens=num_tokens, logprobs=0, **({"temperature": 0} | params))
            async for output in made.generate(f"{i}", asked[i], sampling):
                tokens += output.token_ids
                logprobs += output.logprobs
        return tokens, logprobs

    async def run() -> list[Answer]:
        gate = asyncio.Semaphore(together)
        return await asyncio.gather(*(one(i, gate) for i in range(len(asked))))

    return asyncio.run(run())


@cache
def alone(dtype: torch.dtype, seed: int | None = None) -> list[Answer]:
    """Return the answers to 64 prompts, computed one at a time, without drafts and without the prefix cache."""
    params = {} if seed is None else {"temperature": 1.0, "seed": seed}
    with engine(dtype) as made:
        return answers(made, prompts(64), 24, 1, **params)


SETTINGS: dict[str, dict[str, Any]] = {
    "8 together": {"num_slots": 8},
    "32 together": {},
    "small chunks": {"max_batch_tokens": 48},
    "odd chunks": {"max_batch_tokens": 37, "num_slots": 24},
    "drafts": {"max_draft_tokens": 3},
    "deep drafts, small chunks": {"max_draft_tokens": 6, "max_batch_tokens": 64},
    "preemption": {"num_blocks": 40},
    "preemption and drafts": {"num_blocks": 16, "max_draft_tokens": 3},
    "prefix cache": {"has_prefix_cache": True, "turn_end_ids": frozenset(FAMILY.config.eos_token_ids)},
    "cache, drafts and chunks": {"has_prefix_cache": True, "max_draft_tokens": 3, "max_batch_tokens": 40},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_changes_a_token_or_its_probability(name: str, dtype: torch.dtype, drafts_always: None) -> None:
    with engine(dtype, **SETTINGS[name]) as made:
        assert answers(made, prompts(64), 24, 32) == alone(dtype)
        if "cache" in name:
            # The first pass saves states where prompts begin to differ; the second pass reuses these states.
            for _ in range(2):
                assert answers(made, prompts(64)[::-1], 24, 8) == alone(dtype)[::-1]
        stats = made.stats()
    assert (stats.num_preemptions > 0) == ("preemption" in name)
    assert (sum(stats.accepted_by_position) > 0) == ("max_draft_tokens" in SETTINGS[name])
    assert (stats.num_cached_tokens > 0) == ("has_prefix_cache" in SETTINGS[name])


@pytest.mark.parametrize("name", ["32 together", "drafts", "preemption and drafts"])
def test_a_seed_gives_the_same_tokens_whatever_the_load(name: str, drafts_always: None) -> None:
    with engine(**SETTINGS[name]) as made:
        assert answers(made, prompts(64), 24, 32, temperature=1.0, seed=5) == alone(torch.float32, 5)


def test_logprobs_of_prompts_are_the_same_in_small_pieces() -> None:
    async def scored(made: Engine, busy: bool) -> list[tuple[TokenLogprob | None, ...]]:
        others = [made.generate(f"other {i}", prompt, LONG) for i, prompt in enumerate(prompts(2))] if busy else []
        for other in others:
            await anext(other)
        found = []
        for i, prompt in enumerate(held_out_prompts(2, 150)):
            stream = made.generate(f"{i}", prompt, SamplingParams(prompt_logprobs=5, max_tokens=1))
            found.append((await anext(stream)).prompt_logprobs)
        for other in others:
            await other.aclose()
        return found

    with engine() as made:
        expected = asyncio.run(scored(made, busy=False))
        num_steps = made.stats().num_steps
    with engine(max_scored_tokens=24) as made:
        assert asyncio.run(scored(made, busy=True)) == expected
        assert made.stats().num_steps > num_steps + 2 * (150 // 24)


def test_a_thousand_prompts_with_drafts_and_without(drafts_always: None) -> None:
    asked = prompts(NUM_PROMPTS)
    with engine() as made:
        plain = answers(made, asked, 12, 32)
    with engine(max_draft_tokens=4) as made:
        assert answers(made, asked, 12, 32) == plain
        mixed = made.stats()
    with engine(max_draft_tokens=4) as made:
        assert answers(made, asked, 12, 1) == plain
        single = made.stats()
    for stats in (mixed, single):
        assert stats.accepted_by_position[0] > NUM_PROMPTS
        assert stats.drafted_by_position[0] > stats.accepted_by_position[0], "no draft was ever rejected"
