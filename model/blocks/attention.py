"""`Attention` and `GatedAttention` are causal grouped-query attention over paged KV.

- `Attention` has no position encoding, as in Nemotron.
- `GatedAttention` norms queries and keys, rotates the first part of each by its position, and multiplies every output
  by a gate. In the query projection, the rows of each head are the query's, followed by the gate's.

Legend: T tokens of the step, L tokens of one request so far, H query heads, J KV heads, D head dim, X columns.
Source: Qiu et al., "Gated Attention for Large Language Models" (arXiv 2505.06708); Qwen3-Next's code in transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.blocks.linear import Linear, as_array
from model.blocks.mixer import Mixer
from model.blocks.norm import RMSNorm
from model.blocks.rope import Rope
from model.configs.mixer_shapes import AttentionShape
from model.cpu import gated_attention as gated_cpu
from model.cpu import layers as cpu_layers
from model.cpu.attention import attend
from model.cpu.packed_matrix import PackedMatrix, pack_matrix
from model.cpu.thread_pool import THREAD_POOL
from model.state import Batch, State
from model.stored_matrix import StoredMatrix, concatenated


def causal_attention(q_THD: Tensor, k_LJD: Tensor, v_LJD: Tensor, scale: float | None = None) -> Tensor:
    """Compute softmax attention of a request's last T tokens over all its L tokens; return outputs (T, H, value dim).

    The scores are multiplied by `scale`, or by 1/√D if `scale` is None.

    If there are more queries than keys, the first queries come before every key. The outputs of such queries are zeros.
    """
    if (num_blind := q_THD.shape[0] - k_LJD.shape[0]) > 0:
        out_THD = q_THD.new_zeros(*q_THD.shape[:2], v_LJD.shape[2])
        if len(k_LJD):
            out_THD[num_blind:] = causal_attention(q_THD[num_blind:], k_LJD, v_LJD, scale)
        return out_THD
    num_new, num_all = q_THD.shape[0], k_LJD.shape[0]
    mask = None
    if num_new > 1 and num_new != num_all:
        mask = torch.ones(num_new, num_all, dtype=torch.bool, device=q_THD.device).tril(num_all - num_new)
    out_HTD = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        k_LJD.transpose(0, 1)[None],
        v_LJD.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=num_new > 1 and mask is None,
        enable_gqa=True,
        scale=scale,
    )[0]
    return out_HTD.transpose(0, 1)


def attend_paged(q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, pages: Tensor, batch: Batch) -> Tensor:
    """Append keys and values to the layer's pages, and compute attention in plain PyTorch; return (T, H, D)."""
    pages[batch.new_kv_indices_T] = torch.stack([k_TJD, v_TJD], dim=1).to(pages.dtype)
    outputs = []
    first_keys = batch.first_keys or (0,) * len(batch.lens)
    for q, kv_indices, first_key in zip(q_THD.split(list(batch.lens)), batch.kv_indices, first_keys, strict=True):
        kv_L2JD = pages[kv_indices[first_key:]]
        outputs.append(causal_attention(q, kv_L2JD[:, 0], kv_L2JD[:, 1]))
    return torch.cat(outputs)


def attend_packed(qkv_TX: NDArray[np.float32], num_heads: int, pages: Tensor, batch: Batch) -> NDArray[np.float32]:
    """Compute `attend_paged` with the CPU kernels, from the columns q | k | v to the outputs (T, H·D)."""
    arrays, head_dim = batch.arrays, pages.shape[-1]
    is_bf16 = pages.dtype == torch.bfloat16
    out_TX = np.empty((len(qkv_TX), num_heads * head_dim), np.float32)
    where = (arrays.starts_R, arrays.lens_R, arrays.contexts_R, arrays.first_keys_R, arrays.tables_RW)
    num_pairs = sum(length * (context + length) for length, context in zip(batch.lens, batch.context_lens, strict=True))
    attend(
        num_pairs * num_heads * head_dim,
        qkv_TX,
        *where,
        (pages.view(torch.int16) if is_bf16 else pages).numpy(),
        is_bf16,
        batch.block_size,
        num_heads,
        out_TX,
    )
    return out_TX


class Attention(Mixer):
    """An `Attention` layer maps (T, hidden) -> (T, hidden) and appends keys and values to the requests' KV pages."""

    def __init__(self, shape: AttentionShape, layer: int, bias: bool = False) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer
        self.packed: PackedMatrix | None = None
        self.q_proj = Linear(shape.hidden_size, shape.num_heads * shape.head_dim, bias)
        self.k_proj = Linear(shape.hidden_size, shape.num_kv_heads * shape.head_dim, bias)
        self.v_proj = Linear(shape.hidden_size, shape.num_kv_heads * shape.head_dim, bias)
        self.o_proj = Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias)

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the CPU kernels, which apply `norm` and then compute q, k and v in one product."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight_XD = concatenated([part.take_weight() for part in parts])
        self.packed = pack_matrix(StoredMatrix.plain(weight_XD))
        bias = None if parts[0].bias is None else torch.cat([part.take_bias() for part in parts])
        self.o_proj.pack()
        self.input_params = (*norm.kernel_params, self.packed.descriptor, as_array(bias))

    def qkv(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project (..., hidden) to q (..., H, D) and to k and v (..., J, D)."""
        by_head = (-1, self.shape.head_dim)
        return tuple(p(h).unflatten(-1, by_head) for p in (self.q_proj, self.k_proj, self.v_proj))

    def forward(self, h_TD: Tensor, batch: Batch, state: State) -> Tensor:
        out_THD = attend_paged(*self.qkv(h_TD), state.pages[self.layer], batch)
        out: Tensor = self.o_proj(out_THD.flatten(-2))
        return out

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += attention(norm(x)) in place with the CPU kernels."""
        num_threads, x = torch.get_num_threads(), x_TD.numpy()
        control = THREAD_POOL.start_workers(num_threads)
        qkv_TX = cpu_layers.project(control, num_threads, x, *self.input_params)
        out_TX = attend_packed(qkv_TX, self.shape.num_heads, state.pages[self.layer], batch)
        cpu_layers.add_projected(control, num_threads, out_TX, *self.o_proj.kernel_params, x)


class GatedAttention(Mixer):
    """A `GatedAttention` layer maps (T, hidden) -> (T, hidden) and appends keys and values to requests' KV pages."""

    def __init__(self, shape: AttentionShape, layer: int, rope: Rope, eps: float) -> None:
        super().__init__()
        self.shape, self.layer, self.rope = shape, layer, rope
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.packed: PackedMatrix | None = None
        self.q_proj = Linear(shape.hidden_size, 2 * queries)
        self.k_proj = Linear(shape.hidden_size, keys)
        self.v_proj = Linear(shape.hidden_size, keys)
        self.o_proj = Linear(queries, shape.hidden_size)
        self.q_norm = RMSNorm(shape.head_dim, eps, is_zero_centred=True)
        self.k_norm = RMSNorm(shape.head_dim, eps, is_zero_centred=True)

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the CPU kernels, which apply `norm` and then compute q with the gates, k and v in one product."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        self.packed = pack_matrix(StoredMatrix.plain(concatenated([part.take_weight() for part in parts])))
        self.o_proj.pack()
        self.input_params = (*norm.kernel_params, self.packed.descriptor, np.zeros(0, np.float32))
        self.head_params: tuple[Any, ...] = (self.q_norm.kernel_params[0], *self.k_norm.kernel_params)

    def forward(self, h_TD: Tensor, batch: Batch, state: State) -> Tensor:
        by_head = (-1, self.shape.head_dim)
        q_THD, gate_THD = self.q_proj(h_TD).unflatten(-1, (self.shape.num_heads, 2, -1)).unbind(2)
        k_TJD, v_TJD = (project(h_TD).unflatten(-1, by_head) for project in (self.k_proj, self.v_proj))
        q_THD, k_TJD = self._rotated(self.q_norm(q_THD), batch), self._rotated(self.k_norm(k_TJD), batch)
        out_THD = attend_paged(q_THD, k_TJD, v_TJD, state.pages[self.layer], batch)
        out: Tensor = self.o_proj((out_THD * gate_THD.sigmoid()).flatten(-2))
        return out

    def _rotated(self, x_THD: Tensor, batch: Batch) -> Tensor:
        """Return heads of which the first numbers are rotated by the positions of the tokens."""
        dim = self.rope.shape.dim
        return torch.cat([self.rope.rotate(x_THD[..., :dim], batch), x_THD[..., dim:]], dim=-1)

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += attention(norm(x)) in place with the CPU kernels."""
        num_threads, x, shape = torch.get_num_threads(), x_TD.numpy(), self.shape
        control = THREAD_POOL.start_workers(num_threads)
        projected_TP = cpu_layers.project(control, num_threads, x, *self.input_params)
        qkv_TX = np.empty((len(x), (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim), np.float32)
        table = self.rope.table(batch)
        gated_cpu.norm_and_rotate(projected_TP, shape.num_heads, *self.head_params, table, qkv_TX)
        out_TX = attend_packed(qkv_TX, shape.num_heads, state.pages[self.layer], batch)
        gated_cpu.apply_gates(projected_TP, shape.head_dim, out_TX)
        cpu_layers.add_projected(control, num_threads, out_TX, *self.o_proj.kernel_params, x)
