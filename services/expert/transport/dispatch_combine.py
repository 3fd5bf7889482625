"""Dispatch and combine, compiled: the rows of each message gathered, and sums added up as they come back.

In numpy both cost a hundred small calls a layer, more than the arithmetic of a token's experts.

Legend: N rows, P picks (the picks of a row stand together), K picks a row, L expert input dim; of one dispatch, message
after message: Q picks, R rows (a row that goes into two messages is there twice), M messages.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

import model.cpu  # noqa: F401 - which says where compiled code is kept


class Dispatch(NamedTuple):
    """Message m has the rows `first_row_M[m] : first_row_M[m + 1]`."""

    first_row_M: NDArray[np.int64]
    row_R: NDArray[np.int64]  # which row of the call
    x_RL: NDArray[np.generic]
    grid_R: NDArray[np.int16]
    local_Q: NDArray[np.int32]  # which row of the message
    expert_Q: NDArray[np.int32]
    weight_Q: NDArray[np.float32]


@njit(error_model="numpy", cache=True)  # type: ignore[untyped-decorator]
def _dispatch(x_NL: Any, grid_N: Any, expert_P: Any, weight_P: Any, pick_Q: Any, first_M: Any, top_k: Any) -> Any:
    num_picks, num_messages = len(pick_Q), len(first_M) - 1
    first_row_M = np.zeros(num_messages + 1, np.int64)
    row_R, grid_R = np.empty(num_picks, np.int64), np.empty(num_picks, np.int16)
    local_Q, expert_Q = np.empty(num_picks, np.int32), np.empty(num_picks, np.int32)
    weight_Q = np.empty(num_picks, np.float32)
    num_rows = 0
    for m in range(num_messages):
        first_row, last = num_rows, -1
        for q in range(first_M[m], first_M[m + 1]):
            pick = pick_Q[q]
            row = pick // top_k
            if row != last:
                row_R[num_rows], grid_R[num_rows], last = row, grid_N[row], row
                num_rows += 1
            local_Q[q], expert_Q[q], weight_Q[q] = num_rows - 1 - first_row, expert_P[pick], weight_P[pick]
        first_row_M[m + 1] = num_rows
    x_RL = np.empty((num_rows, x_NL.shape[1]), x_NL.dtype)
    for r in range(num_rows):
        x_RL[r] = x_NL[row_R[r]]
    return first_row_M, row_R[:num_rows], x_RL, grid_R[:num_rows], local_Q, expert_Q, weight_Q


def dispatch(
    x_NL: NDArray[np.generic],
    grid_N: NDArray[np.int16],
    expert_P: NDArray[np.int64],
    weight_P: NDArray[np.float32],
    pick_Q: NDArray[np.int64],
    first_M: NDArray[np.int64],
    top_k: int,
) -> Dispatch:
    """What messages with the picks `pick_Q[first_M[m] : first_M[m + 1]]`, ascending in each, carry."""
    return Dispatch(*_dispatch(x_NL, grid_N, expert_P, weight_P, pick_Q, first_M, top_k))


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
        dispatch(np.zeros((1, 1), kind), np.zeros(1, np.int16), ids, floats, ids, np.array([0, 1]), 1)
    sums = np.zeros((1, 1), np.int64)
    for width in (4, 8):
        combine(np.frombuffer(bytes(width), f"<i{width}").reshape(1, 1), ids, sums)
    narrow(sums, np.zeros((1, 1), np.int32))
