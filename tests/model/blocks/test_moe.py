"""The tests compare a MoE layer of the tiny models with the same layer of transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model import kernels
from model.blocks.moe import MoE
from model.configs.expert_shape import ExpertShape
from model.families.nemotron_h import NemotronH
from tests.model.checkpoints import Tiny
from tests.model.steps import relative_error, seeded

NUM_ROWS = 70
SHAPES = [ExpertShape(1, 12, 4, 32, 48), ExpertShape(1, 7, 2, 20, 36), ExpertShape(1, 16, 6, 64, 128)]


@pytest.fixture(params=["compiled", "plain"], autouse=True)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test of this file twice: with the CPU kernels and in plain PyTorch."""
    monkeypatch.setattr(kernels, "has_compiled", lambda: request.param == "compiled")


@pytest.mark.parametrize("name", ["latent", "plain", "grouped"])
def test_a_layer_equals_transformers(
    tiny_of: Callable[[str], Tiny], model_of: Callable[[str], NemotronH], name: str
) -> None:
    h = seeded(0)(50, 64)
    ours, theirs = model_of(name).layers[1].mixer, tiny_of(name).oracle.model.layers[1].mixer
    assert isinstance(ours, MoE)
    with torch.no_grad():
        assert relative_error(ours(h), theirs(h[None])[0]) < 1e-5
