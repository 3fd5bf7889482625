"""RMS normalisation, in fp32 whatever the model's dtype, the weight multiplied before the cast back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension: (..., D) -> (..., D)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedGroupRMSNorm(nn.Module):
    """Mamba-2's output norm: the gate first, then each group of D / num_groups channels by itself.

    (..., D), (..., D) -> (..., D). Source: Mamba-2, `RMSNormGated` with `norm_before_gate=False`.
    """

    def __init__(self, dim: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.num_groups, self.eps = num_groups, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        u = y.float() * F.silu(gate.float())
        groups = u.unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight.float()).to(gate.dtype)
