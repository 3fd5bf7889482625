"""`rms_norm` is the RMS norm over each row of an array.

Legend: N rows, D numbers per row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}, cache=True)
def rms_norm(x_ND: Any, weight_D: Any, eps: Any, out_ND: Any) -> None:
    """Write x / rms(x) · weight of each row x to `out_ND`, in fp32."""
    dim = x_ND.shape[1]
    for n in range(x_ND.shape[0]):
        row = x_ND[n]
        total = np.float32(0.0)
        for d in range(dim):
            total += row[d] * row[d]
        scale = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(dim) + eps))
        for d in range(dim):
            out_ND[n, d] = row[d] * scale * weight_D[d]
