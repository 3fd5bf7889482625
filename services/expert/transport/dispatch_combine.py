"""Dispatch gathers the rows of each message of a layer call, and combine adds up the sums that come back.

The two functions are compiled. In numpy they would need a hundred small calls per layer, which cost more than the
arithmetic of the experts of one token.

Legend: N rows of the call, P picks of the call (the picks of a row stand together), K picks per row, L expert input
dim. For one dispatch, with the messages one after the other: Q picks, R rows (a row that goes into two messages counts
twice), M messages.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

import model.cpu  # noqa: F401 - this import sets the folder in which numba keeps compiled code


class Dispatch(NamedTuple):
    """A `Dispatch` holds the arrays of M messages; message m has the rows `first_row_M[m] : first_row_M[m + 1]`."""

    first_row_M: NDArray[np.int64]
    row_R: NDArray[np.int64]  # index of the row in the call
    x_RL: NDArray[np.generic]
    grid_R: NDArray[np.int16]
    local_Q: NDArray[np.int32]  # index of the row in its message
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
    """Return the arrays of M messages; message m carries the picks `pick_Q[first_M[m] : first_M[m + 1]]`.

    The picks of each message are ascending indices into `expert_P`.
    """
    return Dispatch(*_dispatch(x_NL, grid_N, expert_P, weight_P, pick_Q, first_M, top_k))


@njit(error_model="numpy", cache=True)  # type: ignore[untyped-decorator]
def combine(sums_ML: Any, row_M: Any, sums_NL: Any) -> None:
    """Add a shard's sums, int32 or int64, to the sums of the call; row i of `sums_ML` is row `row_M[i]` of the call.

    Here M is the number of rows of the message. No row of the call occurs twice in `row_M`.
    """
    for m in range(len(row_M)):
        part, total = sums_ML[m], sums_NL[row_M[m]]
        for i in range(len(part)):
            total[i] += part[i]


@njit(error_model="numpy", cache=True)  # type: ignore[untyped-decorator]
def narrow(sums_NL: Any, narrow_NL: Any) -> Any:
    """Copy int64 sums to the int32 array `narrow_NL`; return False if a sum does not fit."""
    fits = True
    for n in range(sums_NL.shape[0]):
        wide, out = sums_NL[n], narrow_NL[n]
        for i in range(len(wide)):
            out[i] = np.int32(wide[i])
            fits = fits and np.int64(out[i]) == wide[i]
    return fits


@cache
def warm_up() -> None:
    """Compile dispatch and combine now, so that the first call does not wait for the compiler."""
    ids, floats = np.zeros(1, np.int64), np.zeros(1, np.float32)
    for kind in (np.int16, np.float32):
        dispatch(np.zeros((1, 1), kind), np.zeros(1, np.int16), ids, floats, ids, np.array([0, 1]), 1)
    sums = np.zeros((1, 1), np.int64)
    for width in (4, 8):
        combine(np.frombuffer(bytes(width), f"<i{width}").reshape(1, 1), ids, sums)
    narrow(sums, np.zeros((1, 1), np.int32))
