"""The tests check that exact sums depend neither on the order of the contributions nor on the shards that add them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.configs.expert_shape import ExpertKind
from model.exact_sums import (
    FRACTION_BITS,
    add_on_grid,
    from_grid,
    gain_exponent,
    grid_exponents,
    log_wide_spread,
    mean_square_gain,
    scale_to_grid,
)
from model.stored_matrix import StoredMatrix
from tests.model import oracles
from tests.model.steps import relative_error, seeded

NUM_ROWS, NUM_PICKS, DIM = 6, 40, 9


def expert(up_ML: Tensor, down_LM: Tensor, gate_ML: Tensor | None = None) -> dict[str, StoredMatrix]:
    tensors = {"up": up_ML, "down": down_LM} if gate_ML is None else {"gate": gate_ML, "up": up_ML, "down": down_LM}
    return {name: StoredMatrix.plain(tensor) for name, tensor in tensors.items()}


def contributions(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random picks whose contributions differ by orders of magnitude: y, weight, row, and each row's grid."""
    randn = seeded(seed)
    y = randn(NUM_PICKS, DIM) * torch.exp(3 * randn(NUM_PICKS, 1))
    weight = randn(NUM_PICKS).abs()
    row = torch.randint(0, NUM_ROWS, (NUM_PICKS,), generator=torch.Generator().manual_seed(seed))
    return y, weight, row, grid_exponents(randn(NUM_ROWS, DIM), weight[:NUM_ROWS, None], 1)


def add(y: Tensor, weight: Tensor, row: Tensor, grid: Tensor) -> Tensor:
    scale = scale_to_grid(weight.numpy(), grid[row].numpy())
    return add_on_grid(y, torch.from_numpy(scale), row, len(grid))


@pytest.mark.parametrize("seed", range(5))
def test_any_order_gives_the_same_bits(seed: int) -> None:
    y, weight, row, grid = contributions(seed)
    expected = from_grid(add(y, weight, row, grid), grid)
    for _ in range(20):
        order = torch.randperm(NUM_PICKS)
        assert torch.equal(from_grid(add(y[order], weight[order], row[order], grid), grid), expected)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5, 11])
def test_any_partition_gives_the_same_bits(num_shards: int) -> None:
    y, weight, row, grid = contributions(7)
    expected = from_grid(add(y, weight, row, grid), grid)
    for seed in range(10):
        shard = torch.randint(0, num_shards, (NUM_PICKS,), generator=torch.Generator().manual_seed(seed))
        picks = [shard == s for s in range(num_shards) if bool((shard == s).any())]
        partial = [add(y[own], weight[own], row[own], grid) for own in picks]
        assert torch.equal(from_grid(torch.stack(partial).sum(0), grid), expected)


def test_float_sums_would_differ() -> None:
    """Check that the tests of exact sums can fail: float sums of the same picks in another order have other bits."""
    y, weight, row, grid = contributions(7)
    terms = y * weight[:, None]
    plain = [
        torch.zeros(NUM_ROWS, DIM).index_add_(0, row[order], terms[order]) for order in map(torch.randperm, [40] * 20)
    ]
    assert any(not torch.equal(plain[0], other) for other in plain)
    assert grid.dtype == torch.int16


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_half_a_unit_a_pick_and_one_rounding(seed: int) -> None:
    y, weight, row, grid = contributions(seed)
    terms = y.double() * weight.double()[:, None]
    expected = torch.zeros(NUM_ROWS, DIM, dtype=torch.float64).index_add_(0, row, terms)
    num_picks = torch.bincount(row, minlength=NUM_ROWS)[:, None]
    bound = num_picks * torch.exp2(grid.double())[:, None] / 2 + expected.abs() * 2.0**-23
    assert bool(((from_grid(add(y, weight, row, grid), grid) - expected).abs() <= bound).all())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_a_unit_is_small_against_what_experts_give(scale: float, size: float) -> None:
    """Check that contributions have a root mean square near 2**FRACTION_BITS units at any scale of weights and rows."""
    randn = seeded(3)
    up, down, x = scale * randn(64, 32), randn(32, 64), size * randn(50, 32)
    y = torch.relu(x @ up.T).square() @ down.T
    grid = grid_exponents(x, torch.ones(50, 1), gain_exponent(expert(up, down)))
    units = y.double() / torch.exp2(grid.double())[:, None]
    assert 2.0 ** (FRACTION_BITS - 4) < float(units.square().mean().sqrt()) < 2.0 ** (FRACTION_BITS + 2)


@pytest.mark.parametrize("kind", ["relu2", "swiglu"])
@pytest.mark.parametrize("weight_scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("row_scale", [0.25, 1.0, 4.0])
def test_the_predicted_size_is_within_half_a_bit_of_the_measured_size(
    kind: ExpertKind, row_scale: float, weight_scale: float
) -> None:
    randn, (dim, width) = seeded(5), (96, 160)
    up, gate = (weight_scale * randn(width, dim) / dim**0.5 for _ in range(2))
    down = randn(dim, width) / width**0.5
    matrices = expert(up, down, gate if kind == "swiglu" else None)
    x = row_scale * randn(2000, dim)
    outputs = oracles.expert(x, {name: matrix.parts[0] for name, matrix in matrices.items()})
    measured = float(outputs.square().mean().sqrt())
    predicted = row_scale**2 * mean_square_gain(matrices) ** 0.5
    assert abs(math.log2(predicted / measured)) < 0.5


def test_a_layer_whose_gains_spread_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert not log_wide_spread(3, {})
    assert not log_wide_spread(3, {1: 1, 2: 2, 8: 1})
    assert not log_wide_spread(3, {2: 2, 9: 2})
    assert caplog.text == ""
    assert log_wide_spread(3, {1: 1, 2: 2, 9: 1})
    [record] = caplog.records
    assert record.getMessage() == (
        "The outputs of one expert of layer 3 may be 2**7 times as large as those of most experts: "
        "their sums then keep only about 15 bits."
    )


def test_the_grid_belongs_to_the_row_alone() -> None:
    randn = seeded(0)
    x, weights = randn(8, 16), randn(8, 3).abs()
    whole = grid_exponents(x, weights, 2)
    for rows in ([3], [7, 0], [1, 2, 3, 4]):
        assert torch.equal(grid_exponents(x[rows], weights[rows], 2), whole[rows])


def test_zero_rows_and_zero_weights() -> None:
    grid = grid_exponents(
        torch.zeros(2, 4), torch.zeros(2, 3), gain_exponent(expert(torch.zeros(5, 4), torch.zeros(4, 5)))
    )
    sums = add(torch.zeros(2, 4), torch.zeros(2), torch.tensor([0, 1]), grid)
    assert torch.equal(from_grid(sums, grid), torch.zeros(2, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_cannot_be_added_is_refused(value: float) -> None:
    y, weight, row, grid = contributions(0)
    y[3, 2] = value
    with pytest.raises(ValueError, match="not finite or too large to add"):
        add(y, weight, row, grid)


def test_damaged_weights_do_not_stop_the_loading() -> None:
    """Check that damaged weights have a gain exponent, so that loading succeeds; the first sum then raises an error."""
    assert gain_exponent(expert(torch.full((2, 3), torch.inf), torch.ones(3, 2))) == 0
    assert gain_exponent(expert(torch.full((2, 3), torch.nan), torch.ones(3, 2))) == 0
    assert gain_exponent(expert(torch.ones(2, 3), torch.ones(3, 2), torch.full((2, 3), torch.inf))) == 0


def test_sums_come_back_as_fp32() -> None:
    y, weight, row, grid = contributions(1)
    sums = add(y, weight, row, grid)
    assert (sums.dtype, sums.shape) == (torch.int64, (NUM_ROWS, DIM))
    assert from_grid(sums, grid).dtype == torch.float32
    again = torch.zeros(NUM_ROWS, DIM).index_add_(0, row, y * weight[:, None])
    assert relative_error(from_grid(sums, grid), again) < 1e-6
