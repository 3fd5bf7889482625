"""The kernels here rotate the queries and keys of packed requests by their positions (RoPE).

An angle is the fp32 product of a position and an inverse frequency. Its cosine and sine are computed in float64 and
rounded once to fp32. So the bits of a rotation depend only on the position.

Legend: T tokens of the step, F = dim/2 frequencies.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, error_model="numpy", cache=True)
def rotations(positions_T: Any, inverse_F: Any, factor: Any) -> Any:
    """Return factor · (cos, sin) of each position's angles, fp32 (T, 2, F)."""
    table_T2F = np.empty((len(positions_T), 2, len(inverse_F)), np.float32)
    for t in range(len(positions_T)):
        position = np.float32(positions_T[t])
        for f in range(len(inverse_F)):
            angle = np.float64(position * inverse_F[f])
            table_T2F[t, 0, f] = np.float32(math.cos(angle)) * factor
            table_T2F[t, 1, f] = np.float32(math.sin(angle)) * factor
    return table_T2F


@njit(nogil=True, error_model="numpy", fastmath=False, inline="never")
def rotate(x_D: Any, table_2F: Any, is_interleaved: Any) -> None:
    """Rotate a vector of 2·F numbers in place; a pair is (2f, 2f + 1) if `is_interleaved`, else (f, f + F)."""
    num = table_2F.shape[1]
    for f in range(num):
        i, j = (2 * f, 2 * f + 1) if is_interleaved else (f, f + num)
        cos, sin, a, b = table_2F[0, f], table_2F[1, f], x_D[i], x_D[j]
        x_D[i] = a * cos - b * sin
        x_D[j] = b * cos + a * sin
