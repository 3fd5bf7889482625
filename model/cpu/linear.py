"""Matrix products whose rows do not depend on their company, at the speed of the memory or of the FMA units.

What surprises: every output is one chain of fused multiply-adds over the inputs in their order, in fp32, whatever the
number of rows, their place or the number of threads; so a row's bits are the same alone and among 2,048 others. That
is possible without loss because the lanes of a vector are outputs, not inputs: weights lie in panels of 32 outputs,
input after input. bf16 weights stay bf16 in memory (two inputs share a 32-bit word) and become fp32 in registers.

Legend: N rows, I inputs, O outputs, P panels of 32 outputs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from model.cpu.vectors import (
    I64,
    POINTER,
    VECTOR,
    WORDS,
    at,
    broadcast,
    fma,
    i64,
    load_vector,
    plus,
    prefetch,
    store_vector,
)
from model.cpu.vectors import words as splat_words

PREFETCH_WORDS = 1024  # 4 KiB ahead: measured, 512 to 2048 are alike
PANEL = 32  # outputs side by side: two vectors of 16
MIN_WORK_TO_SHARE = (
    1 << 19
)  # words of weights, times eighths of rows, below which a second thread costs more than it brings


def _weights(builder: Any, panel: Any, base: Any, is_bf16: bool) -> list[list[Any]]:
    """The panel's vectors for one step: [input of the step][half of the panel]."""
    halves = [builder.gep(panel, [builder.add(base, i64(16 * half))]) for half in range(2)]
    for pointer in halves:
        prefetch(builder, pointer, PREFETCH_WORDS)
    if not is_bf16:
        return [[load_vector(builder, pointer) for pointer in halves]]
    words = [load_vector(builder, pointer, WORDS) for pointer in halves]
    even = [builder.bitcast(builder.shl(word, splat_words(16)), VECTOR) for word in words]
    odd = [builder.bitcast(builder.and_(word, splat_words(-0x10000)), VECTOR) for word in words]
    return [even, odd]


def _make_tile(num_rows: int, is_bf16: bool) -> Any:
    """Compiles out[:num_rows, :32] = x[:num_rows] · panel; the sums stay in registers throughout."""

    @intrinsic
    def tile(_: Any, x: Any, x_stride: Any, panel: Any, num_inputs: Any, out: Any, out_stride: Any) -> Any:
        signature = types.void(POINTER, types.intp, POINTER, types.intp, POINTER, types.intp)

        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            x, x_stride, panel, num_inputs, out, out_stride = args
            x_rows = [builder.gep(x, [builder.mul(x_stride, i64(row))]) for row in range(num_rows)]
            inputs_per_step = 2 if is_bf16 else 1
            num_steps = builder.lshr(num_inputs, i64(1)) if is_bf16 else num_inputs
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(I64)
            step.add_incoming(i64(0), before)
            old = [[builder.phi(VECTOR) for _ in range(2)] for _ in range(num_rows)]
            for phi in (phi for row in old for phi in row):
                phi.add_incoming(ir.Constant(VECTOR, [0.0] * 16), before)
            sums: list[list[Any]] = [list(row) for row in old]
            first = builder.mul(step, i64(inputs_per_step))
            for place, halves in enumerate(_weights(builder, panel, builder.mul(step, i64(PANEL)), is_bf16)):
                for row, pointer in enumerate(x_rows):
                    value = broadcast(builder, builder.gep(pointer, [builder.add(first, i64(place))]))
                    sums[row] = [fma(builder, value, w, s) for w, s in zip(halves, sums[row], strict=True)]
            following = builder.add(step, i64(1))
            step.add_incoming(following, builder.block)
            for phi, value in zip((p for row in old for p in row), (s for row in sums for s in row), strict=True):
                phi.add_incoming(value, builder.block)
            builder.cbranch(builder.icmp_signed("<", following, num_steps), loop, after)
            builder.position_at_end(after)
            for row, halves in enumerate(sums):
                target = builder.gep(out, [builder.mul(out_stride, i64(row))])
                for half, value in enumerate(halves):
                    pointer = builder.gep(target, [i64(16 * half)])
                    store_vector(builder, value, pointer)
            return context.get_dummy_value()

        return signature, generate

    return tile


_bf16_1, _bf16_2, _bf16_4, _bf16_8 = (_make_tile(rows, True) for rows in (1, 2, 4, 8))
_fp32_1, _fp32_2, _fp32_4, _fp32_8, _fp32_12 = (_make_tile(rows, False) for rows in (1, 2, 4, 8, 12))


@njit(nogil=True, error_model="numpy", inline="never")
def fp32_panel(x: Any, num_rows: Any, num_inputs: Any, panel: Any, out: Any, out_stride: Any) -> None:
    row = 0
    while row < num_rows:
        left = num_rows - row
        source, target = plus(x, row * num_inputs), plus(out, row * out_stride)
        if left >= 20 or left == 12:
            _fp32_12(source, num_inputs, panel, num_inputs, target, out_stride)
            row += 12
        elif left >= 8:
            _fp32_8(source, num_inputs, panel, num_inputs, target, out_stride)
            row += 8
        elif left >= 4:
            _fp32_4(source, num_inputs, panel, num_inputs, target, out_stride)
            row += 4
        elif left >= 2:
            _fp32_2(source, num_inputs, panel, num_inputs, target, out_stride)
            row += 2
        else:
            _fp32_1(source, num_inputs, panel, num_inputs, target, out_stride)
            row += 1


@njit(nogil=True, error_model="numpy", inline="never")
def bf16_panel(x: Any, num_rows: Any, num_inputs: Any, panel: Any, out: Any, out_stride: Any) -> None:
    row = 0
    while row < num_rows:
        left = num_rows - row
        source, target = plus(x, row * num_inputs), plus(out, row * out_stride)
        if left >= 8:
            _bf16_8(source, num_inputs, panel, num_inputs, target, out_stride)
            row += 8
        elif left >= 4:
            _bf16_4(source, num_inputs, panel, num_inputs, target, out_stride)
            row += 4
        elif left >= 2:
            _bf16_2(source, num_inputs, panel, num_inputs, target, out_stride)
            row += 2
        else:
            _bf16_1(source, num_inputs, panel, num_inputs, target, out_stride)
            row += 1


@njit(nogil=True, error_model="numpy", inline="never")
def multiply_panels(
    x: Any, num_rows: Any, num_inputs: Any, panels: Any, is_bf16: Any, out: Any, out_stride: Any, first: Any, last: Any
) -> None:
    """out[:, 32·first : 32·last] = x · panels[first:last], over pointers; the strides count numbers."""
    words = num_inputs * PANEL // 2 if is_bf16 else num_inputs * PANEL
    for p in range(first, last):
        panel, target = plus(panels, p * words), plus(out, p * PANEL)
        if is_bf16:
            bf16_panel(x, num_rows, num_inputs, panel, target, out_stride)
        else:
            fp32_panel(x, num_rows, num_inputs, panel, target, out_stride)


@njit(nogil=True, error_model="numpy", cache=True)
def _multiply(x_NI: Any, words: Any, is_bf16: Any, out_NO: Any) -> None:
    num_rows, num_inputs = x_NI.shape
    stride = out_NO.shape[1]
    multiply_panels(at(x_NI, 0), num_rows, num_inputs, at(words, 0), is_bf16, at(out_NO, 0), stride, 0, stride // PANEL)


@njit(nogil=True, error_model="numpy", parallel=True, cache=True)
def _multiply_shared(x_NI: Any, words: Any, is_bf16: Any, out_NO: Any, num_parts: Any) -> None:
    num_rows, num_inputs = x_NI.shape
    stride = out_NO.shape[1]
    num_panels = stride // PANEL
    for part in prange(num_parts):
        first, last = part * num_panels // num_parts, (part + 1) * num_panels // num_parts
        multiply_panels(at(x_NI, 0), num_rows, num_inputs, at(words, 0), is_bf16, at(out_NO, 0), stride, first, last)


@dataclass(frozen=True)
class Packed:
    """A weight (O, I) in panels: `words` holds P·I·32 fp32 numbers, or half as many words of two bf16 numbers."""

    words: NDArray[np.float32]
    num_inputs: int
    num_outputs: int
    is_bf16: bool

    @property
    def padded_outputs(self) -> int:
        return -(-self.num_outputs // PANEL) * PANEL

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    @property
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


SHARING = threading.Lock()  # the pool of threads serves one caller at a time


def linear(x: Tensor, weight: Packed) -> Tensor:
    """x·Wᵀ: fp32 (..., I) -> fp32 (..., O)."""
    out = torch.from_numpy(multiply(x.reshape(-1, weight.num_inputs).numpy(), weight))
    # Contiguous without exception: numba compiles a kernel anew for another layout, perhaps to other bits.
    return out[:, : weight.num_outputs].contiguous().view(*x.shape[:-1], weight.num_outputs)


def multiply(x_NI: NDArray[np.float32], weight: Packed) -> NDArray[np.float32]:
    """x·Wᵀ with the padding that the panels bring: (N, I) -> (N, padded_outputs), what is past O being zero."""
    x_NI = np.ascontiguousarray(x_NI)
    out_NO = np.empty((x_NI.shape[0], weight.padded_outputs), np.float32)
    num_threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if num_threads > 1 and weight.words.size * max(1, x_NI.shape[0] // 8) >= MIN_WORK_TO_SHARE:
        with SHARING:
            numba.set_num_threads(num_threads)
            _multiply_shared(x_NI, weight.words, weight.is_bf16, out_NO, num_threads)
    else:
        _multiply(x_NI, weight.words, weight.is_bf16, out_NO)
    return out_NO
