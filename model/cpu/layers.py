"""What lies around a layer's core, one compiled call each: norm and projection before it, projection and sum after it.

A step of one token is a hundred products of a few microseconds; what PyTorch and Python take to call them one by one
would cost more than the arithmetic. `x_TD` is the residual stream, changed in place; biases of length 0 stand for none.

Legend: T rows of the step, V vocabulary, D hidden, I and O inputs and outputs, E experts, K picks a row, L expert
input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from model.cpu.functions import bits_of, from_bf16, round_to_bf16
from model.cpu.linear import apply
from model.cpu.moe import choose_experts
from model.cpu.norm import rms_norm


@njit(error_model="numpy", cache=True)
def embed(ids_T: Any, weight_VD: Any, is_bf16: Any) -> Any:
    """The rows of fp32 weights, or of the bits of bf16 as int16, in fp32: (T, D)."""
    x_TD = np.empty((len(ids_T), weight_VD.shape[1]), np.float32)
    for t in range(len(ids_T)):
        weight, x = weight_VD[ids_T[t]], x_TD[t]
        for d in range(len(x)):
            x[d] = from_bf16(weight[d]) if is_bf16 else np.float32(weight[d])
    return x_TD


@njit(nogil=True, error_model="numpy", inline="never")
def _affine(control: Any, num_threads: Any, x_TI: Any, weight: Any, bias_O: Any) -> Any:
    out_TO = apply(control, num_threads, x_TI, weight)
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
    """W·norm(x) + bias: (T, O)."""
    return _affine(control, num_threads, _normed(x_TD, norm_D, eps), weight, bias_O)


@njit(nogil=True, error_model="numpy", cache=True)
def add_projected(control: Any, num_threads: Any, y_TI: Any, weight: Any, bias_D: Any, x_TD: Any) -> None:
    """x += W·y + bias."""
    _add(_affine(control, num_threads, y_TI, weight, bias_D), x_TD)


@njit(nogil=True, error_model="numpy", cache=True)
def mlp(control: Any, num_threads: Any, h_TD: Any, up: Any, up_bias: Any, down: Any, down_bias: Any) -> Any:
    """down·relu(up·h)²: (T, D)."""
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
    """x += mlp(norm(x))."""
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
    normalizes: Any,
    scaling: Any,
    is_latent: Any,
    latent: Any,
    latent_bias: Any,
    ids_TK: Any,
    weights_TK: Any,
    wire_TL: Any,
    is_bf16: Any,
) -> Any:
    """The norm, each row's experts and their weights, and what is sent to them: fp32, or the bits of bf16.

    Returns norm(x), for the shared expert.
    """
    h_TD = _normed(x_TD, norm_D, eps)
    logits_TE = apply(control, num_threads, h_TD, router)
    choose_experts(logits_TE, bias_E, num_groups, topk_groups, normalizes, scaling, ids_TK, weights_TK)
    latent_TL = _affine(control, num_threads, h_TD, latent, latent_bias) if is_latent else h_TD
    for t in range(len(latent_TL)):
        own, wire = latent_TL[t], wire_TL[t]
        for i in range(len(own)):
            if is_bf16:
                wire[i] = bits_of(round_to_bf16(own[i])) >> np.int32(16)
            else:
                wire[i] = own[i]
    return h_TD


@njit(nogil=True, error_model="numpy", cache=True)
def add_routed(
    control: Any,
    num_threads: Any,
    sums_TL: Any,
    is_latent: Any,
    back: Any,
    back_bias: Any,
    shared_TD: Any,
    x_TD: Any,
) -> None:
    """x += fc2·sums + shared."""
    routed_TD = _affine(control, num_threads, sums_TL, back, back_bias) if is_latent else sums_TL
    for t in range(x_TD.shape[0]):
        x, routed, shared = x_TD[t], routed_TD[t], shared_TD[t]
        for d in range(len(x)):
            x[d] += routed[d] + shared[d]
