"""The tests compare the routers with transformers and with a slow loop, and check ties and rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextTopKRouter

from model.blocks.router import Router, SigmoidRouter, SoftmaxRouter
from model.configs.expert_shape import ExpertShape
from model.cpu.linear import linear
from model.cpu.moe import choose_experts
from tests.model.steps import seeded

HIDDEN, NUM_EXPERTS, TOP_K, NUM_ROWS = 20, 24, 5, 70
SHAPE = ExpertShape(1, NUM_EXPERTS, TOP_K, HIDDEN, 8)
Route = Callable[[Router, Tensor], tuple[Tensor, Tensor]]


def route_plain(router: Router, h: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        ids, weights = router(h)
    return ids, weights


def route_compiled(router: Router, h: Tensor) -> tuple[Tensor, Tensor]:
    router.pack()
    assert router.packed is not None
    size = (len(h), router.top_k)
    ids, weights = np.empty(size, np.int64), np.empty(size, np.float32)
    choose_experts(linear(h, router.packed).numpy(), *router.kernel_params[1:], ids, weights)
    return torch.from_numpy(ids), torch.from_numpy(weights)


@pytest.fixture(params=[route_compiled, route_plain], ids=["compiled", "plain"])
def route(request: pytest.FixtureRequest) -> Route:
    """Return a function that routes rows with the CPU kernel, and one that routes rows in plain PyTorch."""
    chosen: Route = request.param
    return chosen


def by_id(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    order = ids.argsort(-1)
    return ids.gather(1, order), weights.gather(1, order)


def sigmoid_router(groups: tuple[int, int] = (1, 1), normalize: bool = True, shape: ExpertShape = SHAPE) -> Router:
    """Return a random router; its corrections are near -0.9, so that many values (score plus bias) are below 0."""
    router = SigmoidRouter(shape.input_dim, shape, 2.5, *groups, normalize)
    router.weight.data = seeded(0)(shape.num_experts, shape.input_dim) / 2
    router.e_score_correction_bias = seeded(1)(shape.num_experts) / 4 - 0.9
    return router


def softmax_router(normalize: bool = True) -> Router:
    router = SoftmaxRouter(HIDDEN, SHAPE, normalize)
    router.weight.data = seeded(0)(NUM_EXPERTS, HIDDEN) / 2
    return router


def chosen_slowly(router: Router, h_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids, in ascending order, and the weights that the equations give in float64, row by row."""
    ids, weights = [], []
    for logits in (h_ND.double() @ router.weight.detach().double().T).tolist():
        if isinstance(router, SoftmaxRouter):
            scores = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
            choice, epsilon, factor = scores, 0.0, 1.0
        else:
            assert isinstance(router, SigmoidRouter)
            scores = [1 / (1 + math.exp(-x)) for x in logits]
            choice = [s + b for s, b in zip(scores, router.e_score_correction_bias.tolist(), strict=True)]
            size = len(choice) // router.num_groups
            groups = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]
            groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))
            kept = {e for group in groups[: router.topk_groups] for e in group}
            choice = [c if e in kept else -math.inf for e, c in enumerate(choice)]
            epsilon, factor = 1e-20, router.scaling_factor
        best = sorted(sorted(range(len(choice)), key=lambda e: -choice[e])[: router.top_k])
        total = sum(scores[e] for e in best) + epsilon if router.normalize else 1.0
        ids.append(best)
        weights.append([factor * scores[e] / total for e in best])
    return torch.tensor(ids), torch.tensor(weights)


ROUTERS = {
    "softmax": softmax_router,
    "softmax, not normalized": lambda: softmax_router(normalize=False),
    "sigmoid": sigmoid_router,
    "sigmoid, not normalized": lambda: sigmoid_router(normalize=False),
    "sigmoid, 2 of 4 groups": lambda: sigmoid_router((4, 2)),
    "sigmoid, 6 of 24 groups": lambda: sigmoid_router((24, 6)),
}


@pytest.fixture(params=ROUTERS)
def router(request: pytest.FixtureRequest) -> Router:
    return ROUTERS[request.param]()


def test_a_router_follows_the_equations(route: Route, router: Router) -> None:
    h = seeded(2)(NUM_ROWS, HIDDEN)
    ids, weights = by_id(*route(router, h))
    expected_ids, expected = chosen_slowly(router, h)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (4, 3)], ids=str)
def test_the_sigmoid_router_equals_deepseek(route: Route, groups: tuple[int, int], normalize: bool) -> None:
    router, h = sigmoid_router(groups, normalize), seeded(2)(NUM_ROWS, HIDDEN)
    assert isinstance(router, SigmoidRouter)
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        routed_scaling_factor=2.5,
        n_group=groups[0],
        topk_group=groups[1],
        norm_topk_prob=normalize,
    )
    oracle = DeepseekV3TopkRouter(config)
    oracle.load_state_dict(router.state_dict())
    with torch.no_grad():
        _, expected, expected_ids = oracle(h)
    agree(by_id(*route(router, h)), by_id(expected_ids, expected))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_softmax_router_equals_qwen3_next(route: Route, normalize: bool) -> None:
    router, h = softmax_router(normalize), seeded(2)(NUM_ROWS, HIDDEN)
    config = Qwen3NextConfig(
        hidden_size=HIDDEN, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=normalize
    )
    oracle = Qwen3NextTopKRouter(config)
    oracle.load_state_dict(router.state_dict())
    with torch.no_grad():
        _, expected, expected_ids = oracle(h)
    agree(by_id(*route(router, h)), by_id(expected_ids, expected))


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_among_equal_experts_the_lowest_ids_are_picked(route: Route, router: Router) -> None:
    """Check ties between all experts, and between the two copies of every expert (expert e and expert e + 12)."""
    h = seeded(2)(NUM_ROWS, HIDDEN)
    if isinstance(router, SigmoidRouter):
        router.e_score_correction_bias.zero_()
    router.weight.data[12:] = router.weight.data[:12]
    ids, _ = route(router, h)
    for row in ids.tolist():
        for place, expert in enumerate(row):
            assert expert < 12 or expert - 12 in row[:place]
    router.weight.data.zero_()
    ids, _ = route(router, h)
    assert torch.equal(ids, torch.arange(TOP_K).expand_as(ids))


def test_rows_alone_give_the_same_bits(router: Router) -> None:
    h = seeded(2)(NUM_ROWS, HIDDEN)
    together = route_compiled(router, h)
    for rows in ([0], [69], [5, 3], list(range(1, 30))):
        alone = route_compiled(router, h[rows])
        assert all(torch.equal(one, other[rows]) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("scale", [30.0, 3000.0])
def test_a_softmax_of_large_logits_is_finite(route: Route, scale: float) -> None:
    router = softmax_router()
    router.weight.data *= scale
    _, weights = route(router, seeded(2)(NUM_ROWS, HIDDEN))
    torch.testing.assert_close(weights.sum(-1), torch.ones(NUM_ROWS))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_router_weighs_without_the_bias(route: Route, normalize: bool) -> None:
    """Check that a huge bias makes the router pick experts 1 and 4, but does not change the experts' weights."""
    router = SigmoidRouter(8, ExpertShape(1, 6, 2, 8, 4), 5.0, 1, 1, normalize)
    router.weight.data = seeded(0)(6, 8)
    router.e_score_correction_bias = torch.tensor([0.0, 9.0, 0.0, 0.0, 9.0, 0.0])
    h = seeded(1)(5, 8)
    ids, weights = by_id(*route(router, h))
    scores = (h @ router.weight.detach().T).sigmoid()[:, [1, 4]]
    expected = 5.0 * (scores / scores.sum(-1, keepdim=True) if normalize else scores)
    assert torch.equal(ids, torch.tensor([[1, 4]]).expand(5, 2))
    torch.testing.assert_close(weights, expected)
