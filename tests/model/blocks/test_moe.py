"""The tests compare MoE layers with transformers and with the equations, for every kind of expert and shared expert."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from model import kernels
from model.blocks.expert_bank import ExpertBank, LocalExperts
from model.blocks.mlp import DenseMLP
from model.blocks.moe import MoE
from model.blocks.router import SigmoidRouter, SoftmaxRouter
from model.configs.expert_shape import ExpertKind, ExpertShape
from model.families.nemotron_h import NemotronH
from model.stored_matrix import StoredMatrix
from tests.model import oracles
from tests.model.blocks.residual import add_mixer, normed
from tests.model.checkpoints import Tiny
from tests.model.steps import relative_error, seeded

HIDDEN, LATENT, WIDTH, SHARED_WIDTH, NUM_EXPERTS, TOP_K, NUM_ROWS = 40, 12, 36, 28, 12, 3, 70
SHARED = ("none", "plain", "gated")


@pytest.fixture(params=["compiled", "plain"])
def is_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test twice: with the CPU kernels (True) and in plain PyTorch."""
    monkeypatch.setattr(kernels, "has_compiled", lambda: request.param == "compiled")
    return bool(request.param == "compiled")


class RandomLayer:
    """A `RandomLayer` is a MoE layer with random weights, and computes the layer's output from the equations."""

    def __init__(
        self,
        kind: ExpertKind,
        shared: str,
        *,
        is_latent: bool = False,
        is_sigmoid: bool = False,
        shared_width: int = SHARED_WIDTH,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        randn = seeded(0)
        shape = ExpertShape(1, NUM_EXPERTS, TOP_K, LATENT if is_latent else HIDDEN, WIDTH, kind)
        self.experts = {
            expert: {m.name: randn(m.rows, m.columns) / m.columns**0.5 for m in shape.matrices}
            for expert in range(NUM_EXPERTS)
        }
        bank = ExpertBank(shape, dtype)
        for expert, tensors in self.experts.items():
            bank.load(expert, {name: StoredMatrix.plain(tensor) for name, tensor in tensors.items()})
        grouped = SigmoidRouter(HIDDEN, shape, 2.5, 4, 2, True)
        router = grouped if is_latent or is_sigmoid else SoftmaxRouter(HIDDEN, shape, True)
        mlp = None if shared == "none" else DenseMLP(HIDDEN, shared_width, kind=kind)
        local = LocalExperts({1: bank})
        is_gated = shared == "gated"
        self.moe = MoE(HIDDEN, shape, router, local, mlp, is_latent=is_latent, is_shared_gated=is_gated)
        for tensor in self.moe.state_dict().values():
            tensor.copy_(randn(*tensor.shape) / 4)
        self.weights = {name: tensor.clone() for name, tensor in self.moe.state_dict().items()}

    def expected(self, h_ND: Tensor) -> Tensor:
        """Return the layer's output in float64 with the picks of the router, which has tests of its own."""
        with torch.no_grad():
            ids_NK, weights_NK = self.moe.gate(h_ND.float())
        weights = {name: tensor.double() for name, tensor in self.weights.items()}
        z_NL = h_ND @ weights["fc1_latent_proj.weight"].T if self.moe.is_latent else h_ND
        row_P = torch.arange(len(h_ND)).repeat_interleave(TOP_K)
        out = oracles.weighted_experts(z_NL, row_P, ids_NK.flatten(), weights_NK.flatten(), self.experts)
        out = out @ weights["fc2_latent_proj.weight"].T if self.moe.is_latent else out
        stem = "shared_experts."
        shared = {name[len(stem) :].partition("_")[0]: w for name, w in weights.items() if name.startswith(stem)}
        if not shared:
            return out
        scale = (h_ND @ weights["shared_gate.weight"].T).sigmoid() if "shared_gate.weight" in weights else 1.0
        return out + scale * oracles.expert(h_ND, shared)


LAYERS: list[tuple[ExpertKind, str, bool]] = [*product(get_args(ExpertKind), SHARED, (False, True))]


@pytest.mark.parametrize(("kind", "shared", "is_latent"), LAYERS)
def test_a_layer_follows_the_equations(kind: ExpertKind, shared: str, is_latent: bool, is_compiled: bool) -> None:
    layer, x = RandomLayer(kind, shared, is_latent=is_latent), 2 * seeded(1)(NUM_ROWS, HIDDEN)
    expected = x + layer.expected(normed(x))
    assert relative_error(add_mixer(x, layer.moe, is_compiled=is_compiled), expected) < 2e-6


@pytest.mark.parametrize(("kind", "shared", "is_latent"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_alone_give_the_same_bits(kind: ExpertKind, shared: str, is_latent: bool, dtype: torch.dtype) -> None:
    layer, x = RandomLayer(kind, shared, is_latent=is_latent, dtype=dtype), seeded(1)(NUM_ROWS, HIDDEN)
    together = add_mixer(x, layer.moe, is_compiled=True, dtype=dtype)
    for rows in ([0], [69], [5, 3], list(range(1, 30))):
        assert torch.equal(add_mixer(x[rows], layer.moe, is_compiled=True, dtype=dtype), together[rows])


def add_oracle(x_TD: Tensor, oracle: Any, layer: RandomLayer) -> Tensor:
    """Return x + oracle(norm(x)), where `oracle` is a block of transformers that gets the weights of `layer`."""
    stacked = {
        name: torch.stack([tensors[name] for tensors in layer.experts.values()]) for name in ("gate", "up", "down")
    }
    weights = {"gate.weight": layer.weights["gate.weight"]}
    weights["experts.gate_up_proj"] = torch.cat([stacked["gate"], stacked["up"]], dim=1)
    weights["experts.down_proj"] = stacked["down"]
    for name, tensor in layer.weights.items():
        own = name if isinstance(oracle, DeepseekV3MoE) else name.replace("shared_experts", "shared_expert")
        weights[own.replace("shared_gate", "shared_expert_gate")] = tensor
    oracle.load_state_dict(weights)
    oracle.experts.config._experts_implementation = "eager"
    with torch.no_grad():
        out: Tensor = x_TD + oracle(normed(x_TD).float()[None])[0]
    return out


def test_a_gated_layer_equals_qwen3_next(is_compiled: bool) -> None:
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED_WIDTH,
        norm_topk_prob=True,
    )
    layer, x = RandomLayer("swiglu", "gated"), 2 * seeded(1)(NUM_ROWS, HIDDEN)
    expected = add_oracle(x, Qwen3NextSparseMoeBlock(config), layer)
    assert relative_error(add_mixer(x, layer.moe, is_compiled=is_compiled), expected) < 2e-6


def test_a_grouped_layer_equals_deepseek(is_compiled: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=WIDTH,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
    )
    layer, x = RandomLayer("swiglu", "plain", is_sigmoid=True, shared_width=WIDTH), 2 * seeded(1)(NUM_ROWS, HIDDEN)
    expected = add_oracle(x, DeepseekV3MoE(config), layer)
    assert relative_error(add_mixer(x, layer.moe, is_compiled=is_compiled), expected) < 2e-6


@pytest.mark.parametrize("name", ["latent", "plain", "grouped"])
def test_a_layer_equals_transformers(
    tiny_of: Callable[[str], Tiny], model_of: Callable[..., NemotronH], name: str, is_compiled: bool
) -> None:
    h = seeded(0)(50, 64)
    ours, theirs = model_of(name, not is_compiled).layers[1].mixer, tiny_of(name).oracle.model.layers[1].mixer
    assert isinstance(ours, MoE)
    with torch.no_grad():
        assert relative_error(ours(h), theirs(h[None])[0]) < 1e-5
