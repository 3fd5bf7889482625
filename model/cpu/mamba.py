"""`mix` computes a Mamba-2 mixer between the input and the output projection, token after token.

The steps between the projections are the convolution, the state space and the gated norm. What surprises: prompts run
through the recurrence too. A head's state (head dim × state dim) stays in the first-level cache while the kernel goes
through the tokens, so the recurrence takes no longer than the chunked scan. And a token's bits cannot depend on where
the prompt was cut, on the other requests of the step, or on whether the token was part of the prompt, drafted, or
computed again.

A group of heads shares B and C, has its own convolution channels and is normalised by itself. So each group of each
request is a separate task.

Legend: T tokens of the step, P columns of the projection, L tokens of a request, R requests, S state slots, H heads,
D head dim, I = H·D inner dim, G groups, N state dim, C conv channels, K taps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from model.cpu.functions import bits_of, from_bf16, round_to_bf16, silu
from model.cpu.thread_pool import THREAD_POOL, take_task, task_done
from model.cpu.vectors import (
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

FAST = {
    "contract",
    "reassoc",
    "nsz",
}  # the compiler chooses the order of a sum over lanes; the order is the same for every row
MIN_WORK_TO_SHARE = 1 << 19  # (numbers in a state) · tokens; below it, waking workers takes longer than sharing saves


@njit(nogil=True, error_model="numpy", fastmath=FAST, inline="never")
def convolve(
    projected_TP: Any,
    start: Any,
    first: Any,
    channel: Any,
    window_KC: Any,
    is_bf16: Any,
    weight_KC: Any,
    bias_C: Any,
    keeps: Any,
    out_LC: Any,
    place: Any,
    size: Any,
) -> None:
    """Apply the causal convolution and SiLU to `size` channels of one request.

    - The channels are `channel` and the following ones; channel 0 is column `first` of `projected_TP`.
    - The outputs go to `size` columns of `out_LC`, starting at column `place`.
    - If `keeps` is True, the last K-1 inputs are written to the window.
    """
    # The loops index slices, because numba does not vectorise a loop with an index that might be negative.
    length, num_past = out_LC.shape[0], window_KC.shape[0]
    channels = slice(channel, channel + size)
    raw_LC = np.empty((num_past + length, size), np.float32)  # past inputs, then the step's inputs
    for k in range(num_past):
        past, raw = window_KC[k][channels], raw_LC[k]
        for c in range(size):
            raw[c] = from_bf16(past[c]) if is_bf16 else np.float32(past[c])
    for t in range(length):
        column, raw = projected_TP[start + t][first + channel : first + channel + size], raw_LC[num_past + t]
        for c in range(size):
            raw[c] = round_to_bf16(column[c]) if is_bf16 else column[c]
    bias = bias_C[channels]
    for t in range(length):
        out = out_LC[t][place : place + size]
        for c in range(size):
            out[c] = bias[c]
        for tap in range(num_past + 1):
            raw, weight = raw_LC[t + tap], weight_KC[tap][channels]
            for c in range(size):
                out[c] += raw[c] * weight[c]
        for c in range(size):
            out[c] = silu(out[c])
    if keeps:
        for k in range(num_past):
            past, raw = window_KC[k][channels], raw_LC[length + k]
            for c in range(size):
                if is_bf16:
                    past[c] = bits_of(raw[c]) >> np.int32(16)
                else:
                    past[c] = raw[c]


def _make_row_update(num_rows: int) -> Any:
    """Return a kernel that updates `num_rows` rows of a state: row ← decay·row + added·b, then total = row·c.

    The kernel loads each vector of b and c once for all `num_rows` rows.
    """

    @intrinsic
    def rows(_: Any, state: Any, state_dim: Any, b: Any, c: Any, decay: Any, added: Any, total: Any) -> Any:
        signature = types.void(POINTER, types.intp, POINTER, POINTER, types.float32, POINTER, POINTER)

        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            state, state_dim, b, c, decay, added, total = args
            decay = splat(builder, decay)
            inputs = [broadcast(builder, builder.gep(added, [i64(row)])) for row in range(num_rows)]
            firsts = [builder.gep(state, [builder.mul(state_dim, i64(row))]) for row in range(num_rows)]
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            place = builder.phi(i64(0).type)
            place.add_incoming(i64(0), before)
            sums = [builder.phi(VECTOR) for _ in range(num_rows)]
            for phi in sums:
                phi.add_incoming(ir.Constant(VECTOR, [0.0] * LANES), before)
            b_lanes, c_lanes = (load_vector(builder, builder.gep(v, [place])) for v in (b, c))
            for phi, first, value in zip(sums, firsts, inputs, strict=True):
                pointer = builder.gep(first, [place])
                kept = builder.fmul(load_vector(builder, pointer), decay)
                new = fma(builder, value, b_lanes, kept)
                store_vector(builder, new, pointer)
                phi.add_incoming(fma(builder, new, c_lanes, phi), builder.block)
            following = builder.add(place, i64(LANES))
            place.add_incoming(following, builder.block)
            builder.cbranch(builder.icmp_signed("<", following, state_dim), loop, after)
            builder.position_at_end(after)
            for row, phi in enumerate(sums):
                last, _ = phi.incomings[-1]
                builder.store(sum_of_lanes(builder, last), builder.gep(total, [i64(row)]))
            return context.get_dummy_value()

        return signature, generate

    return rows


_update_four_rows, _update_one_row = _make_row_update(4), _make_row_update(1)


@njit(nogil=True, error_model="numpy", fastmath=FAST, inline="never")
def _recur_head(
    conv_LC: Any, first_x: Any, first_b: Any, delta_L: Any, a: Any, skip: Any, state_DN: Any, y_LI: Any, has_output: Any
) -> None:
    """Compute S ← exp(ΔA)·S + Δ x ⊗ B and y = S·C + D·x for one head of one request.

    In `conv_LC`, x starts at column `first_x` and B at column `first_b`; C follows B.
    """
    head_dim, state_dim = state_DN.shape
    added_D, total_D = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    for t in range(conv_LC.shape[0]):
        decay, delta = np.float32(math.exp(delta_L[t] * a)), delta_L[t]
        conv = conv_LC[t]
        b, c = pointer_to(conv, first_b), pointer_to(conv, first_b + state_dim)
        x, y = conv[first_x : first_x + head_dim], y_LI[t][first_x : first_x + head_dim]
        for d in range(head_dim):
            added_D[d] = x[d] * delta
        for d in range(0, head_dim - 3, 4):
            _update_four_rows(
                pointer_to(state_DN, d * state_dim),
                state_dim,
                b,
                c,
                decay,
                pointer_to(added_D, d),
                pointer_to(total_D, d),
            )
        for d in range(head_dim // 4 * 4, head_dim):
            _update_one_row(
                pointer_to(state_DN, d * state_dim),
                state_dim,
                b,
                c,
                decay,
                pointer_to(added_D, d),
                pointer_to(total_D, d),
            )
        if has_output:
            for d in range(head_dim):
                y[d] = total_D[d] + skip * x[d]


@njit(nogil=True, error_model="numpy", fastmath=FAST, inline="never")
def _gated_norm(y: Any, gate: Any, weight: Any, eps: Any, first: Any, out: Any) -> None:
    """Write u / rms(u) · weight with u = y·SiLU(gate) for one group of channels, which starts at channel `first`."""
    size = y.shape[0]
    gate, weight, out = gate[first : first + size], weight[first : first + size], out[first : first + size]
    total = np.float32(0.0)
    for i in range(size):
        u = y[i] * silu(gate[i])
        out[i] = u
        total += u * u
    scale = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(size) + eps))
    for i in range(size):
        out[i] = out[i] * scale * weight[i]


@njit(nogil=True, error_model="numpy", inline="never")
def _mix_group(
    projected_TP: Any,
    start: Any,
    length: Any,
    is_new: Any,
    keeps: Any,
    window_KC: Any,
    is_bf16: Any,
    state_HDN: Any,
    g: Any,
    num_groups: Any,
    weight_KC: Any,
    bias_C: Any,
    a_H: Any,
    skip_H: Any,
    delta_bias_H: Any,
    least_delta: Any,
    most_delta: Any,
    norm_weight: Any,
    eps: Any,
    has_output: Any,
    out_TI: Any,
) -> None:
    num_heads, head_dim, state_dim = state_HDN.shape
    inner, num_channels = num_heads * head_dim, window_KC.shape[1]
    heads, size = num_heads // num_groups, inner // num_groups
    first_x, first_b, first_c = g * size, inner + g * state_dim, inner + (num_groups + g) * state_dim
    if is_new:
        window_KC[:, first_x : first_x + size] = 0
        window_KC[:, first_b : first_b + state_dim] = 0
        window_KC[:, first_c : first_c + state_dim] = 0
        state_HDN[g * heads : (g + 1) * heads] = 0.0
    conv_LC = np.empty((length, size + 2 * state_dim), np.float32)
    for channel, place, width in (
        (first_x, 0, size),
        (first_b, size, state_dim),
        (first_c, size + state_dim, state_dim),
    ):
        convolve(
            projected_TP, start, inner, channel, window_KC, is_bf16, weight_KC, bias_C, keeps, conv_LC, place, width
        )
    y_LI = np.empty((length, size), np.float32)
    delta_L = np.empty(length, np.float32)
    scratch_DN = np.empty((head_dim, state_dim), np.float32)
    for h in range(heads):
        head = g * heads + h
        for t in range(length):
            raw = projected_TP[start + t, inner + num_channels + head] + delta_bias_H[head]
            soft = raw if raw > 20.0 else np.float32(math.log1p(math.exp(raw)))
            delta_L[t] = min(max(soft, least_delta), most_delta)
        state_DN = state_HDN[head]
        if not keeps:
            scratch_DN[:] = state_DN
            state_DN = scratch_DN
        _recur_head(conv_LC, h * head_dim, size, delta_L, a_H[head], skip_H[head], state_DN, y_LI, has_output)
    if has_output:
        for t in range(length):
            _gated_norm(y_LI[t], projected_TP[start + t], norm_weight, eps, first_x, out_TI[start + t])


@njit(nogil=True, error_model="numpy", cache=True)
def _mix_tasks(
    control: Any,
    ticket: Any,
    num_tasks: Any,
    projected_TP: Any,
    starts_R: Any,
    lens_R: Any,
    slots_R: Any,
    is_new_R: Any,
    keeps_R: Any,
    window_SKC: Any,
    is_bf16: Any,
    state_SHDN: Any,
    num_groups: Any,
    weight_KC: Any,
    bias_C: Any,
    a_H: Any,
    skip_H: Any,
    delta_bias_H: Any,
    least_delta: Any,
    most_delta: Any,
    norm_weight: Any,
    eps: Any,
    has_output: Any,
    out_TI: Any,
) -> None:
    params = (weight_KC, bias_C, a_H, skip_H, delta_bias_H, least_delta, most_delta, norm_weight, eps)
    while True:
        task = take_task(control, ticket, num_tasks)
        if task < 0:
            return
        r, g = task // num_groups, task % num_groups
        request = (
            starts_R[r],
            lens_R[r],
            is_new_R[r],
            keeps_R[r],
            window_SKC[slots_R[r]],
            is_bf16,
            state_SHDN[slots_R[r]],
        )
        _mix_group(projected_TP, *request, g, num_groups, *params, has_output, out_TI)
        task_done(control)


def mix(*args: Any) -> None:
    """Compute a Mamba-2 mixer from the input projection's output and write the gated norm's output to `out_TI`.

    `args` are the arguments of `_mix_tasks`, starting with `projected_TP`:

    - `projected_TP` has the columns gate | x | B | C | Δ.
    - `keeps_R` is True for requests that write the new state to their slots, and False for requests with drafts, whose
      state does not change.
    - `window_SKC` holds the last K-1 inputs of the convolution; windows in bf16 are passed as int16. With bf16 windows,
      every step rounds the convolution's inputs to bf16, because the next step reads the inputs from the windows.
    - If `has_output` is False, the kernel advances only the state.
    """
    projected_TP, starts_R, state_SHDN, num_groups = args[0], args[1], args[8], args[9]
    is_long = len(projected_TP) * state_SHDN[0].size >= MIN_WORK_TO_SHARE
    THREAD_POOL.run(_mix_tasks, len(starts_R) * num_groups, torch.get_num_threads() if is_long else 1, *args)
