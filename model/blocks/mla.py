"""`MLA` is multi-head latent attention: all heads share one latent and one rotated key per token (DeepSeek-V3).

The attention runs in the absorbed form: the matrix `kv_b_proj`, which expands a latent to each head's key and value, is
applied to the queries and to the results instead, and the latents themselves serve as keys and values.

Legend: T tokens of the step, L tokens of one request so far, H heads, C latent size, N numbers of a query without
position, E rotated numbers, V value size, K = C + E cached numbers per token.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.blocks.attention import causal_attention
from model.blocks.linear import Linear
from model.blocks.mixer import Mixer
from model.blocks.norm import RMSNorm
from model.blocks.rope import Rope
from model.configs.mixer_shapes import MLAShape
from model.configs.weight_format import BLOCK
from model.cpu import layers as cpu_layers
from model.cpu.mla import attend, project_and_append
from model.cpu.packed_matrix import PackedMatrix, pack_matrix
from model.cpu.thread_pool import THREAD_POOL
from model.state import Batch, State
from model.stored_matrix import StoredMatrix

LATENT_EPS = 1e-6  # epsilon of the latents' norms in the reference and in transformers, whatever rms_norm_eps says


class MLA(Mixer):
    """An `MLA` layer maps (T, hidden) -> (T, hidden) and appends latents and rotated keys to the requests' pages.

    `scale` is the factor of the attention scores. The modules have the names of the checkpoint.
    """

    def __init__(self, shape: MLAShape, rope: Rope, scale: float, layer: int) -> None:
        super().__init__()
        self.shape, self.rope, self.scale, self.layer = shape, rope, scale, layer
        hidden, queries = shape.hidden_size, shape.num_heads * (shape.nope_dim + shape.rope_dim)
        if shape.query_rank is None:
            self.q_proj = Linear(hidden, queries)
        else:
            self.q_a_proj = Linear(hidden, shape.query_rank)
            self.q_a_layernorm = RMSNorm(shape.query_rank, LATENT_EPS)
            self.q_b_proj = Linear(shape.query_rank, queries)
        self.kv_a_proj_with_mqa = Linear(hidden, shape.kv_rank + shape.rope_dim)
        self.kv_a_layernorm = RMSNorm(shape.kv_rank, LATENT_EPS)
        self.kv_b_proj = Linear(shape.kv_rank, shape.num_heads * (shape.nope_dim + shape.value_dim))
        self.o_proj = Linear(shape.num_heads * shape.value_dim, hidden)

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the CPU kernels; `kv_b_proj` becomes two matrices for each head, which run in opposite directions."""
        key_matrices, value_matrices = _head_matrices(self.kv_b_proj.take_weight(), self.shape)
        self.packed = [*map(pack_matrix, key_matrices)], [*map(pack_matrix, value_matrices)]
        self.addresses_HA = tuple(_addresses(matrices) for matrices in self.packed)
        self.o_proj.pack()
        self.kv_a_proj_with_mqa.pack()
        down, latent_norm = self.kv_a_proj_with_mqa.kernel_params[0], self.kv_a_layernorm.kernel_params
        if self.shape.query_rank is None:
            self.q_proj.pack()
            # The first two are placeholders, which the kernel does not read.
            queries = (False, down, latent_norm[0], self.q_proj.kernel_params[0])
        else:
            self.q_a_proj.pack()
            self.q_b_proj.pack()
            query_down, query_norm = self.q_a_proj.kernel_params[0], self.q_a_layernorm.kernel_params[0]
            queries = (True, query_down, query_norm, self.q_b_proj.kernel_params[0])
        self.input_params = (*norm.kernel_params, *queries, down, *latent_norm, self.shape.num_heads)

    def forward(self, h_TD: Tensor, batch: Batch, state: State) -> Tensor:
        shape = self.shape
        key_HNC, value_HVC = self._absorbed_weights()
        q_THN, rotated_THE = self._queries(h_TD).split([shape.nope_dim, shape.rope_dim], dim=-1)
        latent_TC, key_TE = self.kv_a_proj_with_mqa(h_TD).split([shape.kv_rank, shape.rope_dim], dim=-1)
        key_TE = self.rope.rotate(key_TE[:, None], batch)[:, 0]
        pages = state.pages[self.layer]
        pages[batch.new_kv_indices_T] = torch.cat([self.kv_a_layernorm(latent_TC), key_TE], dim=-1).to(pages.dtype)
        q_THC = torch.einsum("thn,hnc->thc", q_THN, key_HNC)
        q_THK = torch.cat([q_THC, self.rope.rotate(rotated_THE, batch)], dim=-1)
        outputs = []
        first_keys = batch.first_keys or (0,) * len(batch.lens)
        for q, kv_indices, first_key in zip(q_THK.split(list(batch.lens)), batch.kv_indices, first_keys, strict=True):
            rows_L1K = pages[kv_indices[first_key:]][:, None]
            outputs.append(causal_attention(q, rows_L1K, rows_L1K[..., : shape.kv_rank], self.scale))
        out: Tensor = self.o_proj(torch.einsum("thc,hvc->thv", torch.cat(outputs), value_HVC).flatten(-2))
        return out

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += mla(norm(x)) in place with the CPU kernels."""
        num_threads, x, shape = torch.get_num_threads(), x_TD.numpy(), self.shape
        control = THREAD_POOL.start_workers(num_threads)
        arrays, pages = batch.arrays, state.pages[self.layer]
        is_bf16 = pages.dtype == torch.bfloat16
        cache = ((pages.view(torch.int16) if is_bf16 else pages).numpy(), is_bf16, batch.block_size)
        positions = (self.rope.table(batch), self.rope.shape.is_interleaved)
        requests = (arrays.starts_R, arrays.lens_R, arrays.contexts_R)
        q_TX = project_and_append(
            control, num_threads, x, *self.input_params, *positions, *requests, arrays.tables_RW, *cache
        )
        out_TX = np.empty((len(x), shape.num_heads * shape.value_dim), np.float32)
        num_pairs = sum(
            length * (context + length) for length, context in zip(batch.lens, batch.context_lens, strict=True)
        )
        attend(
            num_pairs,
            max(batch.lens),
            q_TX,
            *requests,
            arrays.first_keys_R,
            arrays.tables_RW,
            *cache,
            *self.addresses_HA,
            shape.kv_rank,
            shape.nope_dim,
            shape.value_dim,
            np.float32(self.scale),
            out_TX,
        )
        cpu_layers.add_projected(control, num_threads, out_TX, *self.o_proj.kernel_params, x)

    def _queries(self, h_TD: Tensor) -> Tensor:
        """Return the queries before the rotation: (T, D) -> (T, H, N + E)."""
        if self.shape.query_rank is None:
            q_TX = self.q_proj(h_TD)
        else:
            q_TX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h_TD)))
        q_THD: Tensor = q_TX.unflatten(-1, (self.shape.num_heads, -1))
        return q_THD

    def _absorbed_weights(self) -> tuple[Tensor, Tensor]:
        """Return the parts of `kv_b_proj` that expand a latent to keys (H, N, C) and to values (H, V, C)."""
        assert self.kv_b_proj.weight is not None
        by_head: Tensor = self.kv_b_proj.weight.unflatten(0, (self.shape.num_heads, -1))
        key_HNC, value_HVC = by_head.split([self.shape.nope_dim, self.shape.value_dim], dim=1)
        return key_HNC, value_HVC


def _head_matrices(weight: StoredMatrix, shape: MLAShape) -> tuple[list[StoredMatrix], list[StoredMatrix]]:
    """Return each head's matrices from queries to latents (C, N) and from latents to values (V, C).

    The rows of `weight` are the N numbers of a key and the V numbers of a value, head by head. FP8 blocks stay as they
    are if they end where keys and values end; any other quantized weight is dequantized.
    """
    keys, values = [], []
    is_kept = weight.format == "fp8_blocks" and shape.nope_dim % BLOCK == 0 and shape.value_dim % BLOCK == 0
    rows_OC, block = weight.dequantized() if not is_kept else weight.parts[0], BLOCK
    for head in range(shape.num_heads):
        start = head * (shape.nope_dim + shape.value_dim)
        middle, end = start + shape.nope_dim, start + shape.nope_dim + shape.value_dim
        if is_kept:
            grid = weight.parts[1]
            key_grid, value_grid = grid[start // block : middle // block], grid[middle // block : end // block]
            keys.append(StoredMatrix("fp8_blocks", (rows_OC[start:middle].T.contiguous(), key_grid.T.contiguous())))
            values.append(StoredMatrix("fp8_blocks", (rows_OC[middle:end], value_grid)))
        else:
            keys.append(StoredMatrix.plain(rows_OC[start:middle].T.contiguous()))
            values.append(StoredMatrix.plain(rows_OC[middle:end]))
    return keys, values


def _addresses(matrices: list[PackedMatrix]) -> NDArray[np.int64]:
    """Return the addresses of each matrix's product, panels and scales, as the kernels take them: (H, 3)."""
    return np.array([matrix.descriptor[:3] for matrix in matrices], np.int64)
