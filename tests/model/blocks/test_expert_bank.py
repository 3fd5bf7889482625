"""The tests compare a layer's experts with a loop in float64 and check that a row's sums do not depend on the call.

A row's sums must have the same bits, whatever other rows and experts are in the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from model import kernels
from model.blocks.expert_bank import ExpertBank, memory_on, silu_by_row
from model.configs.expert_shape import ExpertKind, ExpertShape
from model.configs.weight_format import WeightFormat
from model.exact_sums import from_grid, gain_exponent, grid_exponents
from model.stored_matrix import StoredMatrix
from tests.model import oracles
from tests.model.steps import relative_error, seeded
from tests.model.stored_matrices import random_matrix, same_bits

NUM_ROWS = 70
# One format for each matrix of an expert: (up, down) or, for SwiGLU, (gate, up, down).
FORMATS: list[tuple[WeightFormat, ...]] = [
    ("fp8", "fp8"),
    ("fp8_blocks", "fp8_blocks"),
    ("nvfp4", "nvfp4"),
    ("nvfp4", "fp8"),
    ("plain", "fp8"),
    ("fp8_blocks", "fp8_blocks", "fp8_blocks"),
    ("nvfp4", "nvfp4", "nvfp4"),
    ("nvfp4", "plain", "fp8"),
]
SHAPES = [
    ExpertShape(1, num_experts, top_k, input_dim, width, kind)
    for kind in get_args(ExpertKind)
    for num_experts, top_k, input_dim, width in ((12, 4, 32, 48), (7, 2, 20, 36), (16, 6, 64, 128))
]


def as_stored(tensors: Mapping[str, Tensor]) -> dict[str, StoredMatrix]:
    return {name: StoredMatrix.plain(tensor) for name, tensor in tensors.items()}


class SingleLayer:
    """A `SingleLayer` is a test layer: a bank with all experts of one layer, random rows, and the picks of each row."""

    def __init__(self, shape: ExpertShape, dtype: torch.dtype = torch.float32) -> None:
        randn = seeded(4)
        self.shape, self.bank = shape, ExpertBank(shape, dtype)
        self.experts = {
            expert: {matrix.name: randn(matrix.rows, matrix.columns) / matrix.columns**0.5 for matrix in shape.matrices}
            for expert in range(shape.num_experts)
        }
        for expert, tensors in self.experts.items():
            self.bank.load(expert, as_stored(tensors))
        self.x = randn(NUM_ROWS, shape.input_dim)
        scores = randn(NUM_ROWS, shape.num_experts)
        self.topk_ids = scores.topk(shape.top_k, sorted=False).indices
        self.topk_weights = scores.gather(1, self.topk_ids).sigmoid()
        gain = max(map(self.bank.gain_exponent, self.bank.held))
        self.grid = grid_exponents(self.x, self.topk_weights, gain)

    @property
    def picks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return three tensors with the row, the expert and the weight of every pick."""
        row_P = torch.arange(NUM_ROWS).repeat_interleave(self.shape.top_k)
        return row_P, self.topk_ids.flatten(), self.topk_weights.flatten()

    def sums(self, is_here_P: Tensor | None = None) -> Tensor:
        row_P, expert_P, weight_P = self.picks
        mask = torch.ones(len(row_P), dtype=torch.bool) if is_here_P is None else is_here_P
        return self.bank.partial_sums(self.x, row_P[mask], expert_P[mask], weight_P[mask], self.grid)


@pytest.fixture(params=["compiled", "plain"], autouse=True)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test of this file twice: with the CPU kernels and in plain PyTorch."""
    monkeypatch.setattr(kernels, "has_compiled", lambda: request.param == "compiled")


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> ExpertShape:
    assert isinstance(request.param, ExpertShape)
    return request.param


def test_partial_sums_equal_a_loop_over_picks(shape: ExpertShape) -> None:
    setup = SingleLayer(shape)
    expected = oracles.weighted_experts(setup.x, *setup.picks, setup.experts)
    assert relative_error(from_grid(setup.sums(), setup.grid), expected) < 1e-5


def test_bfloat16_sums_are_near(shape: ExpertShape) -> None:
    setup = SingleLayer(shape, torch.bfloat16)
    expected = oracles.weighted_experts(setup.x, *setup.picks, setup.experts)
    assert relative_error(from_grid(setup.sums(), setup.grid), expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_shards", [2, 3, 5])
def test_any_split_of_the_experts_gives_the_same_bits(shape: ExpertShape, dtype: torch.dtype, num_shards: int) -> None:
    setup = SingleLayer(shape, dtype)
    home = torch.randint(0, num_shards, (shape.num_experts,), generator=torch.Generator().manual_seed(num_shards))
    masks = [home[setup.picks[1]] == shard for shard in range(num_shards)]
    parts = [setup.sums(mask) for mask in masks if bool(mask.any())]
    assert torch.equal(torch.stack(parts).sum(0), setup.sums())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_split_of_the_picks_gives_the_same_bits(shape: ExpertShape, dtype: torch.dtype) -> None:
    """Check that sums have the same bits if two homes of an expert divide the expert's rows between the homes."""
    setup = SingleLayer(shape, dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        is_here = torch.rand(len(setup.picks[0]), generator=generator) < 0.4
        assert torch.equal(setup.sums(is_here) + setup.sums(~is_here), setup.sums())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [[0], [69], [5, 3], list(range(1, 30))], ids=len)
def test_rows_alone_give_the_same_bits(shape: ExpertShape, dtype: torch.dtype, rows: list[int]) -> None:
    setup = SingleLayer(shape, dtype)
    row_P = torch.arange(len(rows)).repeat_interleave(shape.top_k)
    picks = row_P, setup.topk_ids[rows].flatten(), setup.topk_weights[rows].flatten()
    assert torch.equal(setup.bank.partial_sums(setup.x[rows], *picks, setup.grid[rows]), setup.sums()[rows])


def test_more_rows_than_one_product_takes() -> None:
    setup = SingleLayer(SHAPES[0])
    num_rows = (setup.bank.row_blocking().max_rows if not setup.bank.is_compiled else 256) + 37
    x, expert = setup.x[:1].expand(num_rows, -1), torch.zeros(num_rows, dtype=torch.long)
    sums = setup.bank.partial_sums(
        x, torch.arange(num_rows), expert, torch.ones(num_rows), setup.grid[:1].expand(num_rows)
    )
    assert torch.equal(sums, sums[:1].expand_as(sums))


@pytest.mark.parametrize("width", [36, 1000])
def test_silu_of_rows_alone_gives_the_same_bits(width: int) -> None:
    x = seeded(0)(NUM_ROWS, width)
    together = silu_by_row(x)
    torch.testing.assert_close(together, torch.nn.functional.silu(x))
    for n in (1, 2, 3, 5, 7, 33):
        assert torch.equal(silu_by_row(x[-n:]), together[-n:])


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("shape", "name"), [(shape, matrix.name) for shape in SHAPES[::3] for matrix in shape.matrices], ids=str
)
def test_a_damaged_expert_is_refused(shape: ExpertShape, name: str, damage: float) -> None:
    setup = SingleLayer(shape)
    damaged = setup.experts[2][name].clone()
    damaged[0, 0] = damage
    setup.bank.load(2, as_stored(setup.experts[2] | {name: damaged}))
    with pytest.raises(ValueError, match="an expert's output is not finite"):
        setup.sums()


def test_a_bank_forgets_what_it_unloads() -> None:
    bank = SingleLayer(SHAPES[0]).bank
    one = SHAPES[0].nbytes(torch.float32)
    assert one == 2 * 32 * 48 * 4
    bank.unload(3)
    assert bank.held == set(range(12)) - {3}
    assert bank.nbytes == 11 * one
    with pytest.raises(KeyError):
        bank.gain_exponent(3)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bank_gives_back_what_it_computes_with(shape: ExpertShape, dtype: torch.dtype, stored: torch.dtype) -> None:
    setup = SingleLayer(shape, dtype)
    tensors = {name: tensor.to(stored) for name, tensor in setup.experts[3].items()}
    setup.bank.load(3, as_stored(tensors))
    given = setup.bank.matrices(3)
    assert list(given) == [matrix.name for matrix in shape.matrices]
    for name, matrix in given.items():
        [weight] = matrix.parts
        assert (matrix.format, weight.dtype) == ("plain", dtype)
        assert torch.equal(weight, tensors[name].to(dtype))
    other = ExpertBank(shape, dtype)
    other.load(3, given)
    rows, ids, ones = torch.arange(NUM_ROWS), torch.full((NUM_ROWS,), 3), torch.ones(NUM_ROWS)
    sums = [bank.partial_sums(setup.x, rows, ids, ones, setup.grid) for bank in (setup.bank, other)]
    assert torch.equal(*sums)


def quantized_shape(formats: tuple[WeightFormat, ...]) -> ExpertShape:
    return ExpertShape(1, 4, 2, 192, 272, "swiglu" if len(formats) == 3 else "relu2", formats)


def quantized(
    formats: tuple[WeightFormat, ...], dtype: torch.dtype
) -> tuple[ExpertBank, list[dict[str, StoredMatrix]]]:
    """Return a bank that holds experts of random codes, and the experts' matrices."""
    bank = ExpertBank(quantized_shape(formats), dtype)
    experts = []
    for expert in range(bank.shape.num_experts):
        matrices = {
            matrix.name: random_matrix(matrix.format, matrix.rows, matrix.columns, seed=expert).to("cpu", dtype)
            for matrix in bank.shape.matrices
        }
        bank.load(expert, matrices)
        experts.append(matrices)
    return bank, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_quantized_experts_give_the_bits_of_dequantized_ones(
    formats: tuple[WeightFormat, ...], dtype: torch.dtype
) -> None:
    """Check that quantized experts on a CPU are computed with exact weights, even if plain experts were bf16.

    In plain PyTorch, quantized experts are dequantized to the dtype of the bank.
    """
    bank, experts = quantized(formats, dtype)
    shape = replace(bank.shape, formats=())
    copy = ExpertBank(shape, torch.float32 if bank.is_compiled else dtype)
    for expert, matrices in enumerate(experts):
        copy.load(expert, {name: StoredMatrix.plain(one.dequantized()) for name, one in matrices.items()})
        assert bank.gain_exponent(expert) == copy.gain_exponent(expert)
    x, ids = seeded(1)(NUM_ROWS, 192), torch.arange(2 * NUM_ROWS) * 7 % 4
    grid = grid_exponents(x, torch.ones(NUM_ROWS, 1), bank.gain_exponent(0))
    picks = torch.arange(NUM_ROWS).repeat_interleave(2), ids, seeded(2)(2 * NUM_ROWS).abs()
    assert torch.equal(*(one.partial_sums(x, *picks, grid) for one in (bank, copy)))


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_a_bank_gives_back_the_stored_bytes(formats: tuple[WeightFormat, ...]) -> None:
    bank, experts = quantized(formats, torch.bfloat16)
    for expert, matrices in enumerate(experts):
        if not bank.is_compiled:  # only the dequantized numbers are left
            with pytest.raises(KeyError):
                bank.matrices(expert)
            continue
        given = bank.matrices(expert)
        assert [one.format for one in given.values()] == list(formats)
        for name, one in given.items():
            assert all(same_bits(*parts) for parts in zip(one.parts, matrices[name].parts, strict=True))
    assert bank.nbytes == sum(one.nbytes for matrices in experts for one in matrices.values())
    bank.unload(2)
    with pytest.raises(KeyError):
        bank.matrices(2)


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_experts_take_the_memory_that_is_counted_for_them(formats: tuple[WeightFormat, ...]) -> None:
    """Check that experts take their stored bytes in the CPU kernels, and in plain PyTorch those of bf16 numbers."""
    bank, experts = quantized(formats, torch.bfloat16)
    counted = len(experts) * memory_on([bank.shape], torch.bfloat16, "cpu")[1].device
    if bank.is_compiled:
        assert bank.nbytes == counted <= bank.used_memory() <= 1.05 * counted
    else:
        assert bank.used_memory() == counted == len(experts) * len(formats) * 192 * 272 * 2


def test_an_expert_that_is_loaded_again_keeps_its_place() -> None:
    setup = SingleLayer(SHAPES[0])
    before = setup.sums()
    for expert in range(12):
        setup.bank.load(expert, as_stored(setup.experts[expert]))
    assert torch.equal(setup.sums(), before)


def test_a_bank_finds_the_gain_of_the_numbers_that_it_computes_with() -> None:
    """Check that a bank finds the gain that a shard finds, which converts the weights before it loads them."""
    tensors = {"up": torch.ones(2, 2), "down": torch.full((2, 2), 0.2886)}  # in bf16, 0.2886 becomes 0.2891
    for dtype, gain in ((torch.float32, 0), (torch.bfloat16, 1)):
        bank = ExpertBank(ExpertShape(1, 1, 1, 2, 2), dtype)
        bank.load(0, as_stored(tensors))
        converted = as_stored({name: tensor.to(dtype) for name, tensor in tensors.items()})
        assert bank.gain_exponent(0) == gain_exponent(converted) == gain


def test_uneven_experts_of_a_bfloat16_bank_come_back() -> None:
    bank = ExpertBank(ExpertShape(1, 2, 1, 29, 37), torch.bfloat16)
    bank.load(1, as_stored({"up": seeded(0)(37, 29), "down": seeded(1)(29, 37)}))
    given = bank.matrices(1)
    assert same_bits(given["up"].parts[0], seeded(0)(37, 29).bfloat16())
    assert same_bits(given["down"].parts[0], seeded(1)(29, 37).bfloat16())
