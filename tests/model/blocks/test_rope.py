"""The tests compare frequencies and rotations with those of transformers, also far beyond the first positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from model.blocks.rope import Rope, inverse_frequencies
from model.configs.config_keys import ConfigKeys
from model.configs.rope_shape import RopeShape, rope_shape
from model.cpu.rope import rotate
from model.state import Batch
from tests.model.steps import seeded

YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
SETTINGS: list[tuple[int, dict[str, Any]]] = [
    (64, {"rope_type": "default", "rope_theta": 10_000.0}),
    (6, {"rope_type": "default", "rope_theta": 5_000_000.0}),
    (64, YARN | {"rope_theta": 10_000.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
    (64, YARN | {"rope_theta": 10_000.0}),
    (64, YARN | {"rope_theta": 10_000.0, "mscale_all_dim": 0.7}),
    (12, YARN | {"rope_theta": 50_000.0, "mscale": 0.7, "mscale_all_dim": 1.3, "factor": None}),
    (6, YARN | {"rope_theta": 100.0, "beta_fast": 2.0, "beta_slow": 2.0, "mscale": 0.7}),
    (2, YARN | {"rope_theta": 10_000.0, "original_max_position_embeddings": 8}),
]


def theirs(dim: int, settings: dict[str, Any], is_interleaved: bool) -> DeepseekV3RotaryEmbedding:
    config = DeepseekV3Config(
        qk_rope_head_dim=dim,
        max_position_embeddings=163_840,
        rope_parameters=dict(settings),
        rope_interleave=is_interleaved,
    )
    return DeepseekV3RotaryEmbedding(config)


def ours(dim: int, settings: dict[str, Any], is_interleaved: bool) -> RopeShape:
    keys = ConfigKeys({"rope_parameters": settings, "max_position_embeddings": 163_840})
    return rope_shape(keys, dim, is_interleaved=is_interleaved)


def batch_at(positions: list[int]) -> Batch:
    """Return a batch with one request of one token for each position."""
    num, ids = len(positions), torch.zeros(len(positions), dtype=torch.long)
    return Batch(ids, (1,) * num, tuple(positions), tuple(range(num)), ((0,),) * num)


@pytest.mark.parametrize(("dim", "settings"), SETTINGS, ids=str)
def test_frequencies_have_the_bits_of_transformers(dim: int, settings: dict[str, Any]) -> None:
    module = theirs(dim, settings, True)
    assert torch.equal(inverse_frequencies(ours(dim, settings, True)), module.inv_freq)


@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize(("dim", "settings"), SETTINGS, ids=str)
def test_rotations_equal_those_of_transformers(dim: int, settings: dict[str, Any], is_interleaved: bool) -> None:
    """Check positions up to 160,000, where one unit in the last place of an fp32 angle is 0.016."""
    positions = [0, 1, 2, 31, 4095, 4096, 40_001, 131_072, 163_839]
    module = theirs(dim, settings, is_interleaved)
    x_THD = seeded(0)(len(positions), 3, dim)
    q_1HTD = x_THD.transpose(0, 1)[None]
    cos, sin = module(q_1HTD, torch.tensor([positions]))
    turn = apply_rotary_pos_emb_interleave if is_interleaved else apply_rotary_pos_emb
    expected = turn(q_1HTD, q_1HTD, cos, sin)[0][0].transpose(0, 1)
    if is_interleaved:  # transformers writes the first numbers of all pairs, and then the second numbers
        expected = torch.stack(expected.chunk(2, dim=-1), dim=-1).flatten(-2)
    rope, batch = Rope(ours(dim, settings, is_interleaved)), batch_at(positions)
    torch.testing.assert_close(rope.rotate(x_THD, batch), expected, rtol=0, atol=2e-6)
    table, compiled = rope.table(batch), x_THD.numpy().copy()
    for t in range(len(positions)):
        for head in range(3):
            rotate(compiled[t, head], table[t], is_interleaved)
    torch.testing.assert_close(torch.from_numpy(compiled), expected, rtol=0, atol=2e-6)


def test_the_table_of_a_batch_is_computed_once() -> None:
    rope, one, other = Rope(ours(*SETTINGS[0], True)), batch_at([1, 2]), batch_at([3])
    table = rope.table(one)
    assert rope.table(one) is table
    assert rope.table(other).shape == (1, 2, 32)
    assert (rope.table(one) == table).all()
