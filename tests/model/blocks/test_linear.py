"""The tests check that the CPU kernels' products and PyTorch's products under a row blocking are batch-invariant."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.blocks.linear import Linear, RowBlocking, find_row_blocking, is_batch_invariant
from tests.model.steps import seeded

SHAPES = [(64, 128), (128, 64), (40, 24), (256, 96), (33, 70), (512, 1024)]
# Numbers of threads and shapes of PyTorch's products. With 2 threads, waiting for the other core makes products slow.
PLANNED = [
    *((1, *shape) for shape in SHAPES),
    *(pytest.param(2, *shape, marks=pytest.mark.serial) for shape in ((256, 96), (33, 70), (512, 1024))),
]


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.serial)], ids="{} threads".format)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def packed_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
    layer.requires_grad_(False).pack()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_our_rows_do_not_depend_on_their_company(
    num_threads: int, dtype: torch.dtype, num_inputs: int, num_outputs: int
) -> None:
    randn = seeded(num_inputs)
    weight, x = randn(num_outputs, num_inputs).to(dtype), randn(700, num_inputs)
    layer = packed_linear(weight)
    whole = layer(x)
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for num_rows in (0, 1, 2, 3, 5, 7, 8, 12, 13, 20, 31, 65, 130):
        rows = torch.randperm(700, generator=generator)[:num_rows]
        assert torch.equal(layer(x[rows]), whole[rows])


def test_threads_change_no_bit() -> None:
    randn, results = seeded(0), []
    layer, x = packed_linear(randn(4000, 512)), randn(40, 512)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(layer(x))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_bias_is_added_and_any_leading_shape_is_kept() -> None:
    randn = seeded(0)
    weight, bias, x = randn(33, 24), randn(33), randn(2, 3, 24)
    torch.testing.assert_close(packed_linear(weight, bias)(x), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_threads", "num_inputs", "num_outputs"), PLANNED, indirect=["num_threads"])
def test_planned_rows_do_not_depend_on_their_company(
    num_threads: int, dtype: torch.dtype, num_inputs: int, num_outputs: int
) -> None:
    blocking = find_row_blocking(num_inputs, num_outputs, dtype, "cpu", num_threads)
    randn = seeded(num_inputs)
    weight, x = randn(num_outputs, num_inputs).to(dtype), randn(blocking.max_rows, num_inputs).to(dtype)
    whole = F.linear(x, weight)
    generator = torch.Generator().manual_seed(0)
    for num_rows in range(blocking.multiple, blocking.max_rows + 1, blocking.multiple):
        rows = torch.randperm(blocking.max_rows, generator=generator)[:num_rows]
        assert torch.equal(F.linear(x[rows], weight), whole[rows])


def halves_added(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer's product as the sum of two parts, so that the terms are added in another order."""
    cut = x.shape[1] // 3
    return x[:, :cut] @ weight[:, :cut].T + x[:, cut:] @ weight[:, cut:].T


plain_linear = F.linear


def other_unless_multiple_of_4(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return plain_linear(x, weight) if x.shape[0] % 4 == 0 else halves_added(x, weight)


def other_beyond_100_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return plain_linear(x, weight) if x.shape[0] <= 100 else halves_added(x, weight)


def other_at_136_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return plain_linear(x, weight) if x.shape[0] != 136 else halves_added(x, weight)


def other_in_the_first_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.cat([halves_added(x[:1], weight), plain_linear(x[1:], weight)])


def row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer's product row by row; this product is batch-invariant."""
    return (x.double()[:, None] * weight.double()).sum(-1).to(x.dtype)


def test_planted_products_that_vary_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "plain_linear", row_by_row)
    weight = seeded(0)(48, 96)
    find = find_row_blocking.__wrapped__
    monkeypatch.setattr(F, "linear", other_unless_multiple_of_4)
    assert not is_batch_invariant(weight, RowBlocking(2, 64))
    assert is_batch_invariant(weight, RowBlocking(4, 64))
    assert find(96, 48, torch.float32, "cpu", 1) == RowBlocking(4, 256)
    monkeypatch.setattr(F, "linear", other_beyond_100_rows)
    assert find(96, 48, torch.float32, "cpu", 1) == RowBlocking(1, 64)
    monkeypatch.setattr(F, "linear", other_at_136_rows)
    assert find(96, 48, torch.float32, "cpu", 1) == RowBlocking(1, 128)
    monkeypatch.setattr(F, "linear", other_in_the_first_row)
    assert find(96, 48, torch.float32, "cpu", 1) == RowBlocking(1, 1)
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: torch.rand(len(x), len(weight)))
    with pytest.raises(RuntimeError, match="products of 96x48 on cpu batch-invariant"):
        find(96, 48, torch.float32, "cpu", 1)
