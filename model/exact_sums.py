"""Sums of expert outputs that do not depend on their order, and so not on which shard holds which expert.

Float addition is not associative; integer addition is. Each contribution is rounded to a multiple of 2**grid, where
the row itself (its size, its largest weight) and one constant of the layer determine `grid`, and added as int64. The
unit is about 2**-22 of a typical contribution, so rounding costs what fp32 rounding costs, and 2**40 times a typical
contribution still fits: nothing overflows.

Legend: N rows, K picks a row, P picks, L expert input and output dim.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import kernels
from model.cpu import moe as cpu

FRACTION_BITS = 22
MAX_GRID_SUM = 2.0**62
NOT_ADDABLE = "an expert's output is not finite or too large to add: its weights are damaged"


def gain_exponent(up_ML: Tensor, down_LM: Tensor) -> int:
    """⌈log2⌉ of the typical size of down·relu(up·z)² for z of unit mean square.

    For z ~ N(0, 1): up_j·z ~ N(0, |up_j|²) and E relu(g)⁴ = 3/2·σ⁴. Typical is enough; int64 has room for the rest.
    """
    up_square_M = up_ML.double().square().sum(1)
    down_square_M = down_LM.double().square().sum(0)
    mean_square = 1.5 * float((up_square_M.square() * down_square_M).sum()) / down_LM.shape[0]
    return math.ceil(math.log2(mean_square) / 2) if 0 < mean_square < math.inf else 0


def grid_exponents(x_NL: Tensor, topk_weights_NK: Tensor, layer_gain_exponent: int) -> Tensor:
    """Exponent of the unit in which each row's contributions are added: int16 (N,). Weights are fp32."""
    shift = layer_gain_exponent - FRACTION_BITS - round(math.log2(x_NL.shape[-1]))
    if kernels.is_compiled(x_NL.device):
        is_bf16 = x_NL.dtype == torch.bfloat16
        rows = (x_NL.view(torch.int16) if is_bf16 else x_NL).contiguous().numpy()
        return torch.from_numpy(cpu.grids(rows, is_bf16, topk_weights_NK.numpy(), shift))
    size_N = torch.linalg.vector_norm(x_NL, dim=-1, dtype=torch.float32)
    exponent_N = torch.frexp(size_N * size_N * topk_weights_NK.amax(-1)).exponent
    return (exponent_N + shift).clamp_(-200, 200).to(torch.int16)


def scale_to_grid(weight_P: NDArray[np.float32], grid_P: NDArray[np.int16]) -> NDArray[np.float64]:
    """What turns an expert's output into a contribution in units of 2**grid: exact in float64."""
    scale_P: NDArray[np.float64] = np.ldexp(weight_P.astype(np.float64), -grid_P.astype(np.int64))
    return scale_P


def add_on_grid(y_PL: Tensor, scale_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """Σ of scale·y over the picks of each row, each rounded to a whole number, exactly: int64 (num_rows, L).

    Raises ValueError if a contribution is not finite or too large for any sane model (2**62 units).
    """
    units_PL = (y_PL * scale_P[:, None]).round_()  # float64: 24 bits by 24 bits, so only this rounding rounds
    if not bool(units_PL.abs().amax() < MAX_GRID_SUM):
        raise ValueError(NOT_ADDABLE)
    sums_NL = torch.zeros(num_rows, y_PL.shape[1], dtype=torch.int64, device=y_PL.device)
    return sums_NL.index_add_(0, row_P, units_PL.long())


def from_grid(sums_NL: Tensor, grid_N: Tensor) -> Tensor:
    """int64 sums back to fp32 (N, L)."""
    if kernels.is_compiled(sums_NL.device):
        return torch.from_numpy(cpu.from_grid(sums_NL.numpy(), grid_N.numpy()))
    return (sums_NL.double() * torch.exp2(grid_N.double())[:, None]).float()
