"""The scalar functions here have no calls and no branches, so that compilers turn loops over them into vector code.

Every vector lane gives the same bits. As in other vector libraries, `exp` reduces its argument's range and then
evaluates a polynomial; its relative error is below 2**-21 (tested).

`fastmath=False` must be stated. Without it, numba compiles a function with the options of the caller that happens to be
compiled first in the process, and some callers allow the compiler to regroup sums. Two processes that compile their
kernels in different orders would then get different bits.
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
    """Return the bits of an fp32 number as int32."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def from_bits(_: Any, value: Any) -> Any:
    """Return the fp32 number whose bits are given as an int32."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), generate


LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
HALF = np.float32(0.5)
LOWEST, HIGHEST = np.float32(-87.3), np.float32(88.3)


@njit(forceinline=True, error_model="numpy", fastmath=False)
def exp(x: Any) -> Any:
    """Compute e**x in fp32; arguments below -87.3 give about 1e-38, arguments above 88.3 about 2e38."""
    x = max(min(x, HIGHEST), LOWEST)
    whole = np.floor(x * LOG2_E + HALF)  # not by adding a large constant: callers may regroup sums
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


@njit(forceinline=True, error_model="numpy", fastmath=False)
def silu(x: Any) -> Any:
    return x / (np.float32(1.0) + exp(-x))


@njit(forceinline=True, error_model="numpy", fastmath=False)
def round_to_bf16(x: Any) -> Any:
    """Round an fp32 number to the nearest bf16 number, ties to even, and return the bf16 number as fp32."""
    bits = bits_of(x)
    odd = (bits >> np.int32(16)) & np.int32(1)
    return from_bits(np.int32((bits + np.int32(0x7FFF) + odd) & np.int32(-0x10000)))


@njit(forceinline=True, error_model="numpy", fastmath=False)
def from_bf16(bits: Any) -> Any:
    """Return the bf16 number whose bits are given as an int16, as fp32."""
    return from_bits(np.int32(np.int32(bits) << np.int32(16)))
