"""The functions here add expert outputs so that the sum depends neither on the outputs' order nor on the placement.

Float addition is not associative; integer addition is. Therefore each contribution is rounded to a multiple of
2**grid and added as int64. The row's norm, the row's largest weight and one constant of the layer determine `grid`.
The unit 2**grid is about 2**-22 of a typical contribution, so this rounding loses about the same accuracy as rounding
to fp32. A sum may grow to 2**40 times a typical contribution before int64 overflows.

Legend: N rows, K picks per row, P picks, L expert input and output dim.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import kernels
from model.cpu import moe as cpu
from model.stored_matrix import StoredMatrix

log = logging.getLogger(__name__)

FRACTION_BITS = 22  # a typical contribution is about 2**22 units, which is near the 24 bits of an fp32 number
MAX_SPREAD_BITS = 6  # spread of a layer's gain exponents above which the log warns
MAX_GRID_SUM = 2.0**62  # limit of a contribution in units; a larger contribution could overflow int64
NOT_ADDABLE = "an expert's output is not finite or too large to add: the expert's weights are damaged"


def mean_square_gain(matrices: Mapping[str, StoredMatrix]) -> float:
    """Return the typical mean square of an expert's output for an input z with a mean square of 1.

    `matrices` are the expert's matrices by name; quantized ones are taken at their exact values. If z is drawn from
    N(0, 1), then w·z has the distribution N(0, σ²) with σ² = |w|² for every row w of a matrix. For each hidden unit j
    the formula takes the mean square of the unit, times |down_j|²:

    - relu²: relu(up_j·z)² has the mean square 3/2·σ⁴.
    - SwiGLU: silu(gate_j·z) has a mean square between σ²/4 for a small σ and σ²/2 for a large σ. The formula takes
      σ²/2, times the mean square of up_j·z.

    Like the output of relu², the output of SwiGLU grows with the square of the input's size.
    """

    def squares(name: str, dim: int) -> Tensor:
        return matrices[name].dequantized().double().square().sum(dim)

    up_M, down_M = squares("up", 1), squares("down", 0)
    factor, unit_M = (0.5, squares("gate", 1) * up_M) if "gate" in matrices else (1.5, up_M.square())
    return factor * float((unit_M * down_M).sum()) / matrices["down"].shape[0]


def gain_exponent(matrices: Mapping[str, StoredMatrix]) -> int:
    """Return the rounded-up log2 of the typical size of an expert's output for an input z with a mean square of 1.

    A typical size is enough, because int64 has room for outputs that are much larger.
    """
    mean_square = mean_square_gain(matrices)
    return math.ceil(math.log2(mean_square) / 2) if 0 < mean_square < math.inf else 0


def log_wide_spread(layer: int, num_experts: Mapping[int, int]) -> bool:
    """Log one line, and return True, if a layer's largest gain exponent is far above the median.

    `num_experts` has the number of the layer's experts by gain exponent; it may be empty. The expert with the largest
    exponent decides the unit of all sums of the layer. The contributions of the other experts then have fewer bits.
    """
    exponents = sorted(num_experts)
    ends = list(accumulate(num_experts[exponent] for exponent in exponents))
    if not ends:
        return False
    low, high = (exponents[bisect(ends, rank)] for rank in ((ends[-1] - 1) // 2, ends[-1] // 2))
    spread = exponents[-1] - (low + high) / 2
    is_wide = spread > MAX_SPREAD_BITS
    if is_wide:
        text = "The outputs of one expert of layer %d may be 2**%g times as large as those of most experts: %s."
        log.warning(text, layer, spread, f"their sums then keep only about {FRACTION_BITS - spread:g} bits")
    return is_wide


def grid_exponents(x_NL: Tensor, topk_weights_NK: Tensor, layer_gain_exponent: int) -> Tensor:
    """Return `grid` for each row, where 2**grid is the unit in which the row's contributions are added: int16 (N,).

    `topk_weights_NK` is fp32. `layer_gain_exponent` is the largest `gain_exponent` of the layer's experts.
    """
    shift = layer_gain_exponent - FRACTION_BITS - round(math.log2(x_NL.shape[-1]))
    if kernels.is_compiled(x_NL.device):
        is_bf16 = x_NL.dtype == torch.bfloat16
        rows = (x_NL.view(torch.int16) if is_bf16 else x_NL).contiguous().numpy()
        return torch.from_numpy(cpu.grid_exponents(rows, is_bf16, topk_weights_NK.numpy(), shift))
    size_N = torch.linalg.vector_norm(x_NL, dim=-1, dtype=torch.float32)
    exponent_N = torch.frexp(size_N * size_N * topk_weights_NK.amax(-1)).exponent
    return (exponent_N + shift).clamp_(-200, 200).to(torch.int16)


def scale_to_grid(weight_P: NDArray[np.float32], grid_P: NDArray[np.int16]) -> NDArray[np.float64]:
    """Return the factor weight / 2**grid for each pick's expert output, exact in float64: (P,)."""
    scale_P: NDArray[np.float64] = np.ldexp(weight_P.astype(np.float64), -grid_P.astype(np.int64))
    return scale_P


def add_on_grid(y_PL: Tensor, scale_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """Round each scale·y to a whole number and return the exact sums over each row's picks: int64 (num_rows, L).

    Raises ValueError if a contribution is not finite or has 2**62 units or more, which only damaged weights cause.
    """
    units_PL = (y_PL * scale_P[:, None]).round_()  # 24 bits times 24 bits are exact in float64, so only round_() rounds
    if not bool(units_PL.abs().amax() < MAX_GRID_SUM):
        raise ValueError(NOT_ADDABLE)
    sums_NL = torch.zeros(num_rows, y_PL.shape[1], dtype=torch.int64, device=y_PL.device)
    return sums_NL.index_add_(0, row_P, units_PL.long())


def from_grid(sums_NL: Tensor, grid_N: Tensor) -> Tensor:
    """Convert int64 sums in units of 2**grid to fp32 (N, L)."""
    if kernels.is_compiled(sums_NL.device):
        return torch.from_numpy(cpu.from_grid(sums_NL.numpy(), grid_N.numpy()))
    return (sums_NL.double() * torch.exp2(grid_N.double())[:, None]).float()
