"""`mix` computes a Gated DeltaNet mixer between the input and the output projections, token after token.

The steps between the projections are the convolution, the gated delta rule and the norm. As in `model.cpu.mamba`,
prompts run through the recurrence too, so a token's bits cannot depend on where the prompt was cut, on the other
requests of the step, or on whether the token was part of the prompt, drafted, or computed again.

The projection's columns are in the checkpoint's order, which puts all columns of one key head side by side: the query,
the key, and the values and gates of the value heads that share them. So each key head of each request is a separate
task.

Legend: T tokens of the step, L tokens of a request, R requests, S state slots, G key heads, H value heads, K taps,
C conv channels, D key dim, V value dim, I = H·V inner dim, P columns of a projection.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from model.cpu.functions import silu
from model.cpu.mamba import FAST, MIN_WORK_TO_SHARE, convolve
from model.cpu.thread_pool import THREAD_POOL, take_task, task_done
from model.cpu.vectors import (
    I64,
    LANES,
    POINTER,
    VECTOR,
    broadcast,
    fma,
    i64,
    load_vector,
    pointer_to,
    splat,
    store_vector,
    sum_of_lanes,
)

TILE = 32  # rows of a state that pass through all tokens together: 16 KiB at a key dim of 128, half a first-level cache
L2_EPS = np.float32(1e-6)  # added to the sum of squares of a query or a key; a constant of the model family


def _make_row_update(num_rows: int) -> Any:
    """Return a kernel that applies the delta rule of one token to `num_rows` rows of a state.

    Each row belongs to one number v of the value: row ← decay·row, then row ← row + β·(v - row·k)·k, total = row·q. The
    kernel loads each vector of k and q once for all rows.
    """

    @intrinsic
    def rows(_: Any, state: Any, key_dim: Any, k: Any, q: Any, decay: Any, beta: Any, value: Any, total: Any) -> Any:
        signature = types.void(POINTER, types.intp, POINTER, POINTER, types.float32, types.float32, POINTER, POINTER)

        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            state, key_dim, k, q, decay, beta, value, total = args
            firsts = [builder.gep(state, [builder.mul(key_dim, i64(row))]) for row in range(num_rows)]
            decay_lanes = splat(builder, decay)

            def sums_over_keys(step: Any) -> list[Any]:
                """Emit a loop in which `step` adds the products of LANES numbers of each row to the sums."""
                before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
                builder.branch(loop)
                builder.position_at_end(loop)
                place = builder.phi(I64)
                place.add_incoming(i64(0), before)
                sums = [builder.phi(VECTOR) for _ in range(num_rows)]
                for phi in sums:
                    phi.add_incoming(ir.Constant(VECTOR, [0.0] * LANES), before)
                added = step(place, sums)
                following = builder.add(place, i64(LANES))
                place.add_incoming(following, builder.block)
                for phi, one in zip(sums, added, strict=True):
                    phi.add_incoming(one, builder.block)
                builder.cbranch(builder.icmp_signed("<", following, key_dim), loop, after)
                builder.position_at_end(after)
                return [sum_of_lanes(builder, one) for one in added]

            def decay_and_read(place: Any, sums: list[Any]) -> list[Any]:
                k_lanes, added = load_vector(builder, builder.gep(k, [place])), []
                for phi, first in zip(sums, firsts, strict=True):
                    pointer = builder.gep(first, [place])
                    kept = builder.fmul(load_vector(builder, pointer), decay_lanes)
                    store_vector(builder, kept, pointer)
                    added.append(fma(builder, kept, k_lanes, phi))
                return added

            memories = sums_over_keys(decay_and_read)
            for row, memory in enumerate(memories):  # `total` holds the corrections until the second loop has read them
                missing = builder.fsub(builder.load(builder.gep(value, [i64(row)])), memory)
                builder.store(builder.fmul(beta, missing), builder.gep(total, [i64(row)]))
            corrections = [broadcast(builder, builder.gep(total, [i64(row)])) for row in range(num_rows)]

            def write_and_read(place: Any, sums: list[Any]) -> list[Any]:
                (k_lanes, q_lanes), added = (load_vector(builder, builder.gep(v, [place])) for v in (k, q)), []
                for phi, first, correction in zip(sums, firsts, corrections, strict=True):
                    pointer = builder.gep(first, [place])
                    new = fma(builder, correction, k_lanes, load_vector(builder, pointer))
                    store_vector(builder, new, pointer)
                    added.append(fma(builder, new, q_lanes, phi))
                return added

            for row, one in enumerate(sums_over_keys(write_and_read)):
                builder.store(one, builder.gep(total, [i64(row)]))
            return context.get_dummy_value()

        return signature, generate

    return rows


_update_four_rows, _update_one_row = _make_row_update(4), _make_row_update(1)


@njit(nogil=True, error_model="numpy", fastmath=FAST, inline="never")
def _recur_head(
    conv_LC: Any, first_value: Any, decay_L: Any, beta_L: Any, state_VD: Any, out_LC: Any, place: Any
) -> None:
    """Apply the delta rule of one value head to one request's tokens, and write the outputs to `out_LC`.

    In `conv_LC`, the query starts at column 0, the key follows it, and the head's value starts at `first_value`. The
    outputs start at column `place` of `out_LC`.
    """
    value_dim, key_dim = state_VD.shape
    for first in range(0, value_dim, TILE):
        last = min(first + TILE, value_dim)
        for t in range(conv_LC.shape[0]):
            conv, out = conv_LC[t], out_LC[t]
            q, k = pointer_to(conv, 0), pointer_to(conv, key_dim)
            for d in range(first, last - 3, 4):
                _update_four_rows(
                    pointer_to(state_VD, d * key_dim),
                    key_dim,
                    k,
                    q,
                    decay_L[t],
                    beta_L[t],
                    pointer_to(conv, first_value + d),
                    pointer_to(out, place + d),
                )
            for d in range(first + (last - first) // 4 * 4, last):
                _update_one_row(
                    pointer_to(state_VD, d * key_dim),
                    key_dim,
                    k,
                    q,
                    decay_L[t],
                    beta_L[t],
                    pointer_to(conv, first_value + d),
                    pointer_to(out, place + d),
                )


@njit(nogil=True, error_model="numpy", fastmath=FAST, inline="never")
def _normalise(row: Any, first: Any, size: Any, factor: Any) -> None:
    """Divide `size` numbers of a row, which start at `first`, by their length, and multiply them by `factor`."""
    numbers, total = row[first : first + size], np.float32(0.0)
    for i in range(size):
        total += numbers[i] * numbers[i]
    scale = factor / np.float32(math.sqrt(total + L2_EPS))
    for i in range(size):
        numbers[i] *= scale


@njit(nogil=True, error_model="numpy", fastmath=FAST, inline="never")
def _norm_and_gate(y: Any, gate: Any, weight: Any, eps: Any, out: Any) -> None:
    """Write y / rms(y) · weight · SiLU(gate) of one value head to `out`."""
    total = np.float32(0.0)
    for i in range(len(y)):
        total += y[i] * y[i]
    scale = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(len(y)) + eps))
    for i in range(len(y)):
        out[i] = y[i] * scale * weight[i] * silu(gate[i])


@njit(nogil=True, error_model="numpy", inline="never")
def _mix_key_head(
    qkvz_TP: Any,
    ba_TP: Any,
    start: Any,
    length: Any,
    is_new: Any,
    keeps: Any,
    window_KC: Any,
    is_bf16: Any,
    state_HVD: Any,
    g: Any,
    num_key_heads: Any,
    weight_KC: Any,
    bias_C: Any,
    a_H: Any,
    delta_bias_H: Any,
    norm_weight_V: Any,
    eps: Any,
    has_output: Any,
    out_TI: Any,
) -> None:
    num_heads, value_dim, key_dim = state_HVD.shape
    heads = num_heads // num_key_heads
    columns, size = qkvz_TP.shape[1] // num_key_heads, heads * value_dim
    keys, first_head = num_key_heads * key_dim, g * heads
    if is_new:
        state_HVD[first_head : first_head + heads] = 0.0
    conv_LC = np.empty((length, 2 * key_dim + size), np.float32)
    for channel, place, width in (
        (g * key_dim, 0, key_dim),
        (keys + g * key_dim, key_dim, key_dim),
        (2 * keys + g * size, 2 * key_dim, size),
    ):
        if is_new:
            window_KC[:, channel : channel + width] = 0
        first = g * columns + place - channel
        convolve(qkvz_TP, start, first, channel, window_KC, is_bf16, weight_KC, bias_C, keeps, conv_LC, place, width)
    for t in range(length):
        _normalise(conv_LC[t], 0, key_dim, np.float32(1.0 / math.sqrt(key_dim)))
        _normalise(conv_LC[t], key_dim, key_dim, np.float32(1.0))
    y_LC = np.empty((length, size), np.float32)
    decay_L, beta_L = np.empty(length, np.float32), np.empty(length, np.float32)
    scratch_VD = np.empty((value_dim, key_dim), np.float32)
    for h in range(heads):
        head = first_head + h
        for t in range(length):
            b, a = ba_TP[start + t, 2 * first_head + h], ba_TP[start + t, 2 * first_head + heads + h]
            raw = a + delta_bias_H[head]
            delta = raw if raw > 20.0 else np.float32(math.log1p(math.exp(raw)))
            decay_L[t] = np.float32(math.exp(delta * a_H[head]))
            beta_L[t] = np.float32(1.0 / (1.0 + math.exp(-b)))
        state_VD = state_HVD[head]
        if not keeps:
            scratch_VD[:] = state_VD
            state_VD = scratch_VD
        _recur_head(conv_LC, 2 * key_dim + h * value_dim, decay_L, beta_L, state_VD, y_LC, h * value_dim)
    if has_output:
        for h in range(heads):
            first_gate, first = g * columns + 2 * key_dim + size + h * value_dim, (first_head + h) * value_dim
            for t in range(length):
                y, gate = y_LC[t][h * value_dim : (h + 1) * value_dim], qkvz_TP[start + t][first_gate:]
                _norm_and_gate(y, gate, norm_weight_V, eps, out_TI[start + t][first : first + value_dim])


@njit(nogil=True, error_model="numpy", cache=True)
def _mix_tasks(
    control: Any,
    ticket: Any,
    num_tasks: Any,
    qkvz_TP: Any,
    ba_TP: Any,
    starts_R: Any,
    lens_R: Any,
    slots_R: Any,
    is_new_R: Any,
    keeps_R: Any,
    window_SKC: Any,
    is_bf16: Any,
    state_SHVD: Any,
    num_key_heads: Any,
    weight_KC: Any,
    bias_C: Any,
    a_H: Any,
    delta_bias_H: Any,
    norm_weight_V: Any,
    eps: Any,
    has_output: Any,
    out_TI: Any,
) -> None:
    params = (weight_KC, bias_C, a_H, delta_bias_H, norm_weight_V, eps)
    while True:
        task = take_task(control, ticket, num_tasks)
        if task < 0:
            return
        r, g = task // num_key_heads, task % num_key_heads
        request = (
            starts_R[r],
            lens_R[r],
            is_new_R[r],
            keeps_R[r],
            window_SKC[slots_R[r]],
            is_bf16,
            state_SHVD[slots_R[r]],
        )
        _mix_key_head(qkvz_TP, ba_TP, *request, g, num_key_heads, *params, has_output, out_TI)
        task_done(control)


def mix(*args: Any) -> None:
    """Compute a Gated DeltaNet mixer from the input projections' outputs, and write the norm's outputs to `out_TI`.

    `args` are the arguments of `_mix_tasks`, starting with `qkvz_TP`:

    - `qkvz_TP` has, for each key head, the columns q | k | v | z. The gates z may be missing if `has_output` is False.
    - `ba_TP` has, for each key head, b and a of the value heads that share it.
    - `keeps_R`, `window_SKC` and `has_output` mean the same as in `model.cpu.mamba.mix`. The windows have the
      channels all q | all k | all v.
    - `state_SHVD` holds the state with one row for each number of the value.
    """
    qkvz_TP, starts_R, state_SHVD, num_key_heads = args[0], args[2], args[9], args[10]
    is_long = len(qkvz_TP) * state_SHVD[0].size >= MIN_WORK_TO_SHARE
    THREAD_POOL.run(_mix_tasks, len(starts_R) * num_key_heads, torch.get_num_threads() if is_long else 1, *args)
