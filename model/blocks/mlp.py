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
from model.cpu import layers as cpu_layers
from model.cpu.thread_pool import THREAD_POOL
from model.state import Batch, State


class DenseMLP(Mixer):
    """A `DenseMLP` computes down·relu(up·h)², as the shared expert of MoE layers and as the mixer of `-` layers."""

    def __init__(self, hidden_size: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, width, bias)
        self.down_proj = Linear(width, hidden_size, bias)

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the parameters of the CPU kernels, including the parameters of `norm`, the norm before the mixer."""
        self.up_proj.pack()
        self.down_proj.pack()
        self.norm_params = norm.kernel_params

    @property
    def kernel_params(self) -> tuple[Any, ...]:
        return *self.up_proj.kernel_params, *self.down_proj.kernel_params

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += mlp(norm(x)) in place with the CPU kernels."""
        num_threads = torch.get_num_threads()
        cpu_layers.add_mlp(
            THREAD_POOL.start_workers(num_threads), num_threads, x_TD.numpy(), *self.norm_params, *self.kernel_params
        )

    def forward(self, h: Tensor, batch: Batch | None = None, state: State | None = None) -> Tensor:
        hidden = self.up_proj(h).relu()
        out: Tensor = self.down_proj(hidden * hidden)
        return out
