"""The kernels here compute multi-head latent attention (MLA) over paged latents, in the absorbed form only.

A token's page holds one latent and one rotated key, which all heads share. The absorbed form projects each query into
the space of the latents, attends there, and projects the result to the head's values. It never computes a key or a
value of a head. What surprises: long prompts run in this form too, although expanding the latents would take fewer
multiply-adds. Both forms round differently, so with two forms the bits of a token would depend on how the prompt was
cut.

As in `model.cpu.attention`, keys are processed in blocks that start at multiples of the block size, and every product
is batch-invariant. So a token's bits depend only on its own sequence up to the token.

A task is a block of heads. It computes a few tokens at a time: it projects their queries, attends with the heads of
every token as the rows of one product, and projects the results.

Legend: T tokens of the step, R requests, H heads, C latent size, N numbers of a query without position, E rotated
numbers, V value size, K = C + E numbers per page row, G tokens computed at a time, B heads of a task.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C; DeepSeek-V3 (arXiv 2412.19437), section 2.1.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from model.cpu.attention import MIN_WORK_TO_SHARE, NO_SCORE, pack_row, softmax_block, transpose_panels, write_row
from model.cpu.linear import apply_linear
from model.cpu.norm import rms_norm
from model.cpu.panel_products import multiply_fp32_panel, multiply_panels
from model.cpu.panel_tiles import PANEL
from model.cpu.rope import rotate
from model.cpu.thread_pool import THREAD_POOL, take_task, task_done
from model.cpu.vectors import pointer_to

MAX_ROWS = 128  # rows (tokens · heads) of a task's products; their scratch is below 1 MB, which fits the caches
MIN_HEADS, MAX_HEADS = 4, 16  # heads of a task for prompts and for single tokens


@njit(nogil=True, error_model="numpy", inline="never")
def _normed(x_TD: Any, weight_D: Any, eps: Any) -> Any:
    out_TD = np.empty(x_TD.shape, np.float32)
    rms_norm(x_TD, weight_D, eps, out_TD)
    return out_TD


@njit(nogil=True, error_model="numpy", cache=True)
def project_and_append(
    control: Any,
    num_threads: Any,
    x_TD: Any,
    norm_D: Any,
    eps: Any,
    has_query_rank: Any,
    query_down: Any,
    query_norm: Any,
    query_up: Any,
    latent_down: Any,
    latent_norm_C: Any,
    latent_eps: Any,
    num_heads: Any,
    table_T2F: Any,
    is_interleaved: Any,
    starts_R: Any,
    lens_R: Any,
    contexts_R: Any,
    tables_RW: Any,
    pages: Any,
    is_bf16: Any,
    block_size: Any,
) -> Any:
    """Apply the norm, append each token's latent and rotated key to the pages, and return the rotated queries.

    The result is fp32 (T, H·(N + E)). If `has_query_rank` is False, `query_up` projects the normed rows, and the
    function does not read `query_down` and `query_norm`.
    """
    h_TD = _normed(x_TD, norm_D, eps)
    if has_query_rank:
        down_TQ = _normed(apply_linear(control, num_threads, h_TD, query_down), query_norm, latent_eps)
        q_TX = apply_linear(control, num_threads, down_TQ, query_up)
    else:
        q_TX = apply_linear(control, num_threads, h_TD, query_up)
    latent_TK = apply_linear(control, num_threads, h_TD, latent_down)
    latent_TC = _normed(latent_TK[:, : len(latent_norm_C)].copy(), latent_norm_C, latent_eps)
    rope_dim, head_dim = 2 * table_T2F.shape[2], q_TX.shape[1] // num_heads
    for r in range(len(lens_R)):
        for i in range(lens_R[r]):
            t, position = starts_R[r] + i, contexts_R[r] + i
            key_E = latent_TK[t, len(latent_norm_C) :]
            rotate(key_E, table_T2F[t], is_interleaved)
            place = tables_RW[r, position // block_size] * block_size + position % block_size
            write_row(latent_TC[t], pages[place, : len(latent_norm_C)], is_bf16)
            write_row(key_E, pages[place, len(latent_norm_C) :], is_bf16)
            for head in range(num_heads):
                end = (head + 1) * head_dim
                rotate(q_TX[t, end - rope_dim : end], table_T2F[t], is_interleaved)
    return q_TX


@njit(nogil=True, error_model="numpy", inline="never")
def _project_head(matrix: Any, x_GI: Any, num_rows: Any, num_inputs: Any, y_GO: Any) -> None:
    """Write W·x of `num_rows` rows of `num_inputs` numbers to `y_GO`, for the matrix with the addresses `matrix`."""
    num_outputs = y_GO.shape[1]
    x, y = x_GI.ctypes.data, y_GO.ctypes.data
    multiply_panels(matrix[0], x, num_rows, num_inputs, matrix[1], matrix[2], y, num_outputs, 0, num_outputs // PANEL)


@njit(nogil=True, error_model="numpy", inline="never")
def _unpack_block(
    first: Any,
    num_hidden: Any,
    num_keys: Any,
    table_W: Any,
    pages: Any,
    is_bf16: Any,
    block_size: Any,
    values: Any,
    keys: Any,
) -> None:
    """Copy PANEL page rows, starting at position `first`, into panels.

    - `values` has the layout [group of 32 numbers][key][number in the group].
    - `keys` has the layout [group of 32 numbers][number in the group][key].

    The first `num_hidden` rows, and rows after the first `num_keys`, are zeros. No query sees them, but zero times an
    arbitrary value could be NaN.
    """
    if num_hidden > 0 or num_keys < PANEL:
        values[:] = np.float32(0.0)
    for j in range(num_hidden, num_keys):
        page = pages[table_W[(first + j) // block_size] * block_size + (first + j) % block_size]
        pack_row(page, is_bf16, values, j)
    transpose_panels(values, keys)


@njit(nogil=True, error_model="numpy", inline="never")
def _attend(
    q_NK: Any,
    first_row: Any,
    num_tokens: Any,
    num_heads: Any,
    context: Any,
    first_key: Any,
    table_W: Any,
    pages: Any,
    is_bf16: Any,
    block_size: Any,
    scratch: Any,
    out_NC: Any,
) -> None:
    """Attend with some tokens of one request; write the weighted sums of latents to `out_NC`.

    The tokens have the positions from `context` on, and the rows of `q_NK` from `first_row` on, `num_heads` rows for
    each token.
    """
    values, keys, score_NB, part_NC, best_N, total_N, shrink_N = scratch
    num_rows, num_numbers, width = num_tokens * num_heads, q_NK.shape[1], out_NC.shape[1]
    last_row = first_row + num_rows
    out_NC[first_row:last_row], best_N[:num_rows], total_N[:num_rows] = 0.0, NO_SCORE, 0.0
    q, key, score = pointer_to(q_NK, first_row * num_numbers), pointer_to(keys, 0), pointer_to(score_NB, 0)
    for first in range(first_key // PANEL * PANEL, context + num_tokens, PANEL):
        num_hidden, num_keys = max(0, first_key - first), min(PANEL, context + num_tokens - first)
        _unpack_block(first, num_hidden, num_keys, table_W, pages, is_bf16, block_size, values, keys)
        multiply_fp32_panel(q, num_numbers, num_rows, num_numbers, key, score, PANEL, False)
        for n in range(num_rows):
            position = context + n // num_heads
            best_N[n], total_N[n], shrink_N[n] = softmax_block(
                score_NB[n], first_key - first, position - first, best_N[n], total_N[n]
            )
        for p in range(width // PANEL):
            panel, target = pointer_to(values, p * PANEL * PANEL), pointer_to(part_NC, p * PANEL)
            multiply_fp32_panel(score, PANEL, num_rows, PANEL, panel, target, width, False)
        for n in range(num_rows):
            total, part = out_NC[first_row + n], part_NC[n]
            for c in range(width):
                total[c] = total[c] * shrink_N[n] + part[c]
    for n in range(num_rows):
        out = out_NC[first_row + n]
        # a total of 0 means that the query sees no key
        share = np.float32(1.0) / total_N[n] if total_N[n] > 0 else np.float32(0.0)
        for c in range(width):
            out[c] *= share


@njit(nogil=True, error_model="numpy", cache=True)
def _attend_tasks(
    control: Any,
    ticket: Any,
    num_tasks: Any,
    heads_per_task: Any,
    q_TX: Any,
    starts_R: Any,
    lens_R: Any,
    contexts_R: Any,
    first_keys_R: Any,
    tables_RW: Any,
    pages: Any,
    is_bf16: Any,
    block_size: Any,
    keys_HA: Any,
    values_HA: Any,
    latent_dim: Any,
    nope_dim: Any,
    value_dim: Any,
    scale: Any,
    out_TX: Any,
) -> None:
    num_all_heads, num_numbers = len(keys_HA), pages.shape[1]
    rope_dim, width = num_numbers - latent_dim, -(-latent_dim // PANEL) * PANEL
    head_dim, at_once = nope_dim + rope_dim, max(1, MAX_ROWS // heads_per_task)
    most = at_once * heads_per_task
    q_NK = np.empty((most, num_numbers), np.float32)
    out_NC = np.empty((most, width), np.float32)
    x, latent_GC = np.empty(at_once * max(nope_dim, latent_dim), np.float32), np.empty((at_once, width), np.float32)
    value_GV = np.empty((at_once, -(-value_dim // PANEL) * PANEL), np.float32)
    best_N, total_N, shrink_N = np.empty((3, most), np.float32)
    scratch = (
        np.zeros((-(-num_numbers // PANEL), PANEL, PANEL), np.float32),
        np.zeros((-(-num_numbers // PANEL), PANEL, PANEL), np.float32),
        np.empty((most, PANEL), np.float32),
        np.empty((most, width), np.float32),
        best_N,
        total_N,
        shrink_N,
    )
    while True:
        task = take_task(control, ticket, num_tasks)
        if task < 0:
            return
        first_head = task * heads_per_task
        num_heads = min(heads_per_task, num_all_heads - first_head)
        r = 0
        for first in range(0, len(q_TX), at_once):
            num_rows = min(at_once, len(q_TX) - first)
            for i in range(num_heads):
                start = (first_head + i) * head_dim
                for g in range(num_rows):
                    x[g * nope_dim : (g + 1) * nope_dim] = q_TX[first + g, start : start + nope_dim]
                _project_head(keys_HA[first_head + i], x, num_rows, nope_dim, latent_GC)
                for g in range(num_rows):
                    q_K, latent_C = q_NK[g * num_heads + i], latent_GC[g]
                    rotated_E = q_TX[first + g, start + nope_dim : start + head_dim]
                    for c in range(latent_dim):
                        q_K[c] = latent_C[c] * scale
                    for e in range(rope_dim):
                        q_K[latent_dim + e] = rotated_E[e] * scale
            t = first
            while t < first + num_rows:
                while t >= starts_R[r] + lens_R[r]:
                    r += 1
                num_tokens = min(first + num_rows, starts_R[r] + lens_R[r]) - t
                place = (contexts_R[r] + t - starts_R[r], first_keys_R[r], tables_RW[r])
                rows = ((t - first) * num_heads, num_tokens, num_heads)
                _attend(q_NK, *rows, *place, pages, is_bf16, block_size, scratch, out_NC)
                t += num_tokens
            for i in range(num_heads):
                for g in range(num_rows):
                    x[g * latent_dim : (g + 1) * latent_dim] = out_NC[g * num_heads + i, :latent_dim]
                _project_head(values_HA[first_head + i], x, num_rows, latent_dim, value_GV)
                start = (first_head + i) * value_dim
                for g in range(num_rows):
                    out_TX[first + g, start : start + value_dim] = value_GV[g, :value_dim]
        task_done(control)


def attend(num_pairs: int, longest: int, *args: Any) -> None:
    """Write each head's attention output to `out_TX`, fp32 (T, H·V); the new tokens must be in the pages already.

    - `num_pairs` is the number of pairs of a query and a key, and `longest` is the largest number of tokens of a
      request.
    - `args` are the arguments of `_attend_tasks` from `q_TX` on:
      - `q_TX` holds the rotated queries (H·(N + E)).
      - `pages` (pages · block size, K) is fp32, or holds the bits of bf16 as int16.
      - `keys_HA` and `values_HA` hold the addresses of each head's matrices from queries to latents and from latents
        to values: the product, the panels and the scales.
    """
    num_heads, num_numbers = len(args[9]), args[6].shape[1]
    work = num_pairs * num_heads * 2 * num_numbers
    num_threads = torch.get_num_threads() if work >= MIN_WORK_TO_SHARE else 1
    heads_per_task = min(max(MIN_HEADS, MAX_ROWS // longest), MAX_HEADS, -(-num_heads // num_threads))
    num_tasks = -(-num_heads // heads_per_task)
    THREAD_POOL.run(_attend_tasks, num_tasks, num_threads, heads_per_task, *args)
