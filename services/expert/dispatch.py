"""Dispatch and combine, compiled: a layer's rows cut into what each shard gets, and sums added up as they come back.

In numpy both cost a hundred small calls a layer, more than the arithmetic of a token's experts.

Legend: N rows, P picks (the picks of a row stand together), K picks a row, L expert input dim; of one dispatch, sorted
by shard: Q picks, M rows (a row that goes to two shards is there twice), S shards.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

import model.cpu  # noqa: F401 - which says where compiled code is kept


class Dispatch(NamedTuple):
    """Every shard's part as slices: picks `first_pick_S[s] : first_pick_S[s + 1]`, rows likewise."""

    first_pick_S: NDArray[np.int64]
    first_row_S: NDArray[np.int64]
    pick_Q: NDArray[np.int64]  # which pick of the call
    row_M: NDArray[np.int64]  # which row of the call
    x_ML: NDArray[np.generic]
    grid_M: NDArray[np.int16]
    local_Q: NDArray[np.int32]  # which row of the shard's part
    expert_Q: NDArray[np.int32]
    weight_Q: NDArray[np.float32]

    def picks_of(self, shard: int, rows: slice) -> slice:
        """The picks of these rows of the shard."""
        first, last = self.first_pick_S[shard], self.first_pick_S[shard + 1]
        if (rows.start, rows.stop) == (self.first_row_S[shard], self.first_row_S[shard + 1]):
            return slice(first, last)
        bounds = (rows.start - self.first_row_S[shard], rows.stop - self.first_row_S[shard])
        start, stop = np.searchsorted(self.local_Q[first:last], bounds)
        return slice(first + start, first + stop)


@njit(error_model="numpy", cache=True)  # type: ignore[untyped-decorator]
def _dispatch(
    x_NL: Any, grid_N: Any, expert_P: Any, weight_P: Any, pick_Q: Any, home_Q: Any, top_k: Any, num_shards: Any
) -> Any:
    num_picks = len(pick_Q)
    first_pick_S = np.zeros(num_shards + 1, np.int64)
    for q in range(num_picks):
        first_pick_S[home_Q[q] + 1] += 1
    first_pick_S = np.cumsum(first_pick_S)
    place_S, order_Q = first_pick_S.copy(), np.empty(num_picks, np.int64)
    for q in range(num_picks):
        order_Q[place_S[home_Q[q]]] = q
        place_S[home_Q[q]] += 1
    first_row_S = np.zeros(num_shards + 1, np.int64)
    sorted_Q = pick_Q[order_Q]
    row_M, grid_M = np.empty(num_picks, np.int64), np.empty(num_picks, np.int16)
    local_Q, expert_Q = np.empty(num_picks, np.int32), np.empty(num_picks, np.int32)
    weight_Q = np.empty(num_picks, np.float32)
    num_rows = 0
    for s in range(num_shards):
        first_row, last = num_rows, -1
        for q in range(first_pick_S[s], first_pick_S[s + 1]):
            pick = sorted_Q[q]
            row = pick // top_k
            if row != last:
                row_M[num_rows], grid_M[num_rows], last = row, grid_N[row], row
                num_rows += 1
            local_Q[q], expert_Q[q], weight_Q[q] = num_rows - 1 - first_row, expert_P[pick], weight_P[pick]
        first_row_S[s + 1] = num_rows
    x_ML = np.empty((num_rows, x_NL.shape[1]), x_NL.dtype)
    for m in range(num_rows):
        x_ML[m] = x_NL[row_M[m]]
    return (
        first_pick_S,
        first_row_S,
        sorted_Q,
        row_M[:num_rows],
        x_ML,
        grid_M[:num_rows],
        local_Q,
        expert_Q,
        weight_Q,
    )


def dispatch(
    x_NL: NDArray[np.generic],
    grid_N: NDArray[np.int16],
    expert_P: NDArray[np.int64],
    weight_P: NDArray[np.float32],
    pick_Q: NDArray[np.int64],
    home_Q: NDArray[np.int64],
    top_k: int,
    num_shards: int,
) -> Dispatch:
    """What each of `num_shards` gets of the picks `pick_Q` (ascending), which `home_Q` assigns."""
    return Dispatch(*_dispatch(x_NL, grid_N, expert_P, weight_P, pick_Q, home_Q, top_k, num_shards))


@njit(error_model="numpy", cache=True)  # type: ignore[untyped-decorator]
def combine(sums_ML: Any, row_M: Any, sums_NL: Any) -> None:
    """Adds a shard's sums, int32 or int64, to those of the call; each row stands in `row_M` once."""
    for m in range(len(row_M)):
        part, total = sums_ML[m], sums_NL[row_M[m]]
        for i in range(len(part)):
            total[i] += part[i]


@njit(error_model="numpy", cache=True)  # type: ignore[untyped-decorator]
def narrow(sums_NL: Any, narrow_NL: Any) -> Any:
    """Copies int64 sums to int32 ones; False where one of them does not fit."""
    fits = True
    for n in range(sums_NL.shape[0]):
        wide, out = sums_NL[n], narrow_NL[n]
        for i in range(len(wide)):
            out[i] = np.int32(wide[i])
            fits = fits and np.int64(out[i]) == wide[i]
    return fits


@cache
def warm_up() -> None:
    """Compiles now what the first call would wait for."""
    ids, floats = np.zeros(1, np.int64), np.zeros(1, np.float32)
    for kind in (np.int16, np.float32):
        dispatch(np.zeros((1, 1), kind), np.zeros(1, np.int16), ids, floats, ids, ids, 1, 1)
    sums = np.zeros((1, 1), np.int64)
    for width in (4, 8):
        combine(np.frombuffer(bytes(width), f"<i{width}").reshape(1, 1), ids, sums)
    narrow(sums, np.zeros((1, 1), np.int32))
