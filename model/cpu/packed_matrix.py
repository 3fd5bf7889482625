"""A `PackedMatrix` holds a weight in a layout for batch-invariant products.

The products run at the speed of the memory or of the FMA units. What surprises: every output is one chain of fused
multiply-adds in fp32, from the first input to the last. So a row's bits do not depend on the number of rows, on the
row's position or on the number of threads: the bits are the same alone and among 2,048 other rows. The fixed order
costs no speed, because the lanes of a vector are different outputs rather than different inputs.

Layout: a panel holds the weights of 32 outputs, first the 32 weights of input 0, then the 32 weights of input 1, and so
on. bf16 weights stay bf16 in memory, where the weights of two inputs share a 32-bit word, and become fp32 in registers.
A *tile* is a kernel that multiplies a few rows by one panel.

Legend: N rows, I inputs, O outputs, P panels of 32 outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from model.cpu.vectors import (
    I64,
    POINTER,
    VECTOR,
    WORDS,
    advance,
    broadcast,
    fma,
    i64,
    load_vector,
    prefetch,
    splat_words,
    store_vector,
)

PREFETCH_WORDS = 1024  # distance of a prefetch, 4 KiB; 512 to 2048 words measured the same
PANEL = 32  # number of outputs in a panel: two vectors of 16 lanes


class PackedMatrixDescriptor(NamedTuple):
    """A `PackedMatrixDescriptor` tells compiled code the address and the sizes of a `PackedMatrix`."""

    address: int
    num_inputs: int
    num_outputs: int
    padded_outputs: int
    is_bf16: bool


@dataclass(frozen=True)
class PackedMatrix:
    """A `PackedMatrix` holds a weight (O, I) in panels of 32 outputs.

    `words` has P·I·32 fp32 numbers, or P·I·16 words of 32 bits with two bf16 numbers in each word.
    """

    words: NDArray[np.float32]
    num_inputs: int
    num_outputs: int
    is_bf16: bool

    @cached_property
    def descriptor(self) -> PackedMatrixDescriptor:
        padded = -(-self.num_outputs // PANEL) * PANEL
        return PackedMatrixDescriptor(
            int(self.words.ctypes.data), self.num_inputs, self.num_outputs, padded, self.is_bf16
        )


def pack_matrix(weight_OI: Tensor) -> PackedMatrix:
    """Copy a weight (O, I) into panels, as bf16 if the weight is bf16 with an even number of inputs, else as fp32."""
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
    return PackedMatrix(words, num_inputs, num_outputs, is_bf16)


def unpack_matrix(packed: PackedMatrix) -> Tensor:
    """Return the weight (O, I) that `packed` holds, bit for bit, as bf16 or fp32 as `packed.is_bf16` says."""
    num_panels = packed.descriptor.padded_outputs // PANEL
    if packed.is_bf16:
        pairs = torch.from_numpy(packed.words.view(np.int16)).view(torch.bfloat16)
        panels = pairs.view(num_panels, packed.num_inputs // 2, PANEL, 2).permute(0, 2, 1, 3)
    else:
        panels = torch.from_numpy(packed.words).view(num_panels, packed.num_inputs, PANEL).permute(0, 2, 1)
    return panels.reshape(num_panels * PANEL, packed.num_inputs)[: packed.num_outputs]


def _load_weights(builder: Any, panel: Any, base: Any, is_bf16: bool) -> list[list[Any]]:
    """Emit loads of a panel's weights for one input (fp32) or two inputs (bf16): vectors [input][half of the panel]."""
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
    """Return a tile, which computes out[:num_rows, :32] = x[:num_rows] · panel with all sums in registers."""

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
            for place, halves in enumerate(_load_weights(builder, panel, builder.mul(step, i64(PANEL)), is_bf16)):
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
def multiply_fp32_panel(x: Any, num_rows: Any, num_inputs: Any, panel: Any, out: Any, out_stride: Any) -> None:
    row = 0
    while row < num_rows:
        left = num_rows - row
        source, target = advance(x, row * num_inputs), advance(out, row * out_stride)
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
def multiply_bf16_panel(x: Any, num_rows: Any, num_inputs: Any, panel: Any, out: Any, out_stride: Any) -> None:
    row = 0
    while row < num_rows:
        left = num_rows - row
        source, target = advance(x, row * num_inputs), advance(out, row * out_stride)
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
    """Compute out[:, 32·first : 32·last] = x · panels[first:last].

    `x`, `panels` and `out` are pointers. `out_stride` is the distance between two rows of `out`, in fp32 numbers.
    """
    words = num_inputs * PANEL // 2 if is_bf16 else num_inputs * PANEL
    for p in range(first, last):
        panel, target = advance(panels, p * words), advance(out, p * PANEL)
        if is_bf16:
            multiply_bf16_panel(x, num_rows, num_inputs, panel, target, out_stride)
        else:
            multiply_fp32_panel(x, num_rows, num_inputs, panel, target, out_stride)
