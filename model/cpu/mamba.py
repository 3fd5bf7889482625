"""Mamba-2 between its two projections: convolution, state space and gated norm, token after token.

What surprises: prompts run through the recurrence too. A head's state (head dim × state dim) stays in the first-level
cache while its tokens pass, so the recurrence costs no more than the chunked scan, and a token's bits cannot depend on
where its prompt was cut, on who shares the step, or on whether it was prompted, drafted, or computed again.

Legend: T tokens of the step, R requests, H heads, D head dim, G groups, N state dim, C conv channels, K taps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from model.cpu.functions import bits_of, from_bf16, round_to_bf16, silu

FAST = {
    "contract",
    "reassoc",
    "nsz",
}  # sums over lanes in the compiler's order, which is one and the same for every row


@njit(nogil=True, fastmath=FAST, inline="never")
def _convolve(raw_LC: Any, weight_KC: Any, bias_C: Any, out_LC: Any) -> None:
    """SiLU of the causal convolution of one request's tokens; `raw_LC` begins with the K-1 columns before them."""
    num_channels = bias_C.shape[0]
    for t in range(out_LC.shape[0]):
        out = out_LC[t]
        for c in range(num_channels):
            out[c] = bias_C[c]
        for tap in range(weight_KC.shape[0]):
            raw, weight = raw_LC[t + tap], weight_KC[tap]
            for c in range(num_channels):
                out[c] += raw[c] * weight[c]
        for c in range(num_channels):
            out[c] = silu(out[c])


@njit(nogil=True, fastmath=FAST, inline="never")
def _recur_head(
    conv_LC: Any,
    first_x: Any,
    first_b: Any,
    first_c: Any,
    delta_L: Any,
    a: Any,
    skip: Any,
    state_DN: Any,
    y_LI: Any,
    has_output: Any,
) -> None:
    """S ← exp(ΔA)·S + Δ x ⊗ B, y = S·C + D·x for one head of one request; x, B and C start at these channels."""
    head_dim, state_dim = state_DN.shape
    for t in range(conv_LC.shape[0]):
        decay, delta = np.float32(math.exp(delta_L[t] * a)), delta_L[t]
        conv = conv_LC[t]
        b, c = conv[first_b : first_b + state_dim], conv[first_c : first_c + state_dim]
        for d in range(head_dim):
            added = conv[first_x + d] * delta
            row = state_DN[d]
            total = np.float32(0.0)
            for n in range(state_dim):
                value = row[n] * decay + added * b[n]
                row[n] = value
                total += value * c[n]
            if has_output:
                y_LI[t, first_x + d] = total + skip * conv[first_x + d]


@njit(nogil=True, fastmath=FAST, inline="never")
def _gated_norm(y: Any, gate: Any, weight: Any, num_groups: Any, eps: Any, out: Any) -> None:
    size = y.shape[0] // num_groups
    for g in range(num_groups):
        total = np.float32(0.0)
        for i in range(g * size, (g + 1) * size):
            u = y[i] * silu(gate[i])
            out[i] = u
            total += u * u
        scale = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(size) + eps))
        for i in range(g * size, (g + 1) * size):
            out[i] = out[i] * scale * weight[i]


@njit(nogil=True, cache=True)
def mix(
    projected_TP: Any,
    starts_R: Any,
    lens_R: Any,
    slots_R: Any,
    is_new_R: Any,
    keeps_R: Any,
    window_SKC: Any,
    is_bf16: Any,
    state_SHDN: Any,
    weight_KC: Any,
    bias_C: Any,
    a_H: Any,
    skip_H: Any,
    delta_bias_H: Any,
    least_delta: Any,
    most_delta: Any,
    norm_weight: Any,
    num_groups: Any,
    eps: Any,
    has_output: Any,
    out_TI: Any,
) -> None:
    """`projected_TP` is in_proj's output, gate | x | B | C | Δ; writes the gated norm's output to `out_TI`.

    Requests of `keeps_R` leave their state in their slots; the others (whose last tokens are guesses) leave no trace.
    Windows in bf16 come as int16: then the convolution's inputs are rounded to bf16, in this step as in the next.
    Without `has_output` only the state moves on.
    """
    num_heads, head_dim, state_dim = state_SHDN.shape[1:]
    num_past, num_channels = window_SKC.shape[1:]
    inner = num_heads * head_dim
    num_pairs = (num_channels - inner) // 2 // state_dim  # groups of B and C
    heads_per_group = num_heads // num_pairs
    for r in range(len(starts_R)):
        start, length, slot = starts_R[r], lens_R[r], slots_R[r]
        if is_new_R[r]:
            window_SKC[slot] = 0
            state_SHDN[slot] = 0.0
        raw_LC = np.empty((num_past + length, num_channels), np.float32)  # the window, then this step's columns
        for k in range(num_past):
            for c in range(num_channels):
                value = window_SKC[slot, k, c]
                raw_LC[k, c] = from_bf16(value) if is_bf16 else np.float32(value)
        for t in range(length):
            for c in range(num_channels):
                value = projected_TP[start + t, inner + c]
                raw_LC[num_past + t, c] = round_to_bf16(value) if is_bf16 else value
        conv_LC = np.empty((length, num_channels), np.float32)
        _convolve(raw_LC, weight_KC, bias_C, conv_LC)
        if keeps_R[r]:
            for k in range(num_past):
                for c in range(num_channels):
                    value = raw_LC[length + k, c]
                    if is_bf16:
                        window_SKC[slot, k, c] = bits_of(value) >> np.int32(16)
                    else:
                        window_SKC[slot, k, c] = value
        y_LI = np.empty((length, inner), np.float32)
        delta_L = np.empty(length, np.float32)
        scratch_DN = np.empty((head_dim, state_dim), np.float32)
        for h in range(num_heads):
            for t in range(length):
                raw = projected_TP[start + t, inner + num_channels + h] + delta_bias_H[h]
                soft = raw if raw > 20.0 else np.float32(math.log1p(math.exp(raw)))
                delta_L[t] = min(max(soft, least_delta), most_delta)
            state_DN = state_SHDN[slot, h]
            if not keeps_R[r]:
                scratch_DN[:] = state_DN
                state_DN = scratch_DN
            first_b = inner + h // heads_per_group * state_dim
            first_c = first_b + num_pairs * state_dim
            first_x = h * head_dim
            _recur_head(conv_LC, first_x, first_b, first_c, delta_L, a_H[h], skip_H[h], state_DN, y_LI, has_output)
        if has_output:
            for t in range(length):
                _gated_norm(y_LI[t], projected_TP[start + t], norm_weight, num_groups, eps, out_TI[start + t])
