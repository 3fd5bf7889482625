"""Linear layers on a CPU multiply by a `PackedMatrix`, and the threads of the thread pool share long products.

Legend: N rows, I inputs, O outputs, P outputs padded to whole panels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from model.cpu.packed_matrix import PackedMatrix
from model.cpu.thread_pool import THREAD_POOL, parallel_product


@njit(nogil=True, error_model="numpy", inline="never", cache=True)
def apply_linear(control: Any, num_threads: Any, x_NI: Any, weight: Any) -> Any:
    """Return x·Wᵀ, fp32 (N, I) -> fp32 (N, O); other compiled kernels call this function."""
    num_rows, padded = x_NI.shape[0], weight.padded_outputs
    out_NP = np.empty((num_rows, padded), np.float32)
    parallel_product(control, num_threads, x_NI.ctypes.data, num_rows, weight, out_NP.ctypes.data)
    if padded == weight.num_outputs:
        return out_NP
    out_NO = np.empty((num_rows, weight.num_outputs), np.float32)
    for n in range(num_rows):
        out_NO[n] = out_NP[n, : weight.num_outputs]
    return out_NO


def linear(x: Tensor, weight: PackedMatrix) -> Tensor:
    """Return x·Wᵀ for a tensor x, fp32 (..., I) -> fp32 (..., O)."""
    x_NI = x if x.dim() == 2 else x.reshape(-1, weight.num_inputs)
    num_threads = torch.get_num_threads()
    # The array must be contiguous: for another layout numba would compile another kernel, which might give other bits.
    y_NO = apply_linear(
        THREAD_POOL.start_workers(num_threads), num_threads, x_NI.contiguous().numpy(), weight.descriptor
    )
    out_NO = torch.from_numpy(y_NO)
    return out_NO if x.dim() == 2 else out_NO.view(*x.shape[:-1], weight.num_outputs)
