"""A *tile* is a compiled loop that multiplies a few rows by the panel of a weight, with all sums in registers.

A panel holds the weights of 32 outputs: first the weights that belong to input 0, then the weights of input 1, and so
on. There is one layout for each kind of number, and each is read in steps:

| kind | inputs of a step | bytes of a step | layout of a step |
|---|---|---|---|
| fp32 | 1 | 128 | 32 numbers |
| bf16 | 2 | 128 | 32 words of 32 bits; a word holds an output's weights of both inputs |
| e4m3 | 2 | 64 | 32 words of 16 bits; a word holds an output's codes of both inputs |
| e2m1 | 4 | 64 | 32 words of 16 bits; a word holds an output's codes of all four inputs |

The first input of a word is in its lowest bits. 128 inputs of e4m3 have one scale, an fp32 number outside the panel. 16
inputs of e2m1 have one scale per output; these scales are e4m3 codes, which stand before the group's four steps in 16
words of 16 bits, output 0 with output 16, output 1 with output 17, and so on.

What surprises: codes become half-precision numbers by shifts, because a half has the code's fraction bits and a larger
exponent. The half is too small by a power of two, for subnormal codes too, and the scale makes up for it. A
multiplication by a power of two rounds nothing, so each weight is code · scale, rounded once to fp32, which is the
weight of a dequantized matrix bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from model.cpu.vectors import (
    F32,
    I64,
    LANES,
    POINTER,
    VECTOR,
    WORDS,
    broadcast,
    fma,
    i64,
    load_vector,
    prefetch,
    splat,
    splat_number,
    splat_words,
    store_vector,
)

Kind = Literal["fp32", "bf16", "e4m3", "e2m1"]

PANEL = 32  # number of outputs in a panel: two vectors of 16 lanes
PREFETCH_WORDS = 1024  # distance of a prefetch, 4 KiB; 512 to 2048 words measured the same
HAS_WIDE_REGISTERS = binding.get_host_cpu_features().get("avx512f", False)  # 32 registers that hold 16 numbers each
INPUTS_PER_STEP: dict[Kind, int] = {"fp32": 1, "bf16": 2, "e4m3": 2, "e2m1": 4}
WORDS_PER_STEP: dict[Kind, int] = {"fp32": 32, "bf16": 32, "e4m3": 16, "e2m1": 16}  # words of 32 bits
E4M3_GROUP, E2M1_GROUP = 128, 16  # inputs that share a scale
SCALE_WORDS = 8  # words of 32 bits with the scales of a group of e2m1
E2M1_GROUP_WORDS = SCALE_WORDS + E2M1_GROUP // INPUTS_PER_STEP["e2m1"] * WORDS_PER_STEP["e2m1"]
E4M3_SHIFT, E2M1_SHIFT = 2.0**8, 2.0**14  # code / half

_SHORTS, _HALVES = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(ir.HalfType(), LANES)


def _shorts(value: int) -> Any:
    return ir.Constant(_SHORTS, [value] * LANES)


def _widened(builder: Any, words: Any, left: int, right: int, mask: int) -> Any:
    """Emit the fp32 values of the halves that two shifts and a mask make of `words`; shifts right copy the sign."""
    moved = builder.shl(words, _shorts(left)) if left else words
    bits = builder.and_(builder.ashr(moved, _shorts(right)), _shorts(mask))
    return builder.fpext(builder.bitcast(bits, _HALVES), VECTOR)


def _from_e4m3(builder: Any, words: Any) -> list[Any]:
    """Emit the values / 2**8 of the codes in the low bytes and in the high bytes of `words`."""
    return [_widened(builder, words, left, 1, 0xBF80) for left in (8, 0)]


def _from_e2m1(builder: Any, words: Any) -> list[Any]:
    """Emit the values / 2**14 of the four codes of each word, the lowest code first."""
    return [_widened(builder, words, left, 3, 0x8E00) for left in (12, 8, 4, 0)]


def _from_bf16(builder: Any, words: Any) -> list[Any]:
    even = builder.bitcast(builder.shl(words, splat_words(16)), VECTOR)
    return [even, builder.bitcast(builder.and_(words, splat_words(-0x10000)), VECTOR)]


def _load_weights(builder: Any, kind: Kind, pointer: Any, scales: list[Any], num_vectors: int) -> list[list[Any]]:
    """Emit the weights of the step at `pointer`: vectors [input of the step][vector of the panel]."""
    distance = WORDS_PER_STEP[kind] // 2
    pointers = [builder.gep(pointer, [i64(distance * part)]) for part in range(num_vectors)]
    for place in range(0, num_vectors * distance, LANES):
        prefetch(builder, builder.gep(pointer, [i64(place)]), PREFETCH_WORDS)
    match kind:
        case "fp32":
            return [[load_vector(builder, pointer) for pointer in pointers]]
        case "bf16":
            columns = [_from_bf16(builder, load_vector(builder, pointer, WORDS)) for pointer in pointers]
            return [list(row) for row in zip(*columns, strict=True)]
    decode = _from_e4m3 if kind == "e4m3" else _from_e2m1
    columns = [
        [builder.fmul(value, scale) for value in decode(builder, load_vector(builder, pointer, _SHORTS))]
        for pointer, scale in zip(pointers, scales, strict=True)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _loop(
    builder: Any, first: Any, last: Any, stride: int, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """Emit a loop that runs at least once; `body` gets the index and the carried values, and returns the new values."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    index, old = builder.phi(I64), [builder.phi(value.type) for value in carried]
    new = body(index, old)
    following = builder.add(index, i64(stride))
    for phi, start, value in zip([index, *old], [first, *carried], [following, *new], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, last), loop, after)
    builder.position_at_end(after)
    return new


def _for_each_step(
    builder: Any,
    kind: Kind,
    panel: Any,
    scales: Any,
    num_inputs: Any,
    num_vectors: int,
    carried: list[Any],
    body: Callable[[Any, list[list[Any]], list[Any]], list[Any]],
) -> list[Any]:
    """Emit a loop over a panel's steps; `body` gets the step's first input, its weights and the carried values."""
    inputs, words = INPUTS_PER_STEP[kind], WORDS_PER_STEP[kind]

    def steps(pointer: Any, first: Any, last: Any, vectors: list[Any], values: list[Any]) -> list[Any]:
        def step(index: Any, values: list[Any]) -> list[Any]:
            offset = builder.mul(builder.udiv(builder.sub(index, first), i64(inputs)), i64(words))
            place = builder.gep(pointer, [offset])
            return body(index, _load_weights(builder, kind, place, vectors, num_vectors), values)

        return _loop(builder, first, last, inputs, values, step)

    def group_of_e4m3(first: Any, values: list[Any]) -> list[Any]:
        end = builder.add(first, i64(E4M3_GROUP))
        last = builder.select(builder.icmp_signed("<", end, num_inputs), end, num_inputs)
        scale = builder.load(builder.gep(scales, [builder.udiv(first, i64(E4M3_GROUP))]))
        vector = splat(builder, builder.fmul(scale, ir.Constant(F32, E4M3_SHIFT)))
        pointer = builder.gep(panel, [builder.mul(builder.udiv(first, i64(inputs)), i64(words))])
        return steps(pointer, first, last, [vector] * num_vectors, values)

    def group_of_e2m1(first: Any, values: list[Any]) -> list[Any]:
        pointer = builder.gep(panel, [builder.mul(builder.udiv(first, i64(E2M1_GROUP)), i64(E2M1_GROUP_WORDS))])
        # Two multiplications: the first rounds like the dequantized scale, and the second does not round.
        factor = splat(builder, builder.fmul(builder.load(scales), ir.Constant(F32, E4M3_SHIFT)))
        codes = _from_e4m3(builder, load_vector(builder, pointer, _SHORTS))
        vectors = [builder.fmul(builder.fmul(code, factor), splat_number(E2M1_SHIFT)) for code in codes]
        pointer = builder.gep(pointer, [i64(SCALE_WORDS)])
        return steps(pointer, first, builder.add(first, i64(E2M1_GROUP)), vectors, values)

    if kind == "e4m3":
        return _loop(builder, i64(0), num_inputs, E4M3_GROUP, carried, group_of_e4m3)
    if kind == "e2m1":
        return _loop(builder, i64(0), num_inputs, E2M1_GROUP, carried, group_of_e2m1)
    return steps(panel, i64(0), num_inputs, [], carried)


@intrinsic(prefer_literal=True)
def multiply_tile(
    _: Any,
    kind: Any,
    num_rows: Any,
    num_vectors: Any,
    x: Any,
    x_stride: Any,
    panel: Any,
    scales: Any,
    num_inputs: Any,
    out: Any,
    out_stride: Any,
    adds: Any,
) -> Any:
    """Compute out = x · panel for `num_rows` rows, or out += x · panel if `adds` is true.

    `kind`, `num_rows` and `num_vectors` are constants. With one vector, the first 16 outputs of the panel are computed.
    """
    name, rows, vectors = kind.literal_value, num_rows.literal_value, num_vectors.literal_value

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        x, x_stride, panel, scales, num_inputs, out, out_stride, adds = args[3:]
        x_rows = [builder.gep(x, [builder.mul(x_stride, i64(row))]) for row in range(rows)]
        targets = [
            builder.gep(out, [builder.add(builder.mul(out_stride, i64(row)), i64(LANES * part))])
            for row in range(rows)
            for part in range(vectors)
        ]
        start = [builder.select(adds, load_vector(builder, target), splat_number(0.0)) for target in targets]

        def multiply(first: Any, weights: list[list[Any]], sums: list[Any]) -> list[Any]:
            for place, weights_of_input in enumerate(weights):
                values = [broadcast(builder, builder.gep(row, [builder.add(first, i64(place))])) for row in x_rows]
                terms = [(value, weight) for value in values for weight in weights_of_input]
                sums = [fma(builder, *term, old) for term, old in zip(terms, sums, strict=True)]
            return sums

        sums = _for_each_step(builder, name, panel, scales, num_inputs, vectors, start, multiply)
        for target, value in zip(targets, sums, strict=True):
            store_vector(builder, value, target)
        return context.get_dummy_value()

    sizes = (types.intp, POINTER, types.intp, types.boolean)
    return types.void(kind, num_rows, num_vectors, POINTER, types.intp, POINTER, POINTER, *sizes), generate


@intrinsic(prefer_literal=True)
def unpack_panel(_: Any, kind: Any, panel: Any, scales: Any, num_inputs: Any, out: Any) -> Any:
    """Write the weights of a panel's first `num_inputs` inputs to `out` in the layout of fp32; `kind` is a constant."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        panel, scales, num_inputs, out = args[1:]

        def store(first: Any, weights: list[list[Any]], _: list[Any]) -> list[Any]:
            for place, weights_of_input in enumerate(weights):
                target = builder.gep(out, [builder.mul(builder.add(first, i64(place)), i64(PANEL))])
                for part, vector in enumerate(weights_of_input):
                    store_vector(builder, vector, builder.gep(target, [i64(LANES * part)]))
            return []

        _for_each_step(builder, kind.literal_value, panel, scales, num_inputs, 2, [], store)
        return context.get_dummy_value()

    return types.void(kind, POINTER, POINTER, types.intp, POINTER), generate
