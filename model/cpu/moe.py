"""The kernels here pick experts for the router, compute the routed experts, and add the experts' outputs exactly.

`model.exact_sums` explains the exact sums and the grid.

Legend: N rows, E experts, K picks per row, P = N·K picks, L expert input, M expert width, J matrices of an expert,
G groups of experts, B rows of one expert.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from model.cpu.functions import exp, from_bf16, silu
from model.cpu.panel_products import multiply_panels
from model.cpu.panel_tiles import PANEL

MAX_GRID_SUM = 2.0**62


@njit(nogil=True, error_model="numpy", inline="never")
def _scores(logits_E: Any, is_softmax: Any, score_E: Any) -> None:
    """Write the softmax of `logits_E` or, if `is_softmax` is False, the sigmoids to `score_E`, in fp32."""
    if not is_softmax:
        for e in range(len(logits_E)):
            score_E[e] = np.float32(1.0 / (1.0 + math.exp(-logits_E[e])))
        return
    most, total = logits_E.max(), np.float32(0.0)
    for e in range(len(logits_E)):
        score_E[e] = exp(logits_E[e] - most)
    for e in range(len(logits_E)):
        total += score_E[e]
    for e in range(len(logits_E)):
        score_E[e] /= total


@njit(nogil=True, error_model="numpy", cache=True)
def choose_experts(
    logits_NE: Any,
    is_softmax: Any,
    bias_E: Any,
    num_groups: Any,
    topk_groups: Any,
    normalize: Any,
    scaling: Any,
    ids_NK: Any,
    weights_NK: Any,
) -> None:
    """Pick K experts for each row, by score plus bias, from the best `topk_groups` groups of experts.

    The scores are a softmax if `is_softmax` is True, else sigmoids. A bias of length 0 stands for no bias. Groups are
    ranked by the sum of the two highest values (score plus bias) in the group. Among experts with equal values, the
    lowest id comes first. The ids and weights of the picked experts are written to `ids_NK` and `weights_NK`.
    """
    num_rows, num_experts = logits_NE.shape
    top_k = ids_NK.shape[1]
    per_group = num_experts // num_groups
    score_E, choice_E = np.empty(num_experts, np.float32), np.empty(num_experts, np.float32)
    group_G = np.empty(num_groups, np.float32)
    for n in range(num_rows):
        _scores(logits_NE[n], is_softmax, score_E)
        for e in range(num_experts):
            choice_E[e] = score_E[e] + bias_E[e] if len(bias_E) > 0 else score_E[e]
        if topk_groups < num_groups:
            for g in range(num_groups):
                best, second = np.float32(-np.inf), np.float32(-np.inf)
                for e in range(g * per_group, (g + 1) * per_group):
                    if choice_E[e] > best:
                        best, second = choice_E[e], best
                    elif choice_E[e] > second:
                        second = choice_E[e]
                group_G[g] = best + second if per_group > 1 else best
            for _ in range(num_groups - topk_groups):
                worst = 0
                for g in range(num_groups):
                    if group_G[g] <= group_G[worst]:
                        worst = g
                group_G[worst] = np.inf
                choice_E[worst * per_group : (worst + 1) * per_group] = -np.inf
        total = np.float32(0.0)
        for k in range(top_k):
            best_e = 0
            for e in range(1, num_experts):
                if choice_E[e] > choice_E[best_e]:
                    best_e = e
            choice_E[best_e] = -np.inf
            ids_NK[n, k] = best_e
            weights_NK[n, k] = score_E[best_e]
            total += score_E[best_e]
        for k in range(top_k):
            if normalize:  # the sum of the best scores of a softmax is so large that 1e-20 does not change it
                weights_NK[n, k] /= total + np.float32(1e-20)
            weights_NK[n, k] *= scaling


@njit(error_model="numpy", cache=True)
def grid_exponents(x_NL: Any, is_bf16: Any, weights_NK: Any, shift: Any) -> Any:
    """Compute `model.exact_sums.grid_exponents`, int16 (N,); `x_NL` is fp32, or holds the bits of bf16 as int16."""
    grid_N = np.empty(x_NL.shape[0], np.int16)
    for n in range(x_NL.shape[0]):
        total = np.float64(0.0)
        for number in x_NL[n]:
            value = np.float64(from_bf16(number) if is_bf16 else np.float32(number))
            total += value * value
        _, exponent = math.frexp(total * np.float64(weights_NK[n].max()))
        grid_N[n] = min(max(exponent + shift, -200), 200)
    return grid_N


@njit(error_model="numpy", cache=True)
def from_grid(sums_NL: Any, grid_N: Any) -> Any:
    """Compute `model.exact_sums.from_grid`: convert sums in units of 2**grid to fp32 (N, L)."""
    out_NL = np.empty(sums_NL.shape, np.float32)
    for n in range(sums_NL.shape[0]):
        unit, sums, out = math.ldexp(1.0, int(grid_N[n])), sums_NL[n], out_NL[n]
        for i in range(sums.shape[0]):
            out[i] = np.float32(np.float64(sums[i]) * unit)
    return out_NL


@njit(nogil=True, error_model="numpy", inline="never")
def _multiply(x_BI: Any, num_rows: Any, weight: Any, out_BO: Any) -> None:
    """Compute out = x · W for the first `num_rows` rows, where `weight` is the (product, panels, scales) of W."""
    num_inputs, stride = x_BI.shape[1], out_BO.shape[1]
    x, out, num_panels = x_BI.ctypes.data, out_BO.ctypes.data, stride // PANEL
    multiply_panels(weight[0], x, num_rows, num_inputs, weight[1], weight[2], out, stride, 0, num_panels)


@njit(nogil=True, error_model="numpy", cache=True)
def partial_sums(
    x_NL: Any,
    x_is_bf16: Any,
    row_P: Any,
    expert_P: Any,
    weight_P: Any,
    grid_N: Any,
    matrices_JE: Any,
    width: Any,
    sums_NL: Any,
) -> bool:
    """Add weight·expert(x[row]) of every pick to row `row` of `sums_NL`, which is int64 in units of 2**grid.

    - `x_NL` is fp32 or, if `x_is_bf16` is True, holds the bits of bf16 as int16.
    - `matrices_JE` holds the addresses of each expert's packed weights, int64 (J, E, 3): for each of an expert's J
      matrices, in the order of `ExpertShape.matrices`, the first three fields of its `PackedMatrixDescriptor`.

    Returns True, or False if an expert's output is not finite or too large to add; `sums_NL` is then undefined.
    """
    num_picks, input_dim = len(row_P), x_NL.shape[1]
    num_experts = matrices_JE.shape[1]
    first_E = np.zeros(num_experts + 1, np.int64)
    for p in range(num_picks):
        first_E[expert_P[p] + 1] += 1
    most = first_E.max()
    first_E = np.cumsum(first_E)
    place_E = first_E.copy()
    order_P = np.empty(num_picks, np.int64)
    for p in range(num_picks):
        order_P[place_E[expert_P[p]]] = p
        place_E[expert_P[p]] += 1
    padded_width, padded_dim = -(-width // PANEL) * PANEL, -(-input_dim // PANEL) * PANEL
    x_BL = np.empty((most, input_dim), np.float32)
    is_swiglu = matrices_JE.shape[0] == 3  # gate, up and down; an expert of the kind relu2 has only up and down
    gate_BM = np.empty((most if is_swiglu else 0, padded_width), np.float32)
    hidden_BM = np.empty((most, padded_width), np.float32)
    compact_BM = np.empty((most, width), np.float32)
    y_BL = np.empty((most, padded_dim), np.float32)
    for e in range(num_experts):
        first, last = first_E[e], first_E[e + 1]
        count = last - first
        if count == 0:
            continue
        for b in range(count):
            source, target = x_NL[row_P[order_P[first + b]]], x_BL[b]
            for i in range(input_dim):
                target[i] = from_bf16(source[i]) if x_is_bf16 else np.float32(source[i])
        _multiply(x_BL, count, matrices_JE[-2, e], hidden_BM)
        if is_swiglu:
            _multiply(x_BL, count, matrices_JE[0, e], gate_BM)
        for b in range(count):
            hidden, compact = hidden_BM[b], compact_BM[b]
            if is_swiglu:
                gate = gate_BM[b]
                for m in range(width):
                    compact[m] = silu(gate[m]) * hidden[m]
            else:
                for m in range(width):
                    value = max(hidden[m], np.float32(0.0))
                    compact[m] = value * value
        _multiply(compact_BM, count, matrices_JE[-1, e], y_BL)
        for b in range(count):
            p = order_P[first + b]
            row = row_P[p]
            scale = math.ldexp(np.float64(weight_P[p]), -int(grid_N[row]))
            for i in range(input_dim):
                units = np.rint(np.float64(y_BL[b, i]) * scale)
                if not abs(units) < MAX_GRID_SUM:
                    return False
                sums_NL[row, i] += np.int64(units)
    return True
