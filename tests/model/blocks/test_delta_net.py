"""The tests compare Gated DeltaNet with the oracle, which computes token by token and head by head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.blocks.delta_net import GatedDeltaNet, delta_rule, unit_length
from model.blocks.mixer import ResidualBlock
from model.blocks.norm import NormedGate, RMSNorm
from model.configs.mixer_shapes import DeltaNetShape
from model.configs.state_spec import StateSpec
from model.state import Batch, State
from tests.model import qwen_oracle
from tests.model.steps import relative_error, seeded

HEADS, KEY_DIM, VALUE_DIM = 4, 6, 5
SHAPE = DeltaNetShape(24, num_key_heads=2, num_value_heads=4, key_dim=32, value_dim=38, conv_kernel=4)
EPS = 0.1  # so large that a layer with another epsilon gives other numbers


def rule_inputs(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    randn = seeded(seed)
    q, k = (unit_length(randn(num_tokens, HEADS, KEY_DIM)) for _ in range(2))
    decay, beta = (randn(num_tokens, HEADS).sigmoid() for _ in range(2))
    return q, k, randn(num_tokens, HEADS, VALUE_DIM), decay, beta


@pytest.mark.parametrize("lens", [(1,), (17,), (1, 1, 1), (3, 9, 1, 9)], ids=str)
def test_the_packed_rule_equals_the_recurrence(lens: tuple[int, ...]) -> None:
    inputs = rule_inputs(sum(lens))
    states = seeded(1)(len(lens), HEADS, VALUE_DIM, KEY_DIM)
    out, last = delta_rule(*inputs, states, lens)
    parts = zip(*(part.split(list(lens)) for part in (out, *inputs)), strict=True)
    for r, (own_out, *own) in enumerate(parts):
        expected, expected_last = qwen_oracle.delta_rule(*own, states[r])
        assert relative_error(own_out, expected) < 1e-5
        assert relative_error(last[r], expected_last) < 1e-5


def test_a_key_that_is_written_twice_is_replaced() -> None:
    """Check what the rule is for: with β = 1 and no decay, the last value of a key is read back, not the sum."""
    key = unit_length(torch.randn(1, 1, KEY_DIM, generator=torch.Generator().manual_seed(0))).expand(2, 1, KEY_DIM)
    values, ones = torch.tensor([[[1.0, 2.0]], [[-3.0, 5.0]]]), torch.ones(2, 1)
    out, _ = delta_rule(key, key, values, ones, ones, torch.zeros(1, 1, 2, KEY_DIM), (2,))
    torch.testing.assert_close(out, values, rtol=1e-5, atol=1e-5)


def test_the_output_norm_norms_first_and_gates_then() -> None:
    randn = seeded(0)
    norm = NormedGate(12, EPS)
    norm.weight.data = randn(12)
    y, gate = randn(4, 3, 12), randn(4, 3, 12)
    expected = y.double() / (y.double().square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight.detach()
    assert relative_error(norm(y, gate).detach(), expected * gate * gate.double().sigmoid()) < 1e-5


def test_a_zero_centred_norm_scales_by_one_plus_its_weight() -> None:
    randn = seeded(0)
    norm = RMSNorm(12, EPS, is_zero_centred=True).requires_grad_(False)
    assert torch.equal(norm.scale, torch.ones(12))
    norm.weight.data = randn(12)
    x = randn(4, 12)
    expected = qwen_oracle.norm(x.double(), norm.weight, EPS)
    assert relative_error(norm(x), expected) < 1e-5
    norm.pack()
    assert relative_error(norm(x), expected) < 1e-5
    assert relative_error(torch.from_numpy(norm.kernel_params[0]), 1 + norm.weight) < 1e-6


def make_layer(shape: DeltaNetShape, is_compiled: bool) -> tuple[ResidualBlock, dict[str, Tensor]]:
    """Return a residual block with random weights, and the weights of its mixer under their names in a checkpoint."""
    randn = seeded(2)
    mixer = GatedDeltaNet(shape, 0, EPS).requires_grad_(False)
    for value in mixer.parameters():
        value.data = randn(*value.shape) / (value.shape[-1] ** 0.5 if value.dim() > 1 else 1)
    weights = {f"x.{name}": value.clone() for name, value in mixer.state_dict().items()}
    block = ResidualBlock(RMSNorm(shape.hidden_size, EPS), mixer).requires_grad_(False)
    if is_compiled:
        block.pack(torch.float32)
    return block, weights


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"value_dim": 3},
        {"value_dim": 65, "num_key_heads": 4},
        {"num_key_heads": 1, "conv_kernel": 2},
        {"key_dim": 20},
        {"key_dim": 7, "value_dim": 1},
    ],
    ids=str,
)
def test_a_layer_equals_the_equations(changes: dict[str, int], is_compiled: bool) -> None:
    shape, num_tokens = replace(SHAPE, **changes), 11
    block, weights = make_layer(shape, is_compiled)
    mixer = block.mixer
    assert isinstance(mixer, GatedDeltaNet)
    assert mixer.has_packed_core == (is_compiled and shape.key_dim % 16 == 0)
    raw = {
        "linear_num_key_heads": shape.num_key_heads,
        "linear_num_value_heads": shape.num_value_heads,
        "linear_key_head_dim": shape.key_dim,
        "linear_value_head_dim": shape.value_dim,
        "linear_conv_kernel_dim": shape.conv_kernel,
        "rms_norm_eps": EPS,
    }
    x = seeded(3)(num_tokens, shape.hidden_size)
    h = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    expected = x + qwen_oracle.delta_net(h, weights, "x", raw)
    state = State(StateSpec((), (shape.state_spec(0),)), 2, 1, torch.float32)
    for tensor in state.slots[0]:
        tensor.fill_(float("nan"))  # a new request must not read what a slot held before
    batch = Batch(torch.zeros(num_tokens, dtype=torch.long), (num_tokens,), (0,), (1,), ((0,),))
    assert relative_error(block(x.clone(), batch, state), expected) < 1e-5


@pytest.mark.parametrize("key_dim", [32, 20])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_the_gates_are_not_kept_for_replays(key_dim: int, is_compiled: bool) -> None:
    """Check that a step with drafts keeps `replay_width` values per token, and that they give the same state."""
    shape = replace(SHAPE, key_dim=key_dim)
    block, _ = make_layer(shape, is_compiled)
    x, spec = seeded(3)(5, shape.hidden_size), StateSpec((), (shape.state_spec(0),))
    tokens, place = torch.zeros(5, dtype=torch.long), ((0,), (0,), ((0,),))
    drafted, plain = (State(spec, 1, 1, torch.float32) for _ in range(2))
    block(x[:4].clone(), Batch(tokens[:4], (4,), *place), plain)
    batch = Batch(tokens, (5,), *place, num_drafts=(3,))
    block(x.clone(), batch, drafted)
    assert all(not tensor.any() for tensor in drafted.slots[0])
    assert sum(part.shape[1] for part in drafted.uncommitted[0]) == shape.replay_width
    block.mixer.commit(*batch.accepted([2]), drafted)
    for found, expected in zip(drafted.slots[0], plain.slots[0], strict=True):
        assert torch.equal(found, expected) if is_compiled else relative_error(found, expected) < 1e-5
