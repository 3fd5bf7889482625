"""The kernels here do the work of gated attention before and after `model.cpu.attention.attend`.

Legend: T tokens of the step, H query heads, J KV heads, D head dim, F rotated pairs of a head,
P = (2·H + 2·J)·D columns of the projection, X = (H + 2·J)·D or H·D columns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from model.cpu.functions import exp
from model.cpu.rope import rotate


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}, inline="never")
def _norm_head(head_D: Any, scale_D: Any, eps: Any, out_D: Any) -> None:
    """Write head / rms(head) · scale to `out_D`."""
    total = np.float32(0.0)
    for d in range(len(head_D)):
        total += head_D[d] * head_D[d]
    factor = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(len(head_D)) + eps))
    for d in range(len(head_D)):
        out_D[d] = head_D[d] * factor * scale_D[d]


@njit(nogil=True, error_model="numpy", cache=True)
def norm_and_rotate(
    projected_TP: Any, num_heads: Any, q_scale_D: Any, k_scale_D: Any, eps: Any, table_T2F: Any, qkv_TX: Any
) -> None:
    """Norm each query and key and rotate its first 2·F numbers; write q (H·D), k (J·D) and v (J·D) to `qkv_TX`.

    `projected_TP` has a query and a gate of each query head (H·2·D), then the keys and the values.
    """
    head_dim = len(q_scale_D)
    queries, num_rotated = num_heads * head_dim, 2 * table_T2F.shape[2]
    num_kv_heads = (qkv_TX.shape[1] - queries) // (2 * head_dim)
    for t in range(projected_TP.shape[0]):
        projected, qkv, table_2F = projected_TP[t], qkv_TX[t], table_T2F[t]
        for h in range(num_heads + num_kv_heads):
            is_query = h < num_heads
            source = 2 * h * head_dim if is_query else (num_heads + h) * head_dim
            out = qkv[h * head_dim : (h + 1) * head_dim]
            _norm_head(projected[source : source + head_dim], q_scale_D if is_query else k_scale_D, eps, out)
            rotate(out[:num_rotated], table_2F, False)
        first = queries + num_kv_heads * head_dim
        qkv[first:] = projected[queries + first :]


@njit(nogil=True, error_model="numpy", cache=True)
def apply_gates(projected_TP: Any, head_dim: Any, out_TX: Any) -> None:
    """Multiply the outputs of each query head by σ(gate) in place.

    `projected_TP` holds the gates, in the columns that `norm_and_rotate` describes.
    """
    for t in range(out_TX.shape[0]):
        for h in range(out_TX.shape[1] // head_dim):
            gate = projected_TP[t][(2 * h + 1) * head_dim : (2 * h + 2) * head_dim]
            out = out_TX[t][h * head_dim : (h + 1) * head_dim]
            for d in range(head_dim):
                out[d] *= np.float32(1.0) / (np.float32(1.0) + exp(-gate[d]))
