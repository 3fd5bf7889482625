"""`Mamba2Mixer` is a causal convolution, followed by a selective state space with one scalar decay per head.

What surprises:

- The input projection's order is gate | x | B | C | Δ, and the convolution runs over x|B|C together.
- Δ, A and the state are always fp32, even if the model has another dtype.
- Padding with Δ = 0 does not change the state, because the decay is then 1 and the added input is 0.
- Chunks end at token positions that are multiples of the chunk length. If a prompt is split into steps only at
  multiples of the chunk length, the arithmetic of the prompt's tokens therefore does not depend on the split.

Legend: T tokens, R requests, P chunks, Q chunk length, H heads, D head dim, G groups, N state dim, C conv channels,
K taps.
Source: Dao & Gu, "Transformers are SSMs" (2024), sections 6 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels
from model.blocks.linear import Linear
from model.blocks.norm import GatedGroupRMSNorm, RMSNorm
from model.blocks.recurrent_mixer import ConvWeights, Floats, Inputs, RecurrentMixer
from model.configs.mixer_shapes import MambaShape
from model.cpu import layers as cpu_layers
from model.cpu import mamba as cpu
from model.cpu.vectors import LANES
from model.state import Batch, State, SubBatch


@dataclass(frozen=True)
class Chunks:
    """A `Chunks` says how the packed requests of a step are cut into chunks at multiples of the chunk length.

    The scan passes the state from chunk to chunk for all requests at once. The scan's iteration c handles the c-th
    chunk of every request that has more than c chunks.
    """

    rows_PQ: Tensor  # for each chunk, its rows in the packed batch; the number T stands for padding
    chain: tuple[tuple[Tensor, Tensor], ...]  # chain[c]: each request's c-th chunk, and the index of the request


@lru_cache(maxsize=8)
def split_into_chunks(lens: tuple[int, ...], context_lens: tuple[int, ...], chunk_size: int) -> Chunks:
    """Cut requests, which have `lens` new tokens after `context_lens` earlier tokens, into chunks of `chunk_size`."""
    total, start = sum(lens), 0
    rows: list[list[int]] = []
    chain: list[tuple[list[int], list[int]]] = []
    for request, (length, context_len) in enumerate(zip(lens, context_lens, strict=True)):
        row, position, end, depth = start, context_len, context_len + length, 0
        while position < end:
            stop = min(end, (position // chunk_size + 1) * chunk_size)
            chunk = list(range(row, row + stop - position))
            if depth == len(chain):
                chain.append(([], []))
            chain[depth][0].append(len(rows))
            chain[depth][1].append(request)
            rows.append(chunk + [total] * (chunk_size - len(chunk)))
            row, position, depth = row + stop - position, stop, depth + 1
        start += length
    return Chunks(torch.tensor(rows), tuple((torch.tensor(p), torch.tensor(r)) for p, r in chain))


def ssd_scan(
    x_PQHD: Tensor,
    delta_PQH: Tensor,
    a_H: Tensor,
    b_PQGN: Tensor,
    c_PQGN: Tensor,
    state_RHDN: Tensor,
    chain: tuple[tuple[Tensor, Tensor], ...],
) -> tuple[Tensor, Tensor]:
    """Run the chunked selective scan in fp32.

    Returns y (P, Q, H, D) without the skip term and the final state (R, H, D, N). The quoted comments name the steps of
    the paper's algorithm.
    """
    per_group = x_PQHD.shape[2] // b_PQGN.shape[2]
    log_decay_PHQ = (delta_PQH * a_H).transpose(1, 2).cumsum(-1)
    # 1. "Compute the output for each intra-chunk (diagonal blocks)": (C Bᵀ ∘ L) (Δ x)
    mask_QQ = torch.ones(x_PQHD.shape[1], x_PQHD.shape[1], dtype=torch.bool, device=x_PQHD.device).tril()
    decay_PHQQ = (log_decay_PHQ[..., :, None] - log_decay_PHQ[..., None, :]).masked_fill(~mask_QQ, -torch.inf).exp()
    # For operands that are not contiguous, the BLAS call, and so the last bits, would depend on the number of chunks.
    scores_PGQQ = c_PQGN.transpose(1, 2).contiguous() @ b_PQGN.permute(0, 2, 3, 1).contiguous()
    input_PHQD = (x_PQHD * delta_PQH[..., None]).transpose(1, 2)
    y_PHQD = (scores_PGQQ.repeat_interleave(per_group, 1) * decay_PHQQ) @ input_PHQD
    # 2. "Compute the state for each intra-chunk": Σ_j decay to the chunk's end · Δ_j x_j ⊗ B_j
    to_end_PHQ = (log_decay_PHQ[..., -1:] - log_decay_PHQ).exp()
    b_PHQN = b_PQGN.transpose(1, 2).repeat_interleave(per_group, 1)
    added_PHDN = (input_PHQD * to_end_PHQ[..., None]).transpose(-1, -2) @ b_PHQN
    # 3. "Compute the inter-chunk recurrence": the state that enters each chunk
    chunk_decay_P = log_decay_PHQ[..., -1].exp()
    entering: list[Tensor] = []
    for chunks, requests in chain:
        before = state_RHDN[requests]
        entering.append(before)
        after = before * chunk_decay_P[chunks, :, None, None] + added_PHDN[chunks]
        state_RHDN = state_RHDN.index_copy(0, requests, after)
    order = torch.cat([chunks for chunks, _ in chain]).argsort()
    entering_PHDN = torch.cat(entering)[order]
    # 4. "Compute state -> output conversion per chunk": decay from the chunk's start · C · state
    c_PHQN = c_PQGN.transpose(1, 2).repeat_interleave(per_group, 1)
    y_PHQD = y_PHQD + (c_PHQN @ entering_PHDN.transpose(-1, -2)) * log_decay_PHQ.exp()[..., None]
    return y_PHQD.transpose(1, 2), state_RHDN


def ssd_step(
    x_RHD: Tensor, delta_RH: Tensor, a_H: Tensor, b_RGN: Tensor, c_RGN: Tensor, state_RHDN: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one token per request: S ← exp(ΔA)·S + Δ x ⊗ B, y = S·C.

    Returns y (R, H, D) without the skip term and the new state (R, H, D, N).
    """
    per_group = x_RHD.shape[1] // b_RGN.shape[1]
    b_RHN, c_RHN = b_RGN.repeat_interleave(per_group, 1), c_RGN.repeat_interleave(per_group, 1)
    decay_RH = (delta_RH * a_H).exp()
    state_RHDN = state_RHDN * decay_RH[..., None, None] + (x_RHD * delta_RH[..., None])[..., None] * b_RHN[:, :, None]
    return (state_RHDN @ c_RHN[..., None])[..., 0], state_RHDN


def causal_conv(
    xbc_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, window_RKC: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Apply the depthwise causal convolution and SiLU to packed requests.

    Takes the new inputs (T, C) and the K-1 inputs before the new inputs of each request (R, K-1, C). Returns the
    outputs (T, C) and the last K-1 inputs of each request (R, K-1, C).
    """
    num_past = window_RKC.shape[1]
    parts: list[Tensor] = []
    for window, new in zip(window_RKC.unbind(), xbc_TC.split(list(batch.lens)), strict=True):
        parts += [window, new]
    padded = torch.cat(parts)
    lens = torch.tensor(batch.lens, device=xbc_TC.device)
    shift_T = (torch.arange(len(batch.lens), device=xbc_TC.device) * num_past).repeat_interleave(lens)
    rows_T = torch.arange(xbc_TC.shape[0], device=xbc_TC.device) + shift_T
    out = sum(padded[rows_T + tap] * weight_CK[:, tap] for tap in range(num_past + 1))
    assert isinstance(out, Tensor)
    ends_R = (lens + num_past).cumsum(0)
    last_RK = ends_R[:, None] + torch.arange(-num_past, 0, device=xbc_TC.device)
    return F.silu(out if bias_C is None else out + bias_C), padded[last_RK]


def packed_scan(
    x_THD: Tensor,
    delta_TH: Tensor,
    a_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    ssm_RHDN: Tensor,
    sub_batch: SubBatch,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Run `ssd_scan` over packed requests and return y (T, H, D) and the final states (R, H, D, N)."""
    chunks = split_into_chunks(sub_batch.lens, sub_batch.context_lens, chunk_size)
    rows = chunks.rows_PQ.to(x_THD.device)
    chain = tuple((p.to(x_THD.device), r.to(x_THD.device)) for p, r in chunks.chain)

    def pad(v: Tensor) -> Tensor:
        return torch.cat([v, v.new_zeros(1, *v.shape[1:])])[rows]

    y_PQHD, ssm_RHDN = ssd_scan(pad(x_THD), pad(delta_TH), a_H, pad(b_TGN), pad(c_TGN), ssm_RHDN, chain)
    is_real = rows < x_THD.shape[0]
    y_THD = torch.empty_like(x_THD)
    y_THD[rows[is_real]] = y_PQHD[is_real]
    return y_THD, ssm_RHDN


class Mamba2Mixer(RecurrentMixer):
    """A `Mamba2Mixer` maps (T, hidden) -> (T, hidden) and advances the requests' convolution and SSM state."""

    def __init__(
        self, shape: MambaShape, layer: int, eps: float, use_conv_bias: bool = True, bias: bool = False
    ) -> None:
        super().__init__(layer)
        self.shape = shape
        self.in_proj = Linear(shape.hidden_size, shape.inner_dim + shape.conv_dim + shape.num_heads, bias)
        self.conv1d = ConvWeights(shape.conv_dim, shape.conv_kernel, use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(shape.num_heads))
        self.D = nn.Parameter(torch.empty(shape.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.num_heads))
        self.norm = GatedGroupRMSNorm(shape.inner_dim, shape.num_groups, eps)
        self.out_proj = Linear(shape.inner_dim, shape.hidden_size, bias)

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the output of `in_proj` into gate, convolution input and Δ.

        Returns the gate (..., inner), x|B|C before the convolution (..., C) and Δ before softplus (..., H).
        """
        s = self.shape
        gate, xbc, delta = projected.split([s.inner_dim, s.conv_dim, s.num_heads], dim=-1)
        return gate, xbc, delta

    def scan_inputs(self, xbc: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Compute the scan's inputs from the convolution's output, in fp32.

        Returns x (..., H, D), Δ (..., H), A (H,), B and C (..., G, N).
        """
        s = self.shape
        groups = s.num_groups * s.state_dim
        x, b, c = xbc.float().split([s.inner_dim, groups, groups], dim=-1)
        delta = F.softplus(delta.float() + self.dt_bias.float()).clamp(*s.delta_limit)
        a_H = -self.A_log.float().exp()
        by_group = (s.num_groups, s.state_dim)
        x = x.unflatten(-1, (s.num_heads, s.head_dim))
        return x, delta, a_H, b.unflatten(-1, by_group), c.unflatten(-1, by_group)

    def finish(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Compute the gated norm of y + D·x: y and x (..., H, D), gate (..., inner) -> (..., inner)."""
        y = y + x * self.D.float()[:, None]
        normed: Tensor = self.norm(y.flatten(-2), gate)
        return normed

    @property
    def plain_part(self) -> tuple[str, str] | None:
        if self.shape.state_dim % LANES == 0:
            return None
        reason = f"ssm_state_size = {self.shape.state_dim}, which is not a multiple of {LANES}"
        return "The convolution and the state space of the Mamba-2 layers", reason

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the parameters of the CPU kernels, including the parameters of `norm`, the norm before the mixer.

        If the state dim is not a multiple of the kernels' vector length, only the projections run on the CPU kernels.
        """
        self.in_proj.pack()
        self.out_proj.pack()
        self.input_params, self.output_params = (
            (*norm.kernel_params, *self.in_proj.kernel_params),
            self.out_proj.kernel_params,
        )
        s, conv = self.shape, self.conv1d
        if self.plain_part is not None:
            kernels.log_plain(*self.plain_part)
            return
        bias = torch.zeros(s.conv_dim) if conv.bias is None else conv.bias
        constants = (conv.weight[:, 0].T, bias, -self.A_log.float().exp(), self.D, self.dt_bias)
        numbers = tuple(np.ascontiguousarray(c.detach().float().numpy()) for c in constants)
        limits = tuple(np.float32(limit) for limit in s.delta_limit)
        norm_params = (self.norm.weight.detach().float().numpy(), np.float32(self.norm.eps))
        self.core_params = (s.num_groups, *numbers, *limits, *norm_params)
        self.has_packed_core = True

    def project(self, h_TD: Tensor) -> tuple[Tensor, ...]:
        return (self.in_proj(h_TD),)

    def project_packed(self, control: Any, num_threads: int, x: Floats) -> Inputs:
        return (cpu_layers.project(control, num_threads, x, *self.input_params),)

    def output(self, mixed_TI: Tensor) -> Tensor:
        out: Tensor = self.out_proj(mixed_TI)
        return out

    def mix_packed(self, inputs: Inputs, batch: Batch, state: State, has_output: bool = True) -> Floats:
        """Compute the core, (T, gate | x | B | C | Δ) -> (T, inner), as `RecurrentMixer.mix_packed` says."""
        [projected_TP] = inputs
        out_TI = np.empty((projected_TP.shape[0] if has_output else 0, self.shape.inner_dim), np.float32)
        cpu.mix(projected_TP, *self.kernel_state(batch, state), *self.core_params, has_output, out_TI)
        return out_TI

    def mix_from(
        self, inputs: tuple[Tensor, ...], window_RKC: Tensor, state_R: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        [projected_TP] = inputs
        gate_TI, xbc_TC, delta_TH = self.split(projected_TP)
        conv = kernels.causal_conv(projected_TP.device) or causal_conv
        xbc_TC, window_RKC = conv(xbc_TC, self.conv1d.weight[:, 0], self.conv1d.bias, window_RKC, batch)
        x_THD, delta_TH, a_H, b_TGN, c_TGN = self.scan_inputs(xbc_TC, delta_TH)
        y_THD, ssm_RHDN = self.advance(x_THD, delta_TH, a_H, b_TGN, c_TGN, state_R, batch)
        return self.finish(y_THD, x_THD, gate_TI), window_RKC, ssm_RHDN

    def round_inputs(self, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows_TP = inputs[0].clone()
        xbc_TC = self.split(rows_TP)[1]
        xbc_TC.copy_(xbc_TC.to(dtype))
        return (rows_TP,)

    def advance(
        self, x: Tensor, delta: Tensor, a_H: Tensor, b: Tensor, c: Tensor, ssm: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Run `ssd_step` over the requests with one token and the scan over all other requests.

        Returns y (T, H, D) and the new states (R, H, D, N).
        """
        step, scan = kernels.ssd_step(x.device) or ssd_step, kernels.ssd_scan(x.device) or packed_scan
        single, multi = batch.single_token_requests, batch.multi_token_requests
        if multi is None:
            return step(x, delta, a_H, b, c, ssm)
        if single is None:
            return scan(x, delta, a_H, b, c, ssm, multi, self.shape.chunk_size)
        y, new_ssm = torch.empty_like(x), torch.empty_like(ssm)
        t, r = single.rows, single.requests
        y[t], new_ssm[r] = step(x[t], delta[t], a_H, b[t], c[t], ssm[r])
        t, r = multi.rows, multi.requests
        y[t], new_ssm[r] = scan(x[t], delta[t], a_H, b[t], c[t], ssm[r], multi, self.shape.chunk_size)
        return y, new_ssm
