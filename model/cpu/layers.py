"""Each kernel here does the work before or after a layer's core in one compiled call.

Before the core are the norm and a projection; after the core are a projection and the addition to the residual stream.
A step with one token is a hundred products of a few microseconds each. Calling each product from Python through PyTorch
would take longer than the arithmetic.

`x_TD` is the residual stream, which is changed in place. A bias of length 0 stands for no bias.

Legend: T rows of the step, V vocabulary, D hidden, I inputs, O outputs, E experts, K picks per row, L expert input.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from model.cpu.functions import bits_of, from_bf16, round_to_bf16, silu
from model.cpu.linear import apply_linear
from model.cpu.moe import choose_experts
from model.cpu.norm import rms_norm


@njit(error_model="numpy", cache=True)
def embed(ids_T: Any, weight_VD: Any, is_bf16: Any) -> Any:
    """Return the embeddings of token ids, fp32 (T, D); `weight_VD` is fp32, or holds the bits of bf16 as int16."""
    x_TD = np.empty((len(ids_T), weight_VD.shape[1]), np.float32)
    for t in range(len(ids_T)):
        weight, x = weight_VD[ids_T[t]], x_TD[t]
        for d in range(len(x)):
            x[d] = from_bf16(weight[d]) if is_bf16 else np.float32(weight[d])
    return x_TD


@njit(nogil=True, error_model="numpy", inline="never")
def _affine(control: Any, num_threads: Any, x_TI: Any, weight: Any, bias_O: Any) -> Any:
    out_TO = apply_linear(control, num_threads, x_TI, weight)
    if len(bias_O) > 0:
        for t in range(out_TO.shape[0]):
            out = out_TO[t]
            for o in range(len(out)):
                out[o] += bias_O[o]
    return out_TO


@njit(nogil=True, error_model="numpy", inline="never")
def _normed(x_TD: Any, norm_D: Any, eps: Any) -> Any:
    h_TD = np.empty(x_TD.shape, np.float32)
    rms_norm(x_TD, norm_D, eps, h_TD)
    return h_TD


@njit(nogil=True, error_model="numpy", inline="never")
def _add(out_TD: Any, x_TD: Any) -> None:
    for t in range(x_TD.shape[0]):
        x, out = x_TD[t], out_TD[t]
        for d in range(len(x)):
            x[d] += out[d]


@njit(nogil=True, error_model="numpy", cache=True)
def project(control: Any, num_threads: Any, x_TD: Any, norm_D: Any, eps: Any, weight: Any, bias_O: Any) -> Any:
    """Return W·norm(x) + bias, fp32 (T, O)."""
    return _affine(control, num_threads, _normed(x_TD, norm_D, eps), weight, bias_O)


@njit(nogil=True, error_model="numpy", cache=True)
def project_twice(control: Any, num_threads: Any, x_TD: Any, norm_D: Any, eps: Any, first: Any, second: Any) -> Any:
    """Return first·norm(x) and second·norm(x), both fp32 (T, O), for two weights that may have different formats."""
    h_TD = _normed(x_TD, norm_D, eps)
    return apply_linear(control, num_threads, h_TD, first), apply_linear(control, num_threads, h_TD, second)


@njit(nogil=True, error_model="numpy", cache=True)
def add_projected(control: Any, num_threads: Any, y_TI: Any, weight: Any, bias_D: Any, x_TD: Any) -> None:
    """Add W·y + bias to the residual stream x in place."""
    _add(_affine(control, num_threads, y_TI, weight, bias_D), x_TD)


@njit(nogil=True, error_model="numpy", inline="never")
def _mlp(
    control: Any,
    num_threads: Any,
    h_TD: Any,
    is_swiglu: Any,
    gate: Any,
    gate_bias: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
) -> Any:
    """Return down·(silu(gate·h)·(up·h)) or, if `is_swiglu` is False, down·relu(up·h)², fp32 (T, D).

    If `is_swiglu` is False, the function does not read `gate` and `gate_bias`.
    """
    hidden_TI = _affine(control, num_threads, h_TD, up, up_bias)
    if is_swiglu:
        gate_TI = _affine(control, num_threads, h_TD, gate, gate_bias)
        for t in range(hidden_TI.shape[0]):
            hidden, gates = hidden_TI[t], gate_TI[t]
            for i in range(len(hidden)):
                hidden[i] = silu(gates[i]) * hidden[i]
    else:
        for t in range(hidden_TI.shape[0]):
            hidden = hidden_TI[t]
            for i in range(len(hidden)):
                value = max(hidden[i], np.float32(0.0))
                hidden[i] = value * value
    return _affine(control, num_threads, hidden_TI, down, down_bias)


@njit(nogil=True, error_model="numpy", cache=True)
def add_mlp(
    control: Any,
    num_threads: Any,
    x_TD: Any,
    norm_D: Any,
    eps: Any,
    is_swiglu: Any,
    gate: Any,
    gate_bias: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
) -> None:
    """Add mlp(norm(x)) to the residual stream x in place; `_mlp` explains the other arguments."""
    matrices = (is_swiglu, gate, gate_bias, up, up_bias, down, down_bias)
    _add(_mlp(control, num_threads, _normed(x_TD, norm_D, eps), *matrices), x_TD)


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}, inline="never")
def _scale_by_gate(h_TD: Any, gate_D: Any, out_TD: Any) -> None:
    """Multiply each row of `out_TD` by σ(gate·h), where h is the same row of `h_TD`."""
    for t in range(h_TD.shape[0]):
        h, out, total = h_TD[t], out_TD[t], np.float32(0.0)
        for d in range(len(gate_D)):
            total += gate_D[d] * h[d]
        scale = np.float32(1.0 / (1.0 + math.exp(-total)))
        for d in range(len(out)):
            out[d] *= scale


@njit(nogil=True, error_model="numpy", cache=True)
def shared_mlp(
    control: Any,
    num_threads: Any,
    h_TD: Any,
    is_swiglu: Any,
    gate: Any,
    gate_bias: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
    shared_gate_D: Any,
) -> Any:
    """Return mlp(h)·σ(shared_gate·h), fp32 (T, D); `_mlp` explains the other arguments.

    A shared gate of length 0 stands for no gate: the result is then mlp(h).
    """
    out_TD = _mlp(control, num_threads, h_TD, is_swiglu, gate, gate_bias, up, up_bias, down, down_bias)
    if len(shared_gate_D) > 0:
        _scale_by_gate(h_TD, shared_gate_D, out_TD)
    return out_TD


@njit(nogil=True, error_model="numpy", cache=True)
def route(
    control: Any,
    num_threads: Any,
    x_TD: Any,
    norm_D: Any,
    eps: Any,
    router: Any,
    is_softmax: Any,
    bias_E: Any,
    num_groups: Any,
    topk_groups: Any,
    normalize: Any,
    scaling: Any,
    is_latent: Any,
    fc1: Any,
    fc1_bias: Any,
    ids_TK: Any,
    weights_TK: Any,
    wire_TL: Any,
    is_bf16: Any,
) -> Any:
    """Apply the norm, pick each row's experts, and compute the rows to send to the experts.

    The kernel writes to three arrays:

    - `ids_TK` and `weights_TK` get the ids and the weights of the experts that each row picks.
    - `wire_TL` gets the rows to send, as fp32 or as the bits of bf16 in int16.

    Returns norm(x), fp32 (T, D), which is the shared expert's input.
    """
    h_TD = _normed(x_TD, norm_D, eps)
    logits_TE = apply_linear(control, num_threads, h_TD, router)
    choose_experts(logits_TE, is_softmax, bias_E, num_groups, topk_groups, normalize, scaling, ids_TK, weights_TK)
    latent_TL = _affine(control, num_threads, h_TD, fc1, fc1_bias) if is_latent else h_TD
    for t in range(len(latent_TL)):
        row, wire = latent_TL[t], wire_TL[t]
        for i in range(len(row)):
            if is_bf16:
                wire[i] = bits_of(round_to_bf16(row[i])) >> np.int32(16)
            else:
                wire[i] = row[i]
    return h_TD


@njit(nogil=True, error_model="numpy", cache=True)
def add_routed(
    control: Any,
    num_threads: Any,
    sums_TL: Any,
    is_latent: Any,
    fc2: Any,
    fc2_bias: Any,
    shared_TD: Any,
    x_TD: Any,
) -> None:
    """Add fc2·sums and the shared expert's output to the residual stream x in place.

    A `shared_TD` of length 0 stands for a layer without a shared expert.
    """
    routed_TD = _affine(control, num_threads, sums_TL, fc2, fc2_bias) if is_latent else sums_TL
    if len(shared_TD) == 0:
        _add(routed_TD, x_TD)
        return
    for t in range(x_TD.shape[0]):
        x, routed, shared = x_TD[t], routed_TD[t], shared_TD[t]
        for d in range(len(x)):
            x[d] += routed[d] + shared[d]
