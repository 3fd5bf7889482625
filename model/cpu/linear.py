"""Linear layers on a CPU: weights in panels, and products of which helpers may take a share.

Legend: N rows, I inputs, O outputs, P panels of 32 outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from model.cpu.panels import PANEL, multiply_panels
from model.cpu.team import TEAM
from model.cpu.vectors import at

MIN_WORK_TO_SHARE = 1 << 16  # words of weights, times quarters of rows, below which help costs more than it brings


@njit(nogil=True, error_model="numpy", cache=True)
def _multiply(x_NI: Any, words: Any, is_bf16: Any, out_NO: Any) -> None:
    num_rows, num_inputs = x_NI.shape
    stride = out_NO.shape[1]
    multiply_panels(at(x_NI, 0), num_rows, num_inputs, at(words, 0), is_bf16, at(out_NO, 0), stride, 0, stride // PANEL)


@dataclass(frozen=True)
class Packed:
    """A weight (O, I) in panels: `words` holds P·I·32 fp32 numbers, or half as many words of two bf16 numbers."""

    words: NDArray[np.float32]
    num_inputs: int
    num_outputs: int
    is_bf16: bool

    @cached_property
    def padded_outputs(self) -> int:
        return -(-self.num_outputs // PANEL) * PANEL

    @cached_property
    def address(self) -> int:
        return int(self.words.ctypes.data)


def pack(weight_OI: Tensor) -> Packed:
    """Copies a bf16 or fp32 weight into panels. bf16 needs an even number of inputs, else it is held as fp32."""
    num_outputs, num_inputs = weight_OI.shape
    is_bf16 = weight_OI.dtype == torch.bfloat16 and num_inputs % 2 == 0
    num_panels = -(-num_outputs // PANEL)
    weight_OI = weight_OI.detach().to(torch.bfloat16 if is_bf16 else torch.float32)
    panels = weight_OI.new_zeros(num_panels * PANEL, num_inputs)
    panels[:num_outputs] = weight_OI
    if is_bf16:
        pairs = panels.view(num_panels, PANEL, num_inputs // 2, 2).permute(0, 2, 1, 3).contiguous()
        words = pairs.view(torch.int16).numpy().reshape(-1).view(np.float32)
    else:
        words = panels.view(num_panels, PANEL, num_inputs).permute(0, 2, 1).contiguous().numpy().reshape(-1)
    return Packed(words, num_inputs, num_outputs, is_bf16)


def linear(x: Tensor, weight: Packed) -> Tensor:
    """x·Wᵀ: fp32 (..., I) -> fp32 (..., O)."""
    x_NI = x if x.dim() == 2 else x.reshape(-1, weight.num_inputs)
    x_NI = x_NI.contiguous()
    num_rows, num_threads = x_NI.shape[0], torch.get_num_threads()
    out_NO = torch.empty(num_rows, weight.padded_outputs)
    is_long = num_threads > 1 and weight.words.size * max(1, num_rows // 4) >= MIN_WORK_TO_SHARE
    if not is_long or not TEAM.multiply(
        x_NI.data_ptr(),
        num_rows,
        weight.num_inputs,
        weight.address,
        weight.is_bf16,
        out_NO.data_ptr(),
        weight.padded_outputs,
        num_threads,
    ):
        _multiply(x_NI.numpy(), weight.words, weight.is_bf16, out_NO.numpy())
    if weight.padded_outputs != weight.num_outputs:
        # Contiguous without exception: numba compiles a kernel anew for another layout, perhaps to other bits.
        out_NO = out_NO[:, : weight.num_outputs].contiguous()
    return out_NO if x.dim() == 2 else out_NO.view(*x.shape[:-1], weight.num_outputs)
