"""Scalar functions that compilers turn into vector code: no calls, no branches, the same bits in every lane.

Polynomial after range reduction, as in every vector mathematics library; relative error below 2**-21 (tested). The
callers let the compiler regroup sums, which must not harm them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_F32, _I32 = ir.FloatType(), ir.IntType(32)


@intrinsic
def bits_of(_: Any, value: Any) -> Any:
    """The bits of an fp32 number as int32."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def from_bits(_: Any, value: Any) -> Any:
    """The fp32 number with these 32 bits."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), generate


LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
HALF = np.float32(0.5)
LOWEST, HIGHEST = np.float32(-87.3), np.float32(88.3)


@njit(forceinline=True, error_model="numpy")
def exp(x: Any) -> Any:
    """e**x in fp32; arguments below -87.3 give about 1e-38, above 88.3 about 2e38."""
    x = max(min(x, HIGHEST), LOWEST)
    whole = np.floor(x * LOG2_E + HALF)  # no trick with a large constant: callers may regroup sums
    r = x - whole * LN2_HIGH
    r = r - whole * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    scale = from_bits(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))
    return p * scale


@njit(forceinline=True, error_model="numpy")
def silu(x: Any) -> Any:
    return x / (np.float32(1.0) + exp(-x))


@njit(forceinline=True, error_model="numpy")
def round_to_bf16(x: Any) -> Any:
    """The nearest bf16 number, ties to even, as fp32."""
    bits = bits_of(x)
    odd = (bits >> np.int32(16)) & np.int32(1)
    return from_bits(np.int32((bits + np.int32(0x7FFF) + odd) & np.int32(-0x10000)))


@njit(forceinline=True, error_model="numpy")
def from_bf16(bits: Any) -> Any:
    """The fp32 number whose upper half is this int16."""
    return from_bits(np.int32(np.int32(bits) << np.int32(16)))
