"""Matrix products whose rows do not depend on their company, at the speed of the memory or of the FMA units.

What surprises: every output is one chain of fused multiply-adds over the inputs in their order, in fp32, whatever the
number of rows, their place or the number of threads; so a row's bits are the same alone and among 2,048 others. That
is possible without loss because the lanes of a vector are outputs, not inputs: weights lie in panels of 32 outputs,
input after input. bf16 weights stay bf16 in memory (two inputs share a 32-bit word) and become fp32 in registers.

The tiles here multiply a few rows by one panel.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from model.cpu.vectors import (
    I64,
    POINTER,
    VECTOR,
    WORDS,
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
