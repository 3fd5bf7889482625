"""The functions here multiply rows by the panels of a weight, with one compiled function for each kind of number.

Compiled code calls these functions through their addresses. So a process compiles only the functions of the kinds that
it holds, each of them once, and no other kernel has to be compiled with a copy of them.

A few rows are multiplied by the panel as it is. For more rows, a part of the panel is first unpacked to fp32, which is
paid once for all rows. Both ways give the same bits, because the unpacked weights are the same numbers and each output
remains one chain of fused multiply-adds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

from model.cpu.panel_tiles import (
    E2M1_GROUP,
    E2M1_GROUP_WORDS,
    E4M3_GROUP,
    HAS_WIDE_REGISTERS,
    PANEL,
    Kind,
    multiply_tile,
    unpack_panel,
)
from model.cpu.vectors import F32, I64, LANES, POINTER, advance, pointer_to

# Numbers of rows of the tiles. The sums of a tile and the weights of a step must fit the vector registers: with 16
# registers of 8 numbers, bf16 has no room for three rows, because its steps have two inputs.
A, B, C, D = (1, 2, 4, 8) if HAS_WIDE_REGISTERS else (1, 2, 3, 3)
MIN_UNPACKED_BF16 = 1 << 30 if HAS_WIDE_REGISTERS else 4  # fewest rows for which bf16 is unpacked first
MIN_UNPACKED = 12 if HAS_WIDE_REGISTERS else 4  # fewest rows for which codes are unpacked first
CHUNK = 256  # inputs that are unpacked at a time: 32 KiB in fp32, which stay in the nearest caches


@njit(nogil=True, error_model="numpy", inline="never")
def multiply_fp32_panel(
    x: Any, x_stride: Any, num_rows: Any, num_inputs: Any, panel: Any, out: Any, out_stride: Any, adds: Any
) -> None:
    """Compute out[:, :32] = x · panel for a panel of fp32, or out[:, :32] += x · panel if `adds` is true."""
    row = 0
    while row < num_rows:
        left = num_rows - row
        x_row, target = advance(x, row * x_stride), advance(out, row * out_stride)
        if HAS_WIDE_REGISTERS and (left >= 20 or left == 12):
            multiply_tile("fp32", 12, 2, x_row, x_stride, panel, panel, num_inputs, target, out_stride, adds)
            row += 12
        elif not HAS_WIDE_REGISTERS and left >= 6:
            multiply_tile("fp32", 6, 1, x_row, x_stride, panel, panel, num_inputs, target, out_stride, adds)
            right, right_target = advance(panel, LANES), advance(target, LANES)
            multiply_tile("fp32", 6, 1, x_row, x_stride, right, right, num_inputs, right_target, out_stride, adds)
            row += 6
        elif not HAS_WIDE_REGISTERS and left >= 4:
            multiply_tile("fp32", 4, 1, x_row, x_stride, panel, panel, num_inputs, target, out_stride, adds)
            right, right_target = advance(panel, LANES), advance(target, LANES)
            multiply_tile("fp32", 4, 1, x_row, x_stride, right, right, num_inputs, right_target, out_stride, adds)
            row += 4
        elif left >= D:
            multiply_tile("fp32", D, 2, x_row, x_stride, panel, panel, num_inputs, target, out_stride, adds)
            row += D
        elif left >= C:
            multiply_tile("fp32", C, 2, x_row, x_stride, panel, panel, num_inputs, target, out_stride, adds)
            row += C
        elif left >= B:
            multiply_tile("fp32", B, 2, x_row, x_stride, panel, panel, num_inputs, target, out_stride, adds)
            row += B
        else:
            multiply_tile("fp32", A, 2, x_row, x_stride, panel, panel, num_inputs, target, out_stride, adds)
            row += A


def _multiply_fp32(
    x: Any, num_rows: Any, num_inputs: Any, panels: Any, scales: Any, out: Any, out_stride: Any, first: Any, last: Any
) -> None:
    chunk = num_inputs if num_rows < MIN_UNPACKED else CHUNK
    for p in range(first, last):
        panel, target = advance(panels, p * PANEL * num_inputs), advance(out, p * PANEL)
        for start in range(0, num_inputs, chunk):
            size, part = min(chunk, num_inputs - start), advance(panel, start * PANEL)
            multiply_fp32_panel(advance(x, start), num_inputs, num_rows, size, part, target, out_stride, start > 0)


@njit(inline="always")
def _multiply_by_step(
    kind: Any,
    min_unpacked: Any,
    uses_all_tiles: Any,
    sizes: Any,
    args: Any,
) -> None:
    """Compute out[:, 32·first : 32·last] = x · panels[first:last] for a kind of numbers that may be unpacked first.

    - `kind`, `min_unpacked` and `uses_all_tiles` are constants; `min_unpacked` is the fewest rows for which the panels
      are unpacked first.
    - `sizes` are the 32-bit words of a panel and of the part of a panel that is unpacked at a time, and the numbers of
      scales that both have outside the panel.
    - `args` are the arguments of the compiled function.
    """
    x, num_rows, num_inputs, panels, scales, out, out_stride, first, last = args
    panel_words, chunk_words, panel_scales, chunk_scales = sizes
    is_unpacked = num_rows >= min_unpacked
    scratch = np.empty(CHUNK * PANEL if is_unpacked else 0, np.float32)
    for p in range(first, last):
        panel, scale = advance(panels, p * panel_words), advance(scales, p * panel_scales)
        target = advance(out, p * PANEL)
        row = num_rows if is_unpacked else 0
        while row < num_rows:
            left = num_rows - row
            x_row, target_row = advance(x, row * num_inputs), advance(target, row * out_stride)
            if left >= D and uses_all_tiles:
                multiply_tile(kind, D, 2, x_row, num_inputs, panel, scale, num_inputs, target_row, out_stride, False)
                row += D
            elif left >= C and uses_all_tiles:
                multiply_tile(kind, C, 2, x_row, num_inputs, panel, scale, num_inputs, target_row, out_stride, False)
                row += C
            elif left >= B:
                multiply_tile(kind, B, 2, x_row, num_inputs, panel, scale, num_inputs, target_row, out_stride, False)
                row += B
            else:
                multiply_tile(kind, A, 2, x_row, num_inputs, panel, scale, num_inputs, target_row, out_stride, False)
                row += A
        for c in range(-(-num_inputs // CHUNK) if is_unpacked else 0):
            size, unpacked = min(CHUNK, num_inputs - c * CHUNK), pointer_to(scratch, 0)
            unpack_panel(kind, advance(panel, c * chunk_words), advance(scale, c * chunk_scales), size, unpacked)
            x_part = advance(x, c * CHUNK)
            multiply_fp32_panel(x_part, num_inputs, num_rows, size, unpacked, target, out_stride, c > 0)


def _multiply_bf16(
    x: Any, num_rows: Any, num_inputs: Any, panels: Any, scales: Any, out: Any, out_stride: Any, first: Any, last: Any
) -> None:
    sizes = (num_inputs * PANEL // 2, CHUNK * PANEL // 2, 0, 0)
    args = (x, num_rows, num_inputs, panels, scales, out, out_stride, first, last)
    _multiply_by_step("bf16", MIN_UNPACKED_BF16, HAS_WIDE_REGISTERS, sizes, args)


def _multiply_e4m3(
    x: Any, num_rows: Any, num_inputs: Any, panels: Any, scales: Any, out: Any, out_stride: Any, first: Any, last: Any
) -> None:
    sizes = (num_inputs * PANEL // 4, CHUNK * PANEL // 4, -(-num_inputs // E4M3_GROUP), CHUNK // E4M3_GROUP)
    args = (x, num_rows, num_inputs, panels, scales, out, out_stride, first, last)
    _multiply_by_step("e4m3", MIN_UNPACKED, True, sizes, args)


def _multiply_e2m1(
    x: Any, num_rows: Any, num_inputs: Any, panels: Any, scales: Any, out: Any, out_stride: Any, first: Any, last: Any
) -> None:
    sizes = (num_inputs // E2M1_GROUP * E2M1_GROUP_WORDS, CHUNK // E2M1_GROUP * E2M1_GROUP_WORDS, 0, 0)
    args = (x, num_rows, num_inputs, panels, scales, out, out_stride, first, last)
    _multiply_by_step("e2m1", MIN_UNPACKED, True, sizes, args)


_FUNCTIONS = {"fp32": _multiply_fp32, "bf16": _multiply_bf16, "e4m3": _multiply_e4m3, "e2m1": _multiply_e2m1}
_SIGNATURE = types.void(POINTER, *(types.intp,) * 2, POINTER, POINTER, POINTER, *(types.intp,) * 3)


@cache
def _compiled(kind: Kind) -> Any:
    return cfunc(_SIGNATURE, nopython=True, cache=True, error_model="numpy")(_FUNCTIONS[kind])


def product_address(kind: Kind) -> int:
    """Return the address of the function for panels of `kind`, which `multiply_panels` takes; compile it if needed."""
    return int(_compiled(kind).address)


@intrinsic
def multiply_panels(
    _: Any,
    product: Any,
    x: Any,
    num_rows: Any,
    num_inputs: Any,
    panels: Any,
    scales: Any,
    out: Any,
    out_stride: Any,
    first: Any,
    last: Any,
) -> Any:
    """Compute out[:, 32·first : 32·last] = x · panels[first:last] with the function at the address `product`.

    `x`, `panels`, `scales` and `out` are addresses too. `out_stride` is the distance between two rows of `out`, in fp32
    numbers.
    """

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        pointer = F32.as_pointer()
        kinds = [pointer, I64, I64, pointer, pointer, pointer, I64, I64, I64]
        function = builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), kinds).as_pointer())
        values = [
            builder.inttoptr(arg, kind) if kind == pointer else arg for arg, kind in zip(args[1:], kinds, strict=True)
        ]
        builder.call(function, values)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 10), generate
