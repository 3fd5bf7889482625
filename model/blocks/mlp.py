"""A `DenseMLP` is an expert that every row passes: the shared expert of a MoE layer, or a layer of its own.

Legend: T tokens of the step, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.blocks.linear import Linear
from model.blocks.mixer import Mixer
from model.blocks.norm import RMSNorm
from model.configs.expert_shape import ExpertKind
from model.cpu import layers as cpu_layers
from model.cpu.thread_pool import THREAD_POOL
from model.state import Batch, State


class DenseMLP(Mixer):
    """A `DenseMLP` computes what a routed expert of the same kind computes, with `width` hidden units.

    relu2 is down·relu(up·h)²; swiglu is down·(silu(gate·h)·(up·h)).
    """

    def __init__(self, hidden_size: int, width: int, bias: bool = False, kind: ExpertKind = "relu2") -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias) if kind == "swiglu" else None
        self.up_proj = Linear(hidden_size, width, bias)
        self.down_proj = Linear(width, hidden_size, bias)

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the parameters of the CPU kernels, including the parameters of `norm`, the norm before the mixer."""
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            if linear is not None:
                linear.pack()
        self.norm_params = norm.kernel_params

    @property
    def kernel_params(self) -> tuple[Any, ...]:
        """Return the parameters of the MLP in the order in which the kernels of `cpu.layers` take them."""
        up_params = self.up_proj.kernel_params
        gate_params = up_params if self.gate_proj is None else self.gate_proj.kernel_params
        return self.gate_proj is not None, *gate_params, *up_params, *self.down_proj.kernel_params

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += mlp(norm(x)) in place with the CPU kernels."""
        num_threads = torch.get_num_threads()
        cpu_layers.add_mlp(
            THREAD_POOL.start_workers(num_threads), num_threads, x_TD.numpy(), *self.norm_params, *self.kernel_params
        )

    def forward(self, h: Tensor, batch: Batch | None = None, state: State | None = None) -> Tensor:
        hidden = self.up_proj(h)
        if self.gate_proj is None:
            hidden = hidden.relu()
            hidden = hidden * hidden
        else:
            hidden = torch.nn.functional.silu(self.gate_proj(h)) * hidden
        out: Tensor = self.down_proj(hidden)
        return out
