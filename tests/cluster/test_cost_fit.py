from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.cost_fit import CostFit
from cluster.topology import CostModel

Calls = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def make_calls(num_calls: int, seed: int) -> Calls:
    draw = np.random.default_rng(seed)
    num_rows = np.floor(2.0 ** draw.uniform(0, 8, num_calls))
    num_experts = np.floor(np.minimum(num_rows * draw.uniform(1, 4, num_calls), 32))
    return num_experts, num_rows, draw.choice([0.5, 4.0], num_calls)


def times(cost_model: CostModel, calls: Calls) -> NDArray[np.float64]:
    num_experts, num_rows, mib = calls
    return cost_model.call_us + mib * (
        cost_model.weight_us_per_mib * num_experts + cost_model.row_us_per_mib * num_rows
    )


def is_near(fit: CostFit, cost_model: CostModel, calls: Calls, tolerance: float) -> bool:
    return bool(np.allclose(times(fit.cost_model, calls), times(cost_model, calls), rtol=tolerance))


@pytest.mark.parametrize(
    "cost_model",
    [CostModel(80.0, 90.0, 4.0), CostModel(5.0, 2.0, 0.1), CostModel(2000.0, 0.0, 50.0), CostModel(0.0, 7.0, 0.0)],
)
def test_the_cost_model_behind_the_calls_is_found(cost_model: CostModel) -> None:
    fit = CostFit()
    for seed in range(10):
        calls = make_calls(100, seed)
        fit.observe(*calls, times(cost_model, calls))
    assert is_near(fit, cost_model, calls, 0.03)


def test_noise_and_pauses_do_not_move_it_far() -> None:
    cost_model, fit, draw = CostModel(60.0, 100.0, 10.0), CostFit(), np.random.default_rng(1)
    for seed in range(20):
        calls = make_calls(100, seed)
        took_us = times(cost_model, calls) * draw.lognormal(0, 0.1, 100)
        took_us[draw.random(100) < 0.03] += 100_000
        fit.observe(*calls, took_us)
    assert is_near(fit, cost_model, calls, 0.25)


def test_a_shard_that_became_twenty_times_slower_is_believed() -> None:
    cost_model, slow, fit = CostModel(60.0, 100.0, 10.0), CostModel(1200.0, 2000.0, 200.0), CostFit()
    for seed in range(20):
        calls = make_calls(100, seed)
        fit.observe(*calls, times(cost_model, calls))
    for _ in range(20):
        fit.observe(*calls, times(slow, calls))
    assert is_near(fit, slow, calls, 0.5)


def test_calls_of_one_kind_alone_give_the_right_time_for_that_kind_and_no_negative_cost() -> None:
    fit, cost_model = CostFit(), CostModel(30.0, 5.0, 1.0)
    calls = (np.full(50, 4.0), np.ones(50), np.full(50, 0.06))
    for _ in range(20):
        fit.observe(*calls, times(cost_model, calls))
    assert is_near(fit, cost_model, calls, 0.05)
    assert min(fit.cost_model.call_us, fit.cost_model.weight_us_per_mib, fit.cost_model.row_us_per_mib) >= 0


def test_without_calls_the_first_guess_stays() -> None:
    empty = np.zeros(0)
    assert CostFit().observe(empty, empty, empty, empty) == CostModel()
