"""The tests compare dense MLPs of both kinds with the oracle and with transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

from model.blocks.mlp import DenseMLP
from model.configs.expert_shape import ExpertKind
from tests.model import oracles
from tests.model.blocks.residual import add_mixer, normed
from tests.model.steps import relative_error, seeded

HIDDEN, WIDTH, NUM_ROWS = 36, 52, 70
KINDS: tuple[ExpertKind, ...] = ("relu2", "swiglu")


def random_mlp(kind: ExpertKind, bias: bool = False) -> DenseMLP:
    mlp, randn = DenseMLP(HIDDEN, WIDTH, bias, kind).requires_grad_(False), seeded(0)
    for parameter in mlp.parameters():
        parameter.data = randn(*parameter.shape) / 4
    return mlp


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_mlp_follows_the_equation(kind: ExpertKind, is_compiled: bool) -> None:
    mlp, x = random_mlp(kind), 3 * seeded(1)(NUM_ROWS, HIDDEN)
    weights = {name.partition("_")[0]: weight for name, weight in mlp.state_dict().items()}
    expected = x + oracles.expert(normed(x), weights)
    assert relative_error(add_mixer(x, mlp, is_compiled=is_compiled), expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_add_biases_as_plain_pytorch_does(kind: ExpertKind) -> None:
    x = seeded(1)(NUM_ROWS, HIDDEN)
    plain, compiled = (add_mixer(x, random_mlp(kind, bias=True), is_compiled=flag) for flag in (False, True))
    assert relative_error(compiled, plain) < 1e-6


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_swiglu_mlp_equals_deepseek(is_compiled: bool) -> None:
    oracle = DeepseekV3MLP(DeepseekV3Config(hidden_size=HIDDEN, intermediate_size=WIDTH))
    mlp, x = random_mlp("swiglu"), seeded(1)(NUM_ROWS, HIDDEN)
    oracle.load_state_dict(mlp.state_dict())
    with torch.no_grad():
        expected = x + oracle(normed(x).float())
    assert relative_error(add_mixer(x, mlp, is_compiled=is_compiled), expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [[0], [69], [5, 3], list(range(1, 30))], ids=len)
def test_rows_alone_give_the_same_bits(kind: ExpertKind, rows: list[int]) -> None:
    mlp, x = random_mlp(kind), seeded(1)(NUM_ROWS, HIDDEN)
    together = add_mixer(x, mlp, is_compiled=True)
    assert torch.equal(add_mixer(x[rows], mlp, is_compiled=True), together[rows])
