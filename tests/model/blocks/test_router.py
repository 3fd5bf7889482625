"""The tests check which experts a router picks, and how it weighs them."""

from __future__ import annotations

import pytest
import torch

from model.blocks.router import Router
from model.configs.expert_shape import ExpertShape
from tests.model.steps import seeded

NUM_ROWS = 70
SHAPES = [ExpertShape(1, 12, 4, 32, 48), ExpertShape(1, 7, 2, 20, 36), ExpertShape(1, 16, 6, 64, 128)]


@pytest.mark.parametrize("normalize", [True, False])
def test_the_router_weighs_without_the_bias(normalize: bool) -> None:
    """Check that a huge bias makes the router pick experts 1 and 4, but does not change the experts' weights."""
    router = Router(8, ExpertShape(1, 6, 2, 8, 4), 5.0, 1, 1, normalize)
    router.weight.data = seeded(0)(6, 8)
    router.e_score_correction_bias = torch.tensor([0.0, 9.0, 0.0, 0.0, 9.0, 0.0])
    h = seeded(1)(5, 8)
    with torch.no_grad():
        ids, weights = router(h)
    scores = (h @ router.weight.detach().T).sigmoid()[:, [1, 4]]
    expected = 5.0 * (scores / scores.sum(-1, keepdim=True) if normalize else scores)
    order = ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), torch.tensor([[1, 4]]).expand(5, 2))
    torch.testing.assert_close(weights.gather(1, order), expected)


def test_the_router_keeps_to_the_best_groups() -> None:
    router = Router(8, ExpertShape(1, 8, 3, 8, 4), 1.0, 4, 2, True)
    router.weight.data = seeded(0)(8, 8)
    router.e_score_correction_bias = torch.zeros(8)
    with torch.no_grad():
        ids, _ = router(seeded(1)(40, 8))
    assert all(len({expert // 2 for expert in row}) <= 2 for row in ids.tolist())
