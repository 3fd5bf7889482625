"""Linear layers on a CPU: weights in panels, and products of which helpers may take a share.

Legend: N rows, I inputs, O outputs, P panels of 32 outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from model.cpu.packed_matrix import PANEL
from model.cpu.thread_pool import THREAD_POOL, product


class Panels(NamedTuple):
    """A weight for compiled code: where its panels lie, and its sizes."""

    address: int
    num_inputs: int
    num_outputs: int
    padded_outputs: int
    is_bf16: bool


@njit(nogil=True, error_model="numpy", inline="never", cache=True)
def apply(control: Any, num_threads: Any, x_NI: Any, weight: Any) -> Any:
    """x·Wᵀ, for compiled code too: fp32 (N, I) -> (N, O)."""
    num_rows, padded = x_NI.shape[0], weight.padded_outputs
    out_NP = np.empty((num_rows, padded), np.float32)
    product(
        control,
        num_threads,
        x_NI.ctypes.data,
        num_rows,
        weight.num_inputs,
        weight.address,
        weight.is_bf16,
        out_NP.ctypes.data,
        padded,
    )
    if padded == weight.num_outputs:
        return out_NP
    out_NO = np.empty((num_rows, weight.num_outputs), np.float32)
    for n in range(num_rows):
        out_NO[n] = out_NP[n, : weight.num_outputs]
    return out_NO


@dataclass(frozen=True)
class Packed:
    """A weight (O, I) in panels: `words` holds P·I·32 fp32 numbers, or half as many words of two bf16 numbers."""

    words: NDArray[np.float32]
    num_inputs: int
    num_outputs: int
    is_bf16: bool

    @cached_property
    def panels(self) -> Panels:
        padded = -(-self.num_outputs // PANEL) * PANEL
        return Panels(int(self.words.ctypes.data), self.num_inputs, self.num_outputs, padded, self.is_bf16)


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


def unpack(packed: Packed) -> Tensor:
    """The weight (O, I) that `pack` was given, bit for bit, in the dtype in which it is held."""
    num_panels = packed.panels.padded_outputs // PANEL
    if packed.is_bf16:
        pairs = torch.from_numpy(packed.words.view(np.int16)).view(torch.bfloat16)
        panels = pairs.view(num_panels, packed.num_inputs // 2, PANEL, 2).permute(0, 2, 1, 3)
    else:
        panels = torch.from_numpy(packed.words).view(num_panels, packed.num_inputs, PANEL).permute(0, 2, 1)
    return panels.reshape(num_panels * PANEL, packed.num_inputs)[: packed.num_outputs]


def linear(x: Tensor, weight: Packed) -> Tensor:
    """x·Wᵀ: fp32 (..., I) -> fp32 (..., O)."""
    x_NI = x if x.dim() == 2 else x.reshape(-1, weight.num_inputs)
    num_threads = torch.get_num_threads()
    # Contiguous without exception: numba compiles a kernel anew for another layout, perhaps to other bits.
    y_NO = apply(THREAD_POOL.ready(num_threads), num_threads, x_NI.contiguous().numpy(), weight.panels)
    out_NO = torch.from_numpy(y_NO)
    return out_NO if x.dim() == 2 else out_NO.view(*x.shape[:-1], weight.num_outputs)
