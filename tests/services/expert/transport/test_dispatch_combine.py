"""These tests check that dispatch sends every pick once with its row, and that combine adds sums to the right rows."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.dispatch.routing import group
from services.expert.transport.dispatch_combine import combine, dispatch, narrow

TOP_K, INPUT_DIM = 3, 4


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_every_pick_goes_to_its_home_once(seed: int, kind: type[np.generic]) -> None:
    draw = np.random.default_rng(seed)
    num_rows, num_shards, max_rows = (int(draw.integers(1, most)) for most in (20, 5, 6))
    x_NL = draw.integers(-99, 99, (num_rows, INPUT_DIM)).astype(kind)
    grid_N = draw.integers(-9, 9, num_rows).astype(np.int16)
    expert_P, weight_P = draw.integers(0, 9, num_rows * TOP_K), draw.random(num_rows * TOP_K, np.float32)
    pick_Q = np.flatnonzero(draw.random(num_rows * TOP_K) < 0.7)
    home_Q = draw.integers(0, num_shards, len(pick_Q))
    sorted_Q, *lists = group(pick_Q, home_Q, expert_P, TOP_K, num_shards, 9, max_rows)
    first_M, shard_M, num_rows_M, num_experts_M = lists
    parts = dispatch(x_NL, grid_N, expert_P, weight_P, sorted_Q, np.array(first_M), TOP_K)
    first_row_M = parts.first_row_M.tolist()
    found = []
    for m, shard in enumerate(shard_M):
        rows, picks = slice(first_row_M[m], first_row_M[m + 1]), slice(first_M[m], first_M[m + 1])
        num_rows = rows.stop - rows.start
        assert len(set(parts.row_R[rows].tolist())) == num_rows == num_rows_M[m] <= max_rows
        local_Q, pick_M = parts.local_Q[picks], sorted_Q[picks]
        assert sorted(set(local_Q.tolist())) == list(range(num_rows))
        row_Q = parts.row_R[rows][local_Q]
        assert np.array_equal(row_Q, pick_M // TOP_K)
        assert np.array_equal(parts.x_RL[rows][local_Q], x_NL[row_Q])
        assert np.array_equal(parts.grid_R[rows][local_Q], grid_N[row_Q])
        assert np.array_equal(parts.expert_Q[picks], expert_P[pick_M])
        assert np.array_equal(parts.weight_Q[picks], weight_P[pick_M])
        assert len(set(expert_P[pick_M].tolist())) == num_experts_M[m]
        found += [(pick, shard) for pick in pick_M.tolist()]
    assert sorted(found) == sorted(zip(pick_Q.tolist(), home_Q.tolist(), strict=True))


@pytest.mark.parametrize("width", [4, 8])
def test_sums_are_added_to_their_rows(width: int) -> None:
    sums_NL = np.ones((3, 2), np.int64)
    part = np.array([[5, -6], [7, 8]], f"<i{width}")
    combine(np.frombuffer(part.tobytes(), part.dtype).reshape(2, 2), np.array([2, 0]), sums_NL)
    assert sums_NL.tolist() == [[8, 9], [1, 1], [6, -5]]


@pytest.mark.parametrize(("largest", "fits"), [(2**31 - 1, True), (-(2**31), True), (2**31, False), (-(2**40), False)])
def test_narrowing_says_whether_all_fit(largest: int, fits: bool) -> None:
    narrow_NL = np.zeros((1, 3), np.int32)
    assert narrow(np.array([[0, largest, 5]]), narrow_NL) == fits
    if fits:
        assert narrow_NL.tolist() == [[0, largest, 5]]
