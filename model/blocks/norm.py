"""The norms compute in fp32 and apply the weight before they cast the result to the model's dtype."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.cpu.norm import rms_norm


class RMSNorm(nn.Module):
    """An `RMSNorm` computes x / rms(x) · scale over the last dimension: (..., D) -> (..., D).

    The scale is the weight or, if the norm is zero-centred, 1 + weight.
    """

    def __init__(self, dim: int, eps: float, is_zero_centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if is_zero_centred else torch.ones(dim))
        self.eps, self.is_zero_centred = eps, is_zero_centred
        self.packed: NDArray[np.float32] | None = None

    @property
    def kernel_params(self) -> tuple[NDArray[np.float32], np.float32]:
        """Return the norm's scale and epsilon, in the types that the functions of `cpu.layers` take."""
        scale: NDArray[np.float32] = self.scale.detach().numpy()
        return scale, np.float32(self.eps)

    @property
    def scale(self) -> Tensor:
        """Return the factor of each number after the division by rms(x), in fp32: (D,)."""
        return 1 + self.weight.float() if self.is_zero_centred else self.weight.float()

    def pack(self) -> None:
        """Prepare the CPU kernel; `forward` runs the kernel from now on, with fp32 inputs and outputs."""
        self.packed, _ = self.kernel_params

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            rows = x.reshape(-1, x.shape[-1])
            out = torch.empty_like(rows)
            rms_norm(rows.numpy(), self.packed, np.float32(self.eps), out.numpy())
            return out.view(x.shape)
        return F.rms_norm(x.float(), self.weight.shape, self.scale, self.eps).to(x.dtype)


class GatedGroupRMSNorm(nn.Module):
    """A `GatedGroupRMSNorm` is Mamba-2's output norm: y (..., D), gate (..., D) -> (..., D).

    The norm multiplies `y` by SiLU(gate), and then normalises each group of D / num_groups channels by itself.
    Source: Mamba-2, `RMSNormGated` with `norm_before_gate=False`.
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


class NormedGate(nn.Module):
    """A `NormedGate` is the output norm of Gated DeltaNet: y (..., D), gate (..., D) -> (..., D).

    The norm first normalises `y` over the last dimension, and then multiplies by SiLU(gate), both in fp32.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        normed = F.rms_norm(y.float(), self.weight.shape, self.weight.float(), self.eps)
        return (normed * F.silu(gate.float())).to(gate.dtype)
