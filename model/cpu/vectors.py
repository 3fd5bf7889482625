"""The functions here emit LLVM instructions on vectors and pointers for kernels that compilers do not vectorise well.

A vector has 16 fp32 lanes: one AVX-512 register, two AVX2 registers or four NEON registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR, WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
POINTER = types.CPointer(types.float32)


def i64(value: int) -> Any:
    return ir.Constant(I64, value)


def splat_words(value: int) -> Any:
    """Return a vector constant with the 32-bit word `value` in every lane."""
    return ir.Constant(WORDS, [value] * LANES)


def splat_number(value: float) -> Any:
    """Return a vector constant with the fp32 number `value` in every lane."""
    return ir.Constant(VECTOR, [value] * LANES)


def load_vector(builder: Any, pointer: Any, kind: Any = VECTOR) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)


def store_vector(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, VECTOR.as_pointer()), align=4)


def splat(builder: Any, value: Any) -> Any:
    """Emit a vector with the number `value` in every lane."""
    nothing = ir.Constant(VECTOR, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, splat_words(0))


def broadcast(builder: Any, pointer: Any) -> Any:
    return splat(builder, builder.load(pointer))


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Emit a fused multiply-add of vectors, a·b + c, with one rounding after the addition."""
    kind = ir.FunctionType(VECTOR, [VECTOR, VECTOR, VECTOR])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), [a, b, c])


def sum_of_lanes(builder: Any, value: Any) -> Any:
    """Emit the sum of a vector's lanes, added as a tree: lanes 0-7 to lanes 8-15, then 0-3 to 4-7, and so on."""
    width = LANES
    while width > 1:
        width //= 2
        half = [ir.Constant(ir.VectorType(I32, width), list(range(start, start + width))) for start in (0, width)]
        parts = [builder.shuffle_vector(value, value, lanes) for lanes in half]
        value = builder.fadd(*parts)
    return builder.extract_element(value, ir.Constant(I32, 0))


def prefetch(builder: Any, pointer: Any, num_words: int) -> None:
    """Emit a prefetch of the memory `num_words` words after `pointer`, to hide the memory's latency."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    target = builder.bitcast(builder.gep(pointer, [i64(num_words)]), byte)
    builder.call(
        function, [target, *(ir.Constant(I32, flag) for flag in (0, 2, 1))]
    )  # meaning of the flags: read access, moderate locality, data cache


@intrinsic
def pointer_to(_: Any, array: Any, offset: Any) -> Any:
    """Return a pointer to element number `offset` of a contiguous array of 32-bit numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(builder.bitcast(data, F32.as_pointer()), [args[1]])

    return POINTER(array, types.intp), generate


@intrinsic
def advance(_: Any, pointer: Any, offset: Any) -> Any:
    """Return the pointer to the number that comes `offset` fp32 numbers after `pointer`."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return POINTER(POINTER, types.intp), generate


@intrinsic
def transpose_tile(_: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
    """Write the transpose of a tile of 16 x 16 fp32 numbers; a stride is the distance between two rows.

    Four rounds of interleaving row i with row i + 8 transpose the tile in registers.
    """

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        source, source_stride, target, target_stride = args
        rows = [
            load_vector(builder, builder.gep(source, [builder.mul(source_stride, i64(row))])) for row in range(LANES)
        ]
        half = LANES // 2
        lanes = [
            ir.Constant(WORDS, [lane // 2 + start + (lane % 2) * LANES for lane in range(LANES)]) for start in (0, half)
        ]
        for _ in range(4):
            rows = [builder.shuffle_vector(rows[row], rows[row + half], part) for row in range(half) for part in lanes]
        for row, vector in enumerate(rows):
            store_vector(builder, vector, builder.gep(target, [builder.mul(target_stride, i64(row))]))
        return context.get_dummy_value()

    return types.void(POINTER, types.intp, POINTER, types.intp), generate
