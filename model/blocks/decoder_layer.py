"""A `DecoderLayer` is a layer of two mixers, each with its own norm: attention, and then an MLP or a MoE."""

from __future__ import annotations

from torch import Tensor, nn

from model.blocks.mixer import Mixer, ResidualBlock
from model.blocks.norm import RMSNorm
from model.state import Batch, State


class DecoderLayer(nn.Module):
    """A `DecoderLayer` maps the residual stream (T, D) -> (T, D).

    `attention` works over the tokens of each request, and may have recurrent state; `mlp` computes token by token.
    """

    def __init__(self, attention_norm: RMSNorm, attention: Mixer, mlp_norm: RMSNorm, mlp: Mixer) -> None:
        super().__init__()
        self.attention = ResidualBlock(attention_norm, attention)
        self.mlp = ResidualBlock(mlp_norm, mlp)

    def forward(self, x_TD: Tensor, batch: Batch, state: State) -> Tensor:
        out: Tensor = self.mlp(self.attention(x_TD, batch, state), batch, state)
        return out
