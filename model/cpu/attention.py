"""Causal attention of packed requests over paged keys and values, one query at a time.

What surprises: a query meets its keys page by page, in pages of absolute position, with a running maximum and sum; so
its bits depend on nothing but itself and what lies before it, whether it is decoded, drafted or part of a prompt.

Legend: T tokens of the step, R requests, H query heads, J KV heads, D head dim, B keys of a page, W pages of a request.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange

from model.cpu.functions import bits_of, exp, from_bf16, round_to_bf16
from model.cpu.linear import SHARING

FAST = {"contract", "reassoc", "nsz"}
TILE = 16  # queries that share a page once it is unpacked
NO_SCORE = np.float32(-3e38)
MIN_WORK_TO_SHARE = 1 << 22  # multiply-adds


@njit(nogil=True, fastmath=FAST, inline="never")
def _meet_page(q_D: Any, key_BD: Any, value_BD: Any, num_keys: Any, best: Any, total: Any, sum_D: Any) -> Any:
    """Adds a page's first `num_keys` keys to a query's running softmax; returns the new maximum and sum."""
    head_dim = q_D.shape[0]
    score_B = np.empty(key_BD.shape[0], np.float32)
    highest = best
    for j in range(num_keys):
        score = np.float32(0.0)
        for d in range(head_dim):
            score += q_D[d] * key_BD[j, d]
        score_B[j] = score
        highest = max(highest, score)
    shrink = exp(best - highest)
    total *= shrink
    for d in range(head_dim):
        sum_D[d] *= shrink
    for j in range(num_keys):
        weight = exp(score_B[j] - highest)
        total += weight
        for d in range(head_dim):
            sum_D[d] += weight * value_BD[j, d]
    return highest, total


@njit(nogil=True, fastmath=FAST, inline="never")
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
    """One request's queries of the heads that share KV head `kv_head`."""
    num_kv_heads, head_dim = pages.shape[2:]
    group = num_heads // num_kv_heads
    scale = np.float32(1.0 / math.sqrt(head_dim))
    key_BD = np.empty((block_size, head_dim), np.float32)
    value_BD = np.empty((block_size, head_dim), np.float32)
    for tile in range(0, length, TILE):
        num_rows = min(TILE, length - tile)
        q = np.empty((num_rows * group, head_dim), np.float32)
        sums = np.zeros((num_rows * group, head_dim), np.float32)
        best = np.full(num_rows * group, NO_SCORE)
        total = np.zeros(num_rows * group, np.float32)
        for i in range(num_rows * group):
            row, head = start + tile + i // group, kv_head * group + i % group
            for d in range(head_dim):
                q[i, d] = qkv_TX[row, head * head_dim + d] * scale
        last = context + tile + num_rows - 1
        for page in range(first_key // block_size, last // block_size + 1):
            first = table_W[page] * block_size
            for j in range(min(block_size, last + 1 - page * block_size)):
                for d in range(head_dim):
                    key, value = pages[first + j, 0, kv_head, d], pages[first + j, 1, kv_head, d]
                    key_BD[j, d] = from_bf16(key) if is_bf16 else np.float32(key)
                    value_BD[j, d] = from_bf16(value) if is_bf16 else np.float32(value)
            skipped = max(0, first_key - page * block_size)
            for i in range(num_rows * group):
                num_keys = min(block_size, context + tile + i // group + 1 - page * block_size)
                if num_keys > skipped:
                    best[i], total[i] = _meet_page(
                        q[i], key_BD[skipped:], value_BD[skipped:], num_keys - skipped, best[i], total[i], sums[i]
                    )
        for i in range(num_rows * group):
            row, head = start + tile + i // group, kv_head * group + i % group
            for d in range(head_dim):
                # A position before the first key sees nothing and gives nothing.
                out_TX[row, head * head_dim + d] = sums[i, d] / total[i] if total[i] > 0 else np.float32(0.0)


@njit(nogil=True, inline="never")
def _append(
    qkv_TX: Any,
    start: Any,
    length: Any,
    context: Any,
    table_W: Any,
    pages: Any,
    is_bf16: Any,
    block_size: Any,
    num_heads: Any,
) -> None:
    """Writes the keys and values of one request's new tokens to its pages."""
    num_kv_heads, head_dim = pages.shape[2:]
    for t in range(length):
        position = context + t
        place = table_W[position // block_size] * block_size + position % block_size
        for part in range(2):
            first = (num_heads + part * num_kv_heads) * head_dim
            for j in range(num_kv_heads):
                for d in range(head_dim):
                    value = qkv_TX[start + t, first + j * head_dim + d]
                    if is_bf16:
                        pages[place, part, j, d] = bits_of(round_to_bf16(value)) >> np.int32(16)
                    else:
                        pages[place, part, j, d] = value


@njit(nogil=True, cache=True)
def attend(
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
    """`qkv_TX` holds q (H·D), k (J·D) and v (J·D) of each row; `pages` (places, 2, J, D) is fp32, or bf16 as int16.

    Appends keys and values to the pages and writes softmax(q·k/√D)·v, fp32 (T, H·D). Positions before a request's first
    key are not seen.
    """
    for r in range(len(starts_R)):
        where = (starts_R[r], lens_R[r], contexts_R[r], tables_RW[r])
        _append(qkv_TX, *where, pages, is_bf16, block_size, num_heads)
        for kv_head in range(pages.shape[2]):
            _attend_head(qkv_TX, *where, pages, is_bf16, block_size, kv_head, num_heads, first_keys_R[r], out_TX)


@njit(nogil=True, cache=True, parallel=True)
def attend_shared(
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
    """`attend` with the KV heads of all requests shared out over threads."""
    num_kv_heads = pages.shape[2]
    for r in range(len(starts_R)):
        where = (starts_R[r], lens_R[r], contexts_R[r], tables_RW[r])
        _append(qkv_TX, *where, pages, is_bf16, block_size, num_heads)
    for task in prange(len(starts_R) * num_kv_heads):
        r, kv_head = task // num_kv_heads, task % num_kv_heads
        where = (starts_R[r], lens_R[r], contexts_R[r], tables_RW[r])
        _attend_head(qkv_TX, *where, pages, is_bf16, block_size, kv_head, num_heads, first_keys_R[r], out_TX)


def attend_all(work: int, *args: Any) -> None:
    """`attend`, on several threads where `work` (multiply-adds) is worth it."""
    num_threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if num_threads > 1 and work >= MIN_WORK_TO_SHARE:
        with SHARING:
            numba.set_num_threads(num_threads)
            attend_shared(*args)
    else:
        attend(*args)
