"""`add_mixer` runs a mixer as one layer of a model, in one of the two kinds of arithmetic on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.blocks.mixer import Mixer, ResidualBlock
from model.blocks.norm import RMSNorm


def add_mixer(x_TD: Tensor, mixer: Mixer, *, is_compiled: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return x + mixer(norm(x)), where the norm has the weight 1, for a mixer that needs neither batch nor state.

    After the first call with the CPU kernels, the mixer cannot run in plain PyTorch any more.
    """
    nothing: Any = None
    block = ResidualBlock(RMSNorm(x_TD.shape[1], 1e-6), mixer).requires_grad_(False)
    if is_compiled:
        block.pack(dtype)
    out: Tensor = block(x_TD.clone(), nothing, nothing)
    return out


def normed(x_TD: Tensor) -> Tensor:
    """Return the norm that `add_mixer` applies, in float64."""
    x = x_TD.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
