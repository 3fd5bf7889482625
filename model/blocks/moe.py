"""`MoE` is the sparse mixture of experts; it calls its routed experts through `Experts`, so that they may be remote.

LatentMoE routes on the full hidden vector, but sends the experts only the output of fc1, which has a quarter of the
hidden width. Then fc2 projects the weighted sum of the experts' outputs back to the hidden width. In a plain MoE, fc1
and fc2 are the identity.

Legend: N rows, D hidden, L expert input (latent, or hidden in a plain MoE), K picks per row.
Source: NVIDIA, "LatentMoE" (arXiv 2601.18089).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from model.blocks.expert_bank import Experts
from model.blocks.linear import Linear, as_array
from model.blocks.mixer import Mixer
from model.blocks.mlp import DenseMLP
from model.blocks.norm import RMSNorm
from model.blocks.router import Router
from model.configs.expert_shape import ExpertShape
from model.cpu import layers as cpu_layers
from model.cpu.thread_pool import THREAD_POOL
from model.state import Batch, State


class SharedGate(nn.Module):
    """A `SharedGate` scales the shared expert's output of each row h by σ(weight·h)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def forward(self, h_ND: Tensor) -> Tensor:
        return torch.nn.functional.linear(h_ND, self.weight).sigmoid()


class MoE(Mixer):
    """A `MoE` layer maps (N, D) -> (N, D) and computes the shared expert while the routed experts work elsewhere.

    `shared` is None if the layer has no shared expert.
    """

    def __init__(
        self,
        hidden_size: int,
        shape: ExpertShape,
        router: Router,
        experts: Experts,
        shared: DenseMLP | None,
        *,
        is_latent: bool = False,
        is_shared_gated: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        assert is_latent or shape.input_dim == hidden_size
        assert shared is not None or not is_shared_gated
        self.shape, self.experts, self.gate, self.is_latent = shape, experts, router, is_latent
        if is_latent:
            self.fc1_latent_proj = Linear(hidden_size, shape.input_dim, bias)
            self.fc2_latent_proj = Linear(shape.input_dim, hidden_size, bias)
        self.shared_experts = shared
        self.shared_gate = SharedGate(hidden_size) if is_shared_gated else None

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the parameters of the CPU kernels and of `norm`; rows go to the experts in `dtype`."""
        self.gate.pack()
        fc1_params = self.fc2_params = (
            self.gate.kernel_params[0],
            as_array(None),
        )  # placeholders of the types that the kernels expect; the kernels do not read them
        if self.is_latent:
            self.fc1_latent_proj.pack()
            self.fc2_latent_proj.pack()
            fc1_params, self.fc2_params = self.fc1_latent_proj.kernel_params, self.fc2_latent_proj.kernel_params
        self.route_params = (*norm.kernel_params, *self.gate.kernel_params, self.is_latent, *fc1_params)
        if self.shared_experts is not None:
            self.shared_experts.pack(norm, dtype)
            gate_D = as_array(None if self.shared_gate is None else self.shared_gate.weight[0])
            self.shared_params = (*self.shared_experts.kernel_params, gate_D)
        self.wire_dtype = dtype

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += moe(norm(x)) in place with the CPU kernels."""
        num_threads, x, shape = torch.get_num_threads(), x_TD.numpy(), self.shape
        control = THREAD_POOL.start_workers(num_threads)
        is_bf16 = self.wire_dtype == torch.bfloat16
        ids_NK, weights_NK = np.empty((len(x), shape.top_k), np.int64), np.empty((len(x), shape.top_k), np.float32)
        wire_NL = np.empty((len(x), shape.input_dim), np.int16 if is_bf16 else np.float32)
        h_ND = cpu_layers.route(control, num_threads, x, *self.route_params, ids_NK, weights_NK, wire_NL, is_bf16)
        x_NL, topk_ids_NK, topk_weights_NK = map(torch.from_numpy, (wire_NL, ids_NK, weights_NK))
        x_NL = x_NL.view(torch.bfloat16) if is_bf16 else x_NL
        wait = self.experts(shape.layer, x_NL, topk_ids_NK, topk_weights_NK)
        shared_ND = np.empty((0, 0), np.float32)
        if self.shared_experts is not None:
            shared_ND = cpu_layers.shared_mlp(control, num_threads, h_ND, *self.shared_params)
        cpu_layers.add_routed(control, num_threads, wait().numpy(), self.is_latent, *self.fc2_params, shared_ND, x)

    def forward(self, h_ND: Tensor, batch: Batch | None = None, state: State | None = None) -> Tensor:
        topk_ids_NK, topk_weights_NK = self.gate(h_ND)
        x_NL = self.fc1_latent_proj(h_ND) if self.is_latent else h_ND
        wait = self.experts(self.shape.layer, x_NL, topk_ids_NK, topk_weights_NK)
        shared_ND = self._shared(h_ND)
        y_NL = wait().to(h_ND.dtype)
        routed_ND: Tensor = self.fc2_latent_proj(y_NL) if self.is_latent else y_NL
        return routed_ND if shared_ND is None else routed_ND + shared_ND

    def _shared(self, h_ND: Tensor) -> Tensor | None:
        if self.shared_experts is None:
            return None
        out_ND: Tensor = self.shared_experts(h_ND)
        return out_ND if self.shared_gate is None else self.shared_gate(h_ND) * out_ND
