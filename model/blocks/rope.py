"""A `Rope` rotates queries and keys by their positions: rotary position embeddings (RoPE), with YaRN for long contexts.

Legend: T tokens of the step, F = dim/2 frequencies.
Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071), section 3.2, with the rounding of transformers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.configs.rope_shape import RopeShape, YarnScaling
from model.cpu.rope import rotations
from model.state import Batch


def inverse_frequencies(shape: RopeShape) -> Tensor:
    """Return the angle per position of each pair, fp32 (F,), rounded in the same steps as in transformers."""
    powers_F = shape.theta ** (torch.arange(0, shape.dim, 2, dtype=torch.float32, device="cpu") / shape.dim)
    return 1.0 / powers_F if shape.yarn is None else _stretched(powers_F, shape, shape.yarn)


def _stretched(powers_F: Tensor, shape: RopeShape, yarn: YarnScaling) -> Tensor:
    """Return YaRN's inverse frequencies: slow pairs are slowed down by the factor, and fast pairs stay as they are."""

    def pair_with(num_rotations: float) -> float:
        """Return the pair, as a fraction, that makes `num_rotations` rotations in the original context."""
        ratio = yarn.original_max_position / (num_rotations * 2 * math.pi)
        return shape.dim * math.log(ratio) / (2 * math.log(shape.theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high: float = min(math.ceil(pair_with(yarn.beta_slow)), shape.dim - 1)
    high += 0.001 if low == high else 0.0
    ramp_F = ((torch.arange(len(powers_F), dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    plain_share_F = 1 - ramp_F
    return 1.0 / (yarn.factor * powers_F) * (1 - plain_share_F) + 1.0 / powers_F * plain_share_F


class Rope:
    """A `Rope` holds the frequencies of one model, and the rotations of the last batch, which all layers share."""

    def __init__(self, shape: RopeShape) -> None:
        self.shape = shape
        self.inverse_F = inverse_frequencies(shape)
        self.factor = 1.0 if shape.yarn is None else shape.yarn.rotation_factor
        self._last: tuple[Batch, NDArray[np.float32]] | None = None

    def table(self, batch: Batch) -> NDArray[np.float32]:
        """Return the cosines and sines of the batch's tokens for the CPU kernels, fp32 (T, 2, F)."""
        if self._last is None or self._last[0] is not batch:
            positions_T = batch.positions_T.numpy()
            self._last = batch, rotations(positions_T, self.inverse_F.numpy(), np.float32(self.factor))
        return self._last[1]

    def rotate(self, x_THD: Tensor, batch: Batch) -> Tensor:
        """Return the heads' vectors (T, H, 2·F) of the batch's tokens rotated, in plain PyTorch."""
        positions_T = batch.positions_T.float()
        angles_TF = (positions_T[:, None] * self.inverse_F.to(positions_T.device)).double()
        cos, sin = (part.float().mul(self.factor)[:, None] for part in (angles_TF.cos(), angles_TF.sin()))
        pairs = x_THD.float().unflatten(-1, (-1, 2) if self.shape.is_interleaved else (2, -1))
        axis = -1 if self.shape.is_interleaved else -2
        a, b = pairs.unbind(axis)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2).to(x_THD.dtype)
