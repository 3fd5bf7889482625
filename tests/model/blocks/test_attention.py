from __future__ import annotations

import pytest
import torch

from model.blocks.attention import GatedAttention, causal_attention
from model.blocks.mixer import ResidualBlock
from model.blocks.norm import RMSNorm
from model.blocks.rope import Rope
from model.configs.mixer_shapes import AttentionShape
from model.configs.rope_shape import RopeShape
from model.configs.state_spec import StateSpec
from model.state import Batch, State
from tests.model import oracles, qwen_oracle
from tests.model.steps import relative_error, seeded

HIDDEN, THETA = 20, 1e4
EPS = 0.1  # so large that a layer with another epsilon gives other numbers


@pytest.mark.parametrize(("num_new", "num_all"), [(1, 1), (1, 9), (9, 9), (4, 9)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_equals_the_plain_softmax(num_new: int, num_all: int, num_heads: int, num_kv_heads: int) -> None:
    randn = seeded(0)
    q = randn(num_new, num_heads, 8)
    k, v = randn(num_all, num_kv_heads, 8), randn(num_all, num_kv_heads, 8)
    assert relative_error(causal_attention(q, k, v), oracles.attention(q, k, v)) < 1e-5


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotated"),
    [(4, 2, 32, 8), (6, 1, 10, 10), (1, 1, 256, 64), (3, 3, 7, 2)],
)
def test_gated_attention_equals_the_equations(
    num_heads: int, num_kv_heads: int, head_dim: int, rotated: int, is_compiled: bool
) -> None:
    randn, num_tokens = seeded(0), 20
    shape = AttentionShape(HIDDEN, num_heads, num_kv_heads, head_dim)
    mixer = GatedAttention(shape, 0, Rope(RopeShape(rotated, THETA, is_interleaved=False)), EPS).requires_grad_(False)
    for value in mixer.parameters():
        value.data = randn(*value.shape) / (value.shape[-1] ** 0.5 if value.dim() > 1 else 4)
    weights = {f"x.{name}": value.clone() for name, value in mixer.state_dict().items()}
    block = ResidualBlock(RMSNorm(HIDDEN, EPS), mixer).requires_grad_(False)
    if is_compiled:
        block.pack(torch.float32)
    raw = {"head_dim": head_dim, "num_attention_heads": num_heads, "rms_norm_eps": EPS}
    x = randn(num_tokens, HIDDEN)
    h = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    share = (rotated + 0.5) / head_dim  # rounded down to `rotated`
    expected = x + qwen_oracle.gated_attention(h, weights, "x", raw, THETA, share, first_position=0)
    state = State(StateSpec((shape.state_spec(0),), ()), 1, 2, torch.float32)
    outputs = []
    for start, end in ((0, 7), (7, 8), (8, 20)):
        tokens = torch.zeros(end - start, dtype=torch.long)
        batch = Batch(tokens, (end - start,), (start,), (0,), ((1, 0),))
        outputs.append(block(x[start:end].clone(), batch, state))
    assert relative_error(torch.cat(outputs), expected) < 1e-5
