"""The tests serve checkpoints with unusual shapes: whatever `ModelFamily.check` accepts is served.

Blocks with shapes that the compiled CPU kernels do not support run plain PyTorch. Their answers must equal those of
transformers, and the bits of an answer must not depend on the other requests, as with compiled kernels.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from model import kernels
from model.families.registry import load_family
from model.family import ModelFamily
from model.state import State
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.contract.sampling_params import SamplingParams
from services.engine.engine import Engine
from services.engine.runner import Runner
from services.engine.scheduling.memory import plan_memory
from services.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.model.checkpoints import VARIANTS, write_tiny
from tests.model.steps import random_tokens

NUM_TOKENS = 12
SHAPES: list[dict[str, Any]] = [
    {"ssm_state_size": 24},
    {"ssm_state_size": 1, "mamba_head_dim": 1},
    {"ssm_state_size": 100, "n_groups": 1},
    {"conv_kernel": 2, "mamba_head_dim": 5},
    {"conv_kernel": 9, "mamba_num_heads": 3, "n_groups": 3},
    {"head_dim": 1},
    {"head_dim": 33, "num_attention_heads": 5, "num_key_value_heads": 1},
    {"head_dim": 130, "num_attention_heads": 1, "num_key_value_heads": 1},
    {"hidden_size": 33, "chunk_size": 1},
    {"hidden_size": 65, "moe_latent_size": None},
    {"moe_latent_size": 1, "moe_intermediate_size": 1, "moe_shared_expert_intermediate_size": 1},
    *({"hybrid_override_pattern": pattern} for pattern in ("M-", "*", "E", "-")),
    {"n_routed_experts": 2, "num_experts_per_tok": 1},
    {"n_routed_experts": 8, "num_experts_per_tok": 8},
    {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 4},
]


def engine_of(family: ModelFamily, dtype: torch.dtype, **limits: Any) -> Engine:
    model = family.load_backbone(family.load_local_experts(dtype), dtype)
    spec = family.config.state_spec
    defaults = {"num_slots": 8, "num_checkpoint_slots": 8, "num_blocks": 128, "max_model_len": 256}
    config = SchedulerConfig(block_size=spec.block_size, **(defaults | limits))
    state = State(spec, config.num_slots + config.num_checkpoint_slots, config.num_blocks, dtype)
    return Engine(Runner(model, state), Scheduler(config), family.config.vocab_size, [])


def answers(engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Ask for all prompts at once, and return the tokens and the log probabilities of each answer."""

    async def one(i: int) -> tuple[list[int], list[float]]:
        tokens, logprobs = list[int](), list[float]()
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, logprobs=0)
        async for output in engine.generate(f"{i}", prompts[i], params):
            tokens += output.token_ids
            logprobs += [entry.logprob for entry in output.logprobs]
        return tokens, logprobs

    async def every() -> list[tuple[list[int], list[float]]]:
        return await asyncio.gather(*map(one, range(len(prompts))))

    engine.start()
    found = asyncio.run(every())
    engine.stop()
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_accepted_is_served(tmp_path: Path, shape: dict[str, Any]) -> None:
    tiny = write_tiny(tmp_path, "biased", **({"n_groups": 2} | shape))
    family = load_family(tmp_path)
    family.check()
    prompts = [random_tokens(length, seed=length) for length in (1, 9, 30)]
    found = answers(engine_of(family, torch.float32), prompts)
    has_cache = "*" in shape.get("hybrid_override_pattern", "*")
    expected = [tiny.generate(prompt, NUM_TOKENS, has_cache) for prompt in prompts]
    assert [tokens for tokens, _ in found] == expected


def test_experts_that_only_the_mtp_module_has_draft(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path, "latent", hybrid_override_pattern="M*-")
    family = load_family(tmp_path)
    family.check()
    assert [shape.layer for shape in family.expert_shapes] == [4]
    engine, prompt = engine_of(family, torch.float32, max_draft_tokens=2), random_tokens(9, seed=9)
    [(tokens, _)] = answers(engine, [prompt])
    assert tokens == tiny.generate(prompt, NUM_TOKENS)
    assert sum(engine.stats().drafted_by_position) > 0


@pytest.mark.parametrize("max_len", [2, 3, 10])
def test_a_backbone_starts_whatever_its_maximum_length(tmp_path: Path, max_len: int) -> None:
    tiny = write_tiny(tmp_path, "latent")
    family = load_family(tmp_path)
    memory = plan_memory(family.config.state_spec, torch.float32, 1 << 20, max_len, 2)
    config = BackboneConfig(torch.float32, "cpu", max_len, max_batch_tokens=64, memory=memory, num_threads=1)
    prompt = random_tokens(1, seed=1)

    async def serve() -> list[int]:
        backbone = Backbone(config, family, None, None)
        await backbone.start()
        params = SamplingParams(max_tokens=max_len - 1, temperature=0, ignore_eos=True)
        tokens = [token async for output in backbone.engine.generate("0", prompt, params) for token in output.token_ids]
        await backbone.stop()
        return tokens

    assert asyncio.run(serve()) == tiny.generate(prompt, max_len - 1)


def test_no_bit_of_bfloat16_depends_on_other_requests_or_on_chunks(tmp_path: Path) -> None:
    """Check plain PyTorch in bf16; `test_every_checkpoint` serves the same checkpoint in fp32."""
    dtype = torch.bfloat16
    write_tiny(tmp_path, "odd")
    family = load_family(tmp_path)
    prompts = [random_tokens(length, seed=length) for length in (3, 26, 17, 40, 1)]
    alone = [answers(engine_of(family, dtype), [prompt])[0] for prompt in prompts]
    for limits in ({}, {"max_batch_tokens": 5, "num_slots": 4}, {"max_batch_tokens": 16, "num_slots": 2}):
        assert answers(engine_of(family, dtype, **limits), prompts) == alone


def test_the_log_says_once_which_blocks_run_plain_pytorch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny(tmp_path, "odd")
    kernels.log_plain.cache_clear()
    with caplog.at_level(logging.WARNING, logger="model.kernels"):
        engine_of(load_family(tmp_path), torch.bfloat16)
        engine_of(load_family(tmp_path), torch.bfloat16)
    assert VARIANTS["odd"]["ssm_state_size"] == 24
    end = "run plain PyTorch, which is slower: the compiled CPU kernels do not support"
    assert [record.message for record in caplog.records] == [
        "The convolution and the state space of the Mamba-2 layers "
        f"{end} ssm_state_size = 24, which is not a multiple of 16.",
    ]
