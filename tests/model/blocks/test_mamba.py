"""The tests compare the parts of the Mamba-2 mixer with the oracle, which computes token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.blocks import mamba
from model.blocks.norm import GatedGroupRMSNorm
from model.state import Batch, SubBatch
from tests.model import oracles
from tests.model.steps import relative_error, seeded

HEADS, HEAD_DIM, STATE_DIM = 6, 5, 7


def sub_batch_of(lens: tuple[int, ...], context_lens: tuple[int, ...]) -> SubBatch:
    return SubBatch(torch.arange(len(lens)), torch.arange(sum(lens)), lens, context_lens)


def scan_inputs(num_tokens: int, num_groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return random inputs of a scan: x, Δ with values from tiny to large, A, B and C."""
    randn = seeded(seed)
    delta = torch.exp(2 * randn(num_tokens, HEADS) - 3)
    b, c = randn(num_tokens, num_groups, STATE_DIM), randn(num_tokens, num_groups, STATE_DIM)
    return randn(num_tokens, HEADS, HEAD_DIM), delta, -torch.exp(randn(HEADS)), b, c


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize(
    ("lens", "context_lens"),
    [((1,), (0,)), ((16,), (0,)), ((37,), (0,)), ((9, 2, 33, 4), (0, 16, 3, 4)), ((5, 5), (7, 12))],
    ids=str,
)
def test_the_chunked_scan_equals_the_recurrence(
    chunk_size: int, num_groups: int, lens: tuple[int, ...], context_lens: tuple[int, ...]
) -> None:
    x, delta, a, b, c = scan_inputs(sum(lens), num_groups)
    state = seeded(1)(len(lens), HEADS, HEAD_DIM, STATE_DIM)
    y, final = mamba.packed_scan(x, delta, a, b, c, state, sub_batch_of(lens, context_lens), chunk_size)
    start = 0
    for r, length in enumerate(lens):
        rows = slice(start, start + length)
        expected_y, expected_final = oracles.recurrence(x[rows], delta[rows], a, b[rows], c[rows], state[r])
        assert relative_error(y[rows], expected_y) < 1e-5
        assert relative_error(final[r], expected_final) < 1e-5
        start += length


def test_the_scan_split_at_chunks_is_the_same_bit_for_bit() -> None:
    x, delta, a, b, c = scan_inputs(40, 2)
    zeros = torch.zeros(1, HEADS, HEAD_DIM, STATE_DIM)
    whole, final = mamba.packed_scan(x, delta, a, b, c, zeros, sub_batch_of((40,), (0,)), 8)
    parts, state = [], zeros
    for start, stop in ((0, 16), (16, 24), (24, 40)):
        rows = slice(start, stop)
        sub_batch = sub_batch_of((stop - start,), (start,))
        y, state = mamba.packed_scan(x[rows], delta[rows], a, b[rows], c[rows], state, sub_batch, 8)
        parts.append(y)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(state, final)


def test_large_steps_do_not_overflow() -> None:
    """Check that Δ·A of minus several thousand gives a decay of 0 and no overflow in an exp of a positive number."""
    x, delta, a, b, c = scan_inputs(32, 1)
    state = seeded(1)(1, HEADS, HEAD_DIM, STATE_DIM)
    y, final = mamba.packed_scan(x, delta + 300, a * 50, b, c, state, sub_batch_of((32,), (0,)), 16)
    expected_y, expected_final = oracles.recurrence(x, delta + 300, a * 50, b, c, state[0])
    assert relative_error(y, expected_y) < 1e-5
    assert relative_error(final[0], expected_final) < 1e-5


@pytest.mark.parametrize("num_groups", [1, 3])
def test_one_step_equals_the_recurrence(num_groups: int) -> None:
    x, delta, a, b, c = scan_inputs(4, num_groups)
    state = seeded(1)(4, HEADS, HEAD_DIM, STATE_DIM)
    y, final = mamba.ssd_step(x, delta, a, b, c, state)
    for r in range(4):
        one = slice(r, r + 1)
        expected_y, expected_final = oracles.recurrence(x[one], delta[one], a, b[one], c[one], state[r])
        assert relative_error(y[one], expected_y) < 1e-5
        assert relative_error(final[r], expected_final) < 1e-5


@pytest.mark.parametrize("num_taps", [2, 4])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("lens", [(1, 1, 1), (5,), (1, 9, 2)], ids=str)
def test_the_packed_convolution_equals_the_sum(num_taps: int, has_bias: bool, lens: tuple[int, ...]) -> None:
    randn = seeded(0)
    xbc, weight, past = randn(sum(lens), 6), randn(6, num_taps), randn(len(lens), num_taps - 1, 6)
    bias = randn(6) if has_bias else None
    num = len(lens)
    batch = Batch(torch.zeros(sum(lens), dtype=torch.long), lens, (0,) * num, tuple(range(num)), ((0,),) * num)
    out, new_past = mamba.causal_conv(xbc, weight, bias, past, batch)
    for r, (own, own_out) in enumerate(zip(xbc.split(list(lens)), out.split(list(lens)), strict=True)):
        expected, expected_past = oracles.convolution(own, weight, bias, past[r])
        assert relative_error(own_out, expected) < 1e-5
        assert relative_error(new_past[r], expected_past) < 1e-6


def test_the_gated_norm_gates_first_and_norms_each_group_alone() -> None:
    randn = seeded(0)
    norm = GatedGroupRMSNorm(12, num_groups=3, eps=1e-5)
    norm.weight.data = randn(12)
    y, gate = randn(4, 12), randn(4, 12)
    u = y.double() * gate.double() * gate.double().sigmoid()
    parts = [oracles.rms_norm(part, torch.ones(4)) for part in u.split(4, dim=-1)]
    assert relative_error(norm(y, gate).detach(), torch.cat(parts, dim=-1) * norm.weight.detach()) < 1e-5


def test_pieces_end_at_absolute_multiples_of_the_chunk() -> None:
    chunks = mamba.split_into_chunks((5, 9), (3, 8), 4)
    pad = 14
    assert chunks.rows_PQ.tolist() == [
        [0, pad, pad, pad],
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, 10, 11, 12],
        [13, pad, pad, pad],
    ]
    assert [(p.tolist(), r.tolist()) for p, r in chunks.chain] == [([0, 2], [0, 1]), ([1, 3], [0, 1]), ([4], [1])]
