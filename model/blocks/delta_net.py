"""`GatedDeltaNet` is a causal convolution, followed by the gated delta rule, a linear attention with a correction.

What surprises:

- The rows of the input projections are ordered by key head: q, k, the values and the gates of one key head stand side
  by side. The convolution's channels, however, are all queries, all keys and all values.
- Queries and keys are divided by their lengths, √(Σx² + 1e-6), after the convolution.
- Each key head serves several neighbouring value heads.
- The output norm normalises first and then multiplies by the gate. Mamba-2 first multiplies and then normalises.
- The rule is always computed as a recurrence. Its chunked form would give other bits for another split of a prompt.

Legend: T tokens, R requests, G key heads, H value heads, D key dim, V value dim, C conv channels, K taps.
Source: Yang et al., "Gated Delta Networks" (arXiv 2412.06464), section 3.1; Qwen3-Next's code in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels
from model.blocks.linear import Linear
from model.blocks.mamba import causal_conv
from model.blocks.norm import NormedGate, RMSNorm
from model.blocks.recurrent_mixer import ConvWeights, Floats, Inputs, RecurrentMixer
from model.configs.mixer_shapes import DeltaNetShape
from model.cpu import delta_net as cpu
from model.cpu import layers as cpu_layers
from model.cpu.vectors import LANES
from model.state import Batch, State


def delta_rule(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    decay_TH: Tensor,
    beta_TH: Tensor,
    state_RHVD: Tensor,
    lens: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule over packed requests of `lens` tokens, in fp32, token after token.

    S ← decay·S, then S ← S + β·(v - S·k) ⊗ k, o = S·q. Returns o (T, H, V) and the last states (R, H, V, D). The n-th
    tokens of all requests that have so many tokens are computed together.
    """
    # With the longest request first, the requests that still have tokens are always the first ones.
    longest_first = sorted(range(len(lens)), key=lambda r: -lens[r])
    starts = np.cumsum([0, *lens])
    rows = [[starts[r] + t for r in longest_first if lens[r] > t] for t in range(max(lens))]
    row_T = torch.tensor([row for at_once in rows for row in at_once], device=v_THV.device)
    order = torch.tensor(longest_first, device=v_THV.device)
    states, out_THV = state_RHVD[order], torch.empty_like(v_THV)
    for row_R in row_T.split([len(at_once) for at_once in rows]):
        num = len(row_R)
        q, k = q_THD[row_R][:, :, None], k_THD[row_R][:, :, None]
        kept = states[:num] * decay_TH[row_R][:, :, None, None]
        missing = v_THV[row_R] - (kept * k).sum(-1)
        states[:num] = kept + (beta_TH[row_R][:, :, None] * missing)[..., None] * k
        out_THV[row_R] = (states[:num] * q).sum(-1)
    return out_THV, states[order.argsort()]


def unit_length(x: Tensor) -> Tensor:
    """Divide vectors by their lengths: fp32 (..., D) -> (..., D)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + float(cpu.L2_EPS))


class GatedDeltaNet(RecurrentMixer):
    """A `GatedDeltaNet` maps (T, hidden) -> (T, hidden) and advances the requests' convolution and delta rule state."""

    def __init__(self, shape: DeltaNetShape, layer: int, eps: float) -> None:
        super().__init__(layer)
        self.shape = shape
        self.in_proj_qkvz = Linear(shape.hidden_size, shape.conv_dim + shape.values_dim)
        self.in_proj_ba = Linear(shape.hidden_size, 2 * shape.num_value_heads)
        self.conv1d = ConvWeights(shape.conv_dim, shape.conv_kernel, use_bias=False)
        self.A_log = nn.Parameter(torch.empty(shape.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.num_value_heads))
        self.norm = NormedGate(shape.value_dim, eps)
        self.out_proj = Linear(shape.values_dim, shape.hidden_size)

    @property
    def plain_part(self) -> tuple[str, str] | None:
        if self.shape.key_dim % LANES == 0:
            return None
        reason = f"linear_key_head_dim = {self.shape.key_dim}, which is not a multiple of {LANES}"
        return "The convolution and the delta rule of the DeltaNet layers", reason

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the parameters of the CPU kernels, including the parameters of `norm`, the norm before the mixer.

        If the key dim is not a multiple of the kernels' vector length, only the projections run on the CPU kernels.
        """
        for linear in (self.in_proj_qkvz, self.in_proj_ba, self.out_proj):
            linear.pack()
        weights = (self.in_proj_qkvz.kernel_params[0], self.in_proj_ba.kernel_params[0])
        self.input_params = (*norm.kernel_params, *weights)
        self.output_params = self.out_proj.kernel_params
        if self.plain_part is not None:
            kernels.log_plain(*self.plain_part)
            return
        s = self.shape
        no_bias = torch.zeros(s.conv_dim)
        constants = (self.conv1d.weight[:, 0].T, no_bias, -self.A_log.float().exp(), self.dt_bias, self.norm.weight)
        numbers = tuple(np.ascontiguousarray(c.detach().float().numpy()) for c in constants)
        self.core_params = (s.num_key_heads, *numbers, np.float32(self.norm.eps))
        self.has_packed_core = True

    def project(self, h_TD: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj_qkvz(h_TD), self.in_proj_ba(h_TD)

    def project_packed(self, control: Any, num_threads: int, x: Floats) -> Inputs:
        qkvz_TP, ba_TP = cpu_layers.project_twice(control, num_threads, x, *self.input_params)
        return qkvz_TP, ba_TP

    def output(self, mixed_TI: Tensor) -> Tensor:
        out: Tensor = self.out_proj(mixed_TI)
        return out

    def replay_inputs(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the inputs without the gates z, which come last in the columns of each key head."""
        qkvz, ba = inputs
        by_head = qkvz.reshape(len(qkvz), self.shape.num_key_heads, -1)
        num_kept = self.shape.conv_dim // self.shape.num_key_heads
        return by_head[:, :, :num_kept].reshape(len(qkvz), -1), ba

    def mix_packed(self, inputs: Inputs, batch: Batch, state: State, has_output: bool = True) -> Floats:
        """Compute the core, as `RecurrentMixer.mix_packed` says; the gates may be missing if `has_output` is False."""
        out_TI = np.empty((len(inputs[0]) if has_output else 0, self.shape.values_dim), np.float32)
        cpu.mix(*inputs, *self.kernel_state(batch, state), *self.core_params, has_output, out_TI)
        return out_TI

    def mix_from(
        self, inputs: tuple[Tensor, ...], window_RKC: Tensor, state_R: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the core without the CPU kernels; if the gates are missing, the outputs are not normed."""
        s, [qkvz, ba] = self.shape, inputs
        qkv_TC, z_THV = self.split(qkvz)
        b_TH, a_TH = (part.flatten(1) for part in ba.float().unflatten(1, (s.num_key_heads, 2, -1)).unbind(2))
        conv = kernels.causal_conv(qkvz.device) or causal_conv
        conv_TC, window_RKC = conv(qkv_TC, self.conv1d.weight[:, 0], None, window_RKC, batch)
        q, k, v = conv_TC.float().split([s.keys_dim, s.keys_dim, s.values_dim], dim=-1)
        per_key_head = s.num_value_heads // s.num_key_heads
        q_THD, k_THD = (
            unit_length(part.unflatten(1, (-1, s.key_dim))).repeat_interleave(per_key_head, 1) for part in (q, k)
        )
        decay_TH = (-self.A_log.float().exp() * F.softplus(a_TH + self.dt_bias.float())).exp()
        v_THV = v.unflatten(1, (-1, s.value_dim))
        q_THD = q_THD * s.key_dim**-0.5
        o_THV, state_R = delta_rule(q_THD, k_THD, v_THV, decay_TH, b_TH.sigmoid(), state_R, batch.lens)
        out_THV = o_THV if z_THV is None else self.norm(o_THV, z_THV)
        return out_THV.flatten(1), window_RKC, state_R

    def split(self, qkvz: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the convolution's inputs, (T, all q | all k | all v), and the gates (T, H, V), None if missing."""
        s = self.shape
        per_key_head = s.values_dim // s.num_key_heads
        by_head = qkvz.unflatten(1, (s.num_key_heads, -1))
        num_gates = by_head.shape[2] - 2 * s.key_dim - per_key_head
        *qkv, z = by_head.split([s.key_dim, s.key_dim, per_key_head, num_gates], dim=2)
        gates = z.reshape(len(z), s.num_value_heads, s.value_dim) if num_gates else None
        return torch.cat([part.flatten(1) for part in qkv], dim=1), gates

    def round_inputs(self, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        qkvz, ba = inputs
        by_head = qkvz.unflatten(1, (self.shape.num_key_heads, -1)).clone()
        conv_inputs = by_head[:, :, : self.shape.conv_dim // self.shape.num_key_heads]
        conv_inputs.copy_(conv_inputs.to(dtype))
        return by_head.flatten(1), ba
