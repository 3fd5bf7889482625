"""A `Router` picks the routed experts of each row and weighs their outputs.

Legend: N rows, D hidden, E experts, K picks per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.blocks.linear import as_array
from model.configs.expert_shape import ExpertShape
from model.cpu.packed_matrix import PackedMatrix, pack_matrix
from model.stored_matrix import StoredMatrix


class Router(nn.Module, ABC):
    """A `Router` picks K experts for each row: (N, D) -> expert ids (N, K) and weights (N, K).

    Scores are fp32. Among experts with equal scores, the expert with the lowest id comes first.
    """

    def __init__(self, hidden_size: int, shape: ExpertShape, normalize: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.num_experts, hidden_size))
        self.top_k, self.normalize = shape.top_k, normalize
        self.packed: PackedMatrix | None = None

    def pack(self) -> None:
        self.packed = pack_matrix(StoredMatrix.plain(self.weight.float()))

    def logits(self, h_ND: Tensor) -> Tensor:
        return torch.nn.functional.linear(h_ND.float(), self.weight.float())

    @abstractmethod
    def forward(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids and the weights of each row's experts, int64 and fp32 (N, K)."""

    @property
    @abstractmethod
    def kernel_params(self) -> tuple[Any, ...]:
        """Return the router's parameters in the order in which `cpu.layers.route` takes them."""


class SigmoidRouter(Router):
    """A `SigmoidRouter` scores each expert alone, and can keep a row to the best groups of experts.

    The correction bias influences which experts are picked, but never the picks' weights.
    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
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
        super().__init__(hidden_size, shape, normalize)
        self.register_buffer("e_score_correction_bias", torch.empty(shape.num_experts))
        self.scaling_factor = scaling_factor
        self.num_groups, self.topk_groups = num_groups, topk_groups

    def forward(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        scores_NE = self.logits(h_ND).sigmoid()
        choice_NE = self._keep_best_groups(scores_NE + self.e_score_correction_bias)
        topk_ids_NK = best_first(choice_NE, self.top_k)
        weights_NK = scores_NE.gather(1, topk_ids_NK)
        if self.normalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return topk_ids_NK, weights_NK * self.scaling_factor

    @property
    def kernel_params(self) -> tuple[Any, ...]:
        assert self.packed is not None
        groups, bias = (self.num_groups, self.topk_groups), as_array(self.e_score_correction_bias)
        return self.packed.descriptor, False, bias, *groups, self.normalize, np.float32(self.scaling_factor)

    def _keep_best_groups(self, choice_NE: Tensor) -> Tensor:
        if self.topk_groups == self.num_groups:
            return choice_NE
        by_group: Tensor = choice_NE.unflatten(-1, (self.num_groups, -1))
        two_best = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
        best = best_first(two_best, self.topk_groups)
        is_kept = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=choice_NE.device).scatter_(1, best, True)
        return by_group.masked_fill(~is_kept[..., None], -torch.inf).flatten(-2)


class SoftmaxRouter(Router):
    """A `SoftmaxRouter` scores the experts by a softmax over all of them, as Qwen3-Next does."""

    def forward(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        scores_NE = self.logits(h_ND).softmax(-1)
        topk_ids_NK = best_first(scores_NE, self.top_k)
        weights_NK = scores_NE.gather(1, topk_ids_NK)
        return topk_ids_NK, weights_NK / weights_NK.sum(-1, keepdim=True) if self.normalize else weights_NK

    @property
    def kernel_params(self) -> tuple[Any, ...]:
        assert self.packed is not None
        return self.packed.descriptor, True, as_array(None), 1, 1, self.normalize, np.float32(1.0)


def best_first(values: Tensor, num: int) -> Tensor:
    """Return the indices of the `num` largest values of each row, the largest first; of equal values, the first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :num]
