"""`Attention` is causal grouped-query attention over paged KV, without position encoding (Nemotron uses none).

Legend: T tokens of the step, L tokens of one request so far, H query heads, J KV heads, D head dim.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.blocks.linear import Linear, as_array
from model.blocks.mixer import Mixer
from model.blocks.norm import RMSNorm
from model.configs.mixer_shapes import AttentionShape
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
        q_THD, k_TJD, v_TJD = self.qkv(h_TD)
        pages = state.pages[self.layer]
        pages[batch.new_kv_indices_T] = torch.stack([k_TJD, v_TJD], dim=1).to(pages.dtype)
        outputs = []
        first_keys = batch.first_keys or (0,) * len(batch.lens)
        for q, kv_indices, first_key in zip(q_THD.split(list(batch.lens)), batch.kv_indices, first_keys, strict=True):
            kv_L2JD = pages[kv_indices[first_key:]]
            outputs.append(causal_attention(q, kv_L2JD[:, 0], kv_L2JD[:, 1]))
        out: Tensor = self.o_proj(torch.cat(outputs).flatten(-2))
        return out

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += attention(norm(x)) in place with the CPU kernels."""
        num_threads, x = torch.get_num_threads(), x_TD.numpy()
        control = THREAD_POOL.start_workers(num_threads)
        qkv_TX = cpu_layers.project(control, num_threads, x, *self.input_params)
        pages, shape, arrays = state.pages[self.layer], self.shape, batch.arrays
        is_bf16 = pages.dtype == torch.bfloat16
        out_TX = np.empty((x.shape[0], shape.num_heads * shape.head_dim), np.float32)
        where = (arrays.starts_R, arrays.lens_R, arrays.contexts_R, arrays.first_keys_R, arrays.tables_RW)
        num_pairs = sum(
            length * (context + length) for length, context in zip(batch.lens, batch.context_lens, strict=True)
        )
        attend(
            num_pairs * shape.num_heads * shape.head_dim,
            qkv_TX,
            *where,
            (pages.view(torch.int16) if is_bf16 else pages).numpy(),
            is_bf16,
            batch.block_size,
            shape.num_heads,
            out_TX,
        )
        cpu_layers.add_projected(control, num_threads, out_TX, *self.o_proj.kernel_params, x)
