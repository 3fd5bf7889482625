"""A `ModelFamily` gives the engine, the shards and the planner all that they need from a model of any family.

Legend: T tokens of the step, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.blocks.expert_bank import Experts, LocalExperts
from model.checkpoint import Checkpoint
from model.configs.expert_shape import ExpertShape
from model.configs.model_config import ModelConfig
from model.state import Batch, State
from model.stored_matrix import StoredMatrix


class LanguageModel(Protocol):
    """A `LanguageModel` is a model without its routed experts, which it calls through `Experts`."""

    @property
    def has_drafts(self) -> bool:
        """Return True if `draft` may be called."""

    def forward(self, batch: Batch, state: State, /) -> Tensor:
        """Compute the batch's tokens and return their hidden vectors after the final norm (T, D).

        The recurrent state of requests with drafts does not change before `commit`.
        """

    def commit(self, batch: Batch, num_accepted: Sequence[int], state: State, /) -> None:
        """Advance the recurrent state of requests with drafts over the batch that `forward` computed last.

        The rejected drafts are left out; `num_accepted` has the number of accepted drafts of each request.
        """

    def logits(self, hidden: Tensor, /) -> Tensor:
        """Compute the logits of hidden vectors: (..., D) -> fp32 (..., V)."""

    def draft(self, batch: Batch, hidden_TD: Tensor, state: State, /) -> Tensor:
        """Run the draft module on the batch's tokens, and return its output vectors (T, D).

        `hidden_TD[t]` is the hidden vector at the position before token t: the output of `forward` or, for the second
        and later drafts, the output of `draft`. `logits` of the returned vectors give the drafts.
        """


class ModelFamily(Protocol):
    """A `ModelFamily` is an open checkpoint together with the code that loads and runs it."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint."""

    @property
    def config(self) -> ModelConfig:
        """Return the checked config."""

    @property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        """Return the shapes of all MoE layers for which the checkpoint has weights, including the MTP module's."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer: the end tokens of both configs, and the tokenizer's `eos_token`.

        An id beyond the vocabulary is left out, because the model never generates it.
        """

    @property
    def has_mtp(self) -> bool:
        """Return True if the config asks for an MTP module and the checkpoint has its weights."""

    def check(self) -> None:
        """Check the names, shapes and weight formats of all tensors in the checkpoint without reading weights.

        Raises ValueError if a tensor is missing, is unknown, or has a wrong shape or an unknown format; the message
        names the first such tensor.
        """

    def plain_notes(self, device: torch.device | str) -> tuple[str, ...]:
        """Return a sentence about each kind of block that runs plain PyTorch because of the block's shape.

        The compiled kernels of `device` do not support the shape. Empty if `device` has no compiled kernels.
        """

    def load_expert(self, layer: int, expert: int) -> Mapping[str, StoredMatrix]:
        """Read the matrices of one routed expert as the checkpoint stores them, by the names of `ExpertShape.matrices`.

        Raises ValueError if the model has no such expert.
        """

    def load_backbone(self, experts: Experts, dtype: torch.dtype, device: torch.device | str = "cpu") -> LanguageModel:
        """Load the model without its routed experts; the loaded model calls `experts` to run routed experts."""

    def load_local_experts(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> LocalExperts:
        """Load every routed expert into this process."""
