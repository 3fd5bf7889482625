"""A `Router` picks the routed experts of each row and weighs their outputs.

Legend: N rows, D hidden, E experts, K picks per row.
Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.blocks.linear import as_array
from model.configs.expert_shape import ExpertShape
from model.cpu.packed_matrix import PackedMatrix, pack_matrix


class Router(nn.Module):
    """A `Router` picks K experts for each row: (N, D) -> expert ids (N, K) and weights (N, K).

    Scores are sigmoids in fp32. The correction bias influences which experts are picked, but never the picks' weights.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        shape: ExpertShape,
        scaling_factor: float,
        num_groups: int,
        topk_groups: int,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(shape.num_experts))
        self.top_k, self.scaling_factor, self.normalize = shape.top_k, scaling_factor, normalize
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.packed: PackedMatrix | None = None

    def pack(self) -> None:
        self.packed = pack_matrix(self.weight.float())

    def scores(self, h_ND: Tensor) -> Tensor:
        return torch.nn.functional.linear(h_ND.float(), self.weight.float()).sigmoid()

    def forward(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        scores_NE = self.scores(h_ND)
        choice_NE = self._keep_best_groups(scores_NE + self.e_score_correction_bias)
        topk_ids_NK = choice_NE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_NK = scores_NE.gather(1, topk_ids_NK)
        if self.normalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return topk_ids_NK, weights_NK * self.scaling_factor

    @property
    def kernel_params(self) -> tuple[Any, ...]:
        """Return the router's parameters in the order in which `cpu.layers.route` takes them."""
        assert self.packed is not None
        groups, bias = (self.num_groups, self.topk_groups), as_array(self.e_score_correction_bias)
        return self.packed.descriptor, bias, *groups, self.normalize, np.float32(self.scaling_factor)

    def _keep_best_groups(self, choice_NE: Tensor) -> Tensor:
        if self.topk_groups == self.num_groups:
            return choice_NE
        by_group: Tensor = choice_NE.unflatten(-1, (self.num_groups, -1))
        best = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1).topk(self.topk_groups, dim=-1).indices
        is_kept = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=choice_NE.device).scatter_(1, best, True)
        return by_group.masked_fill(~is_kept[..., None], -torch.inf).flatten(-2)
