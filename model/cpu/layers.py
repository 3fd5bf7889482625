"""Each kernel here does the work before or after a layer's core in one compiled call.

Before the core are the norm and a projection; after the core are a projection and the addition to the residual stream.
A step with one token is a hundred products of a few microseconds each. Calling each product from Python through PyTorch
would take longer than the arithmetic.

`x_TD` is the residual stream, which is changed in place. A bias of length 0 stands for no bias.

Legend: T rows of the step, V vocabulary, D hidden, I inputs, O outputs, E experts, K picks per row, L expert input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from model.cpu.functions import bits_of, from_bf16, round_to_bf16
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
def add_projected(control: Any, num_threads: Any, y_TI: Any, weight: Any, bias_D: Any, x_TD: Any) -> None:
    """Add W·y + bias to the residual stream x in place."""
    _add(_affine(control, num_threads, y_TI, weight, bias_D), x_TD)


@njit(nogil=True, error_model="numpy", cache=True)
def mlp(control: Any, num_threads: Any, h_TD: Any, up: Any, up_bias: Any, down: Any, down_bias: Any) -> Any:
    """Return down·relu(up·h)², fp32 (T, D)."""
    hidden_TI = _affine(control, num_threads, h_TD, up, up_bias)
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
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
) -> None:
    """Add mlp(norm(x)) to the residual stream x in place."""
    _add(mlp(control, num_threads, _normed(x_TD, norm_D, eps), up, up_bias, down, down_bias), x_TD)


@njit(nogil=True, error_model="numpy", cache=True)
def route(
    control: Any,
    num_threads: Any,
    x_TD: Any,
    norm_D: Any,
    eps: Any,
    router: Any,
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
    choose_experts(logits_TE, bias_E, num_groups, topk_groups, normalize, scaling, ids_TK, weights_TK)
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
    """Add fc2·sums and the shared expert's output to the residual stream x in place."""
    routed_TD = _affine(control, num_threads, sums_TL, fc2, fc2_bias) if is_latent else sums_TL
    for t in range(x_TD.shape[0]):
        x, routed, shared = x_TD[t], routed_TD[t], shared_TD[t]
        for d in range(len(x)):
            x[d] += routed[d] + shared[d]
