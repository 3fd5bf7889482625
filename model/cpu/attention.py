"""`attend` computes causal attention of packed requests over paged keys and values.

What surprises: each query's keys are processed in blocks, with a running maximum and a running sum. The blocks start at
positions that are multiples of the block size, and the kernels of `model.cpu.panel_products` compute both products. So
the bits of a query's output depend only on the query's own sequence up to the query. The bits are the same whether the
query's token is decoded, drafted or part of a prompt.

Legend: T tokens of the step, X = (H + 2·J)·D or H·D columns, R requests, H query heads, J KV heads, D head dim,
N = (queries of a tile) · (heads that share keys), B keys of a block, W pages of a request.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit

from model.cpu.functions import bits_of, exp, from_bf16, round_to_bf16
from model.cpu.panel_products import multiply_fp32_panel
from model.cpu.panel_tiles import PANEL
from model.cpu.thread_pool import THREAD_POOL, take_task, task_done
from model.cpu.vectors import LANES, pointer_to, transpose_tile

FAST = {"contract", "reassoc", "nsz"}
TILE = 16  # number of queries for which a block of keys is unpacked once
NO_SCORE = np.float32(-3e38)
MIN_WORK_TO_SHARE = 1 << 22  # multiply-adds; below this number, waking workers takes longer than sharing saves


@njit(nogil=True, error_model="numpy", inline="never")
def pack_row(row_D: Any, is_bf16: Any, panels: Any, j: Any) -> None:
    """Copy a row of the pages to row `j` of the panels (groups of PANEL numbers, PANEL rows, PANEL), as fp32."""
    for p in range(panels.shape[0]):
        part, into = row_D[p * PANEL : (p + 1) * PANEL], panels[p, j]
        for d in range(part.shape[0]):
            into[d] = from_bf16(part[d]) if is_bf16 else np.float32(part[d])


@njit(nogil=True, error_model="numpy", inline="never")
def transpose_panels(panels: Any, out: Any) -> None:
    """Write the transpose of each panel of PANEL x PANEL numbers to `out`."""
    for p in range(panels.shape[0]):
        for i in range(0, PANEL, LANES):
            for j in range(0, PANEL, LANES):
                source, target = (p * PANEL + j) * PANEL + i, (p * PANEL + i) * PANEL + j
                transpose_tile(pointer_to(panels, source), PANEL, pointer_to(out, target), PANEL)


@njit(nogil=True, error_model="numpy", inline="never")
def write_row(values_D: Any, row_D: Any, is_bf16: Any) -> None:
    """Write fp32 numbers to a row of the pages."""
    for d in range(len(values_D)):
        if is_bf16:
            row_D[d] = bits_of(round_to_bf16(values_D[d])) >> np.int32(16)
        else:
            row_D[d] = values_D[d]


@njit(nogil=True, error_model="numpy", inline="never")
def _unpack_block(
    first: Any,
    num_keys: Any,
    table_W: Any,
    pages: Any,
    is_bf16: Any,
    block_size: Any,
    kv_head: Any,
    rows: Any,
    keys: Any,
    values: Any,
) -> None:
    """Copy the keys and values of PANEL positions, starting at `first`, into panels; `rows` is scratch memory.

    - `keys` has the layout [group of 32 dims][dim in the group][key].
    - `values` has the layout [group of 32 dims][key][dim in the group].

    Positions after the last key are filled with zeros. Such positions have weight zero, but zero times an arbitrary
    value could be NaN.
    """
    if num_keys < PANEL:
        rows[:], values[:] = np.float32(0.0), np.float32(0.0)
    for j in range(num_keys):
        page = pages[table_W[(first + j) // block_size] * block_size + (first + j) % block_size]
        pack_row(page[0, kv_head], is_bf16, rows, j)
        pack_row(page[1, kv_head], is_bf16, values, j)
    transpose_panels(rows, keys)


@njit(nogil=True, error_model="numpy", fastmath=FAST, inline="never")
def softmax_block(score_B: Any, first_seen: Any, last_seen: Any, best: Any, total: Any) -> Any:
    """Replace a block's scores for one query by softmax weights relative to the new running maximum.

    Only keys `first_seen` to `last_seen` of the block get a weight. `best` is the running maximum of the scores, and
    `total` is the running sum of the weights. Returns the new maximum, the new sum, and the factor by which the caller
    must multiply the weighted sum of the values of earlier blocks.
    """
    highest = best
    for j in range(PANEL):
        score = score_B[j] if first_seen <= j <= last_seen else NO_SCORE
        score_B[j] = score
        highest = max(highest, score)
    shrink, added = exp(best - highest), np.float32(0.0)
    for j in range(PANEL):
        weight = exp(score_B[j] - highest) if score_B[j] > NO_SCORE else np.float32(0.0)
        score_B[j] = weight
        added += weight
    return highest, total * shrink + added, shrink


@njit(nogil=True, error_model="numpy", inline="never")
def _attend_head(
    qkv_TX: Any,
    start: Any,
    length: Any,
    context: Any,
    table_W: Any,
    pages: Any,
    is_bf16: Any,
    block_size: Any,
    kv_head: Any,
    num_heads: Any,
    first_key: Any,
    out_TX: Any,
) -> None:
    """Compute attention for one request's new tokens and for the query heads that share KV head `kv_head`."""
    num_kv_heads, head_dim = pages.shape[2:]
    group_size = num_heads // num_kv_heads
    num_panels = -(-head_dim // PANEL)
    scale = np.float32(1.0 / math.sqrt(head_dim))
    # One array each: parts of a common array would not be contiguous to the compiler, which would not vectorise loops.
    rows = np.zeros((num_panels, PANEL, PANEL), np.float32)
    keys, values = np.zeros_like(rows), np.zeros_like(rows)
    most = min(TILE, length) * group_size
    q_ND, score_NB = np.empty((most, head_dim), np.float32), np.empty((most, PANEL), np.float32)
    sum_ND = np.empty((most, num_panels * PANEL), np.float32)
    part_ND = np.empty_like(sum_ND)
    best_N, total_N, shrink_N = np.empty((3, most), np.float32)
    for tile in range(0, length, TILE):
        num_rows = min(TILE, length - tile) * group_size
        sum_ND[:], best_N[:], total_N[:] = 0.0, NO_SCORE, 0.0
        for i in range(num_rows):
            head = kv_head * group_size + i % group_size
            query = qkv_TX[start + tile + i // group_size][head * head_dim : (head + 1) * head_dim]
            for d in range(head_dim):
                q_ND[i, d] = query[d] * scale
        end = context + min(tile + TILE, length)
        for first in range(first_key // PANEL * PANEL, end, PANEL):
            num_keys = min(PANEL, end - first)
            _unpack_block(first, num_keys, table_W, pages, is_bf16, block_size, kv_head, rows, keys, values)
            q_rows, key, score = pointer_to(q_ND, 0), pointer_to(keys, 0), pointer_to(score_NB, 0)
            multiply_fp32_panel(q_rows, head_dim, num_rows, head_dim, key, score, PANEL, False)
            for i in range(num_rows):
                position = context + tile + i // group_size
                best_N[i], total_N[i], shrink_N[i] = softmax_block(
                    score_NB[i], first_key - first, position - first, best_N[i], total_N[i]
                )
            for p in range(num_panels):
                panel, target = pointer_to(values, p * PANEL * PANEL), pointer_to(part_ND, p * PANEL)
                multiply_fp32_panel(score, PANEL, num_rows, PANEL, panel, target, num_panels * PANEL, False)
            for i in range(num_rows):
                total, part = sum_ND[i], part_ND[i]
                for d in range(total.shape[0]):
                    total[d] = total[d] * shrink_N[i] + part[d]
        for i in range(num_rows):
            head = kv_head * group_size + i % group_size
            out = out_TX[start + tile + i // group_size][head * head_dim : (head + 1) * head_dim]
            share = (
                np.float32(1.0) / total_N[i] if total_N[i] > 0 else np.float32(0.0)
            )  # a total of 0 means that the query sees no key
            for d in range(head_dim):
                out[d] = sum_ND[i, d] * share


@njit(nogil=True, error_model="numpy", inline="never")
def _append(
    qkv_TX: Any,
    start: Any,
    length: Any,
    context: Any,
    table_W: Any,
    pages: Any,
    is_bf16: Any,
    block_size: Any,
    kv_head: Any,
    num_heads: Any,
) -> None:
    """Write one KV head's keys and values of a request's new tokens to the request's pages."""
    num_kv_heads, head_dim = pages.shape[2:]
    for t in range(length):
        position = context + t
        place = table_W[position // block_size] * block_size + position % block_size
        for part in range(2):
            first = (num_heads + part * num_kv_heads + kv_head) * head_dim
            new, kept = qkv_TX[start + t][first : first + head_dim], pages[place, part, kv_head]
            write_row(new, kept, is_bf16)


@njit(nogil=True, error_model="numpy", cache=True)
def _attend_tasks(
    control: Any,
    ticket: Any,
    num_tasks: Any,
    qkv_TX: Any,
    starts_R: Any,
    lens_R: Any,
    contexts_R: Any,
    first_keys_R: Any,
    tables_RW: Any,
    pages: Any,
    is_bf16: Any,
    block_size: Any,
    num_heads: Any,
    out_TX: Any,
) -> None:
    num_kv_heads = pages.shape[2]
    while True:
        task = take_task(control, ticket, num_tasks)
        if task < 0:
            return
        r, kv_head = task // num_kv_heads, task % num_kv_heads
        where = (starts_R[r], lens_R[r], contexts_R[r], tables_RW[r])
        _append(qkv_TX, *where, pages, is_bf16, block_size, kv_head, num_heads)
        _attend_head(qkv_TX, *where, pages, is_bf16, block_size, kv_head, num_heads, first_keys_R[r], out_TX)
        task_done(control)


def attend(work: int, *args: Any) -> None:
    """Append the new keys and values to the pages, and write softmax(q·k/√D)·v to `out_TX`, fp32 (T, H·D).

    - `work` is the number of multiply-adds of all requests.
    - `args` are the arguments of `_attend_tasks`, starting with `qkv_TX`:
      - `qkv_TX` holds q (H·D), k (J·D) and v (J·D) of each row.
      - `pages` (pages · block size, 2, J, D) is fp32, or holds the bits of bf16 as int16.
      - `first_keys_R` holds the first position that attention sees in each request.
    """
    starts_R, pages = args[1], args[6]
    num_threads = torch.get_num_threads() if work >= MIN_WORK_TO_SHARE else 1
    THREAD_POOL.run(_attend_tasks, len(starts_R) * pages.shape[2], num_threads, *args)
