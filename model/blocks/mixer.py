"""A `Mixer` is the work of one layer between its norm and the addition to the residual stream.

Legend: T tokens of the step, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from model.blocks.norm import RMSNorm
from model.state import Batch, State


class Mixer(nn.Module, ABC):
    """A `Mixer` maps the normed hidden vectors of a step to the vectors that are added: (T, D) -> (T, D)."""

    @property
    def plain_part(self) -> tuple[str, str] | None:
        """Return the part of the mixer that the CPU kernels do not support, and the reason, for `kernels.plain_note`.

        None if the CPU kernels support the whole mixer.
        """
        return None

    @abstractmethod
    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the CPU kernels, including the parameters of `norm`, the norm before the mixer.

        `dtype` is the deployment's dtype, in which rows go to the experts. From now on `add_to` may be called.
        """

    @abstractmethod
    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += mixer(norm(x)) in place with the CPU kernels."""

    @abstractmethod
    def forward(self, h_TD: Tensor, batch: Batch, state: State) -> Tensor:
        """Compute the mixer in plain PyTorch; read and update the requests' state."""

    def commit(self, places: Tensor, accepted: Batch, state: State) -> None:
        """Advance the recurrent state of requests with drafts over the tokens of `accepted`.

        `places` has the places of these tokens among the step's `draft_rows`, whose inputs the mixer has kept. A mixer
        without recurrent state has nothing to do.
        """


class ResidualBlock(nn.Module):
    """A `ResidualBlock` computes x + mixer(norm(x)): (T, D) -> (T, D)."""

    def __init__(self, norm: RMSNorm, mixer: Mixer) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer
        self.is_packed = False

    def pack(self, dtype: torch.dtype) -> None:
        """Prepare the CPU kernels; from now on `forward` runs the CPU kernels and changes `x_TD` in place."""
        self.mixer.pack(self.norm, dtype)
        self.is_packed = True

    def forward(self, x_TD: Tensor, batch: Batch, state: State) -> Tensor:
        if self.is_packed:
            self.mixer.add_to(x_TD, batch, state)
            return x_TD
        out: Tensor = x_TD + self.mixer(self.norm(x_TD), batch, state)
        return out
