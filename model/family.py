"""A `ModelFamily` gives the engine, the shards and the planner all that they need from a model of any family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from model.blocks.moe import ExpertBank, Experts, ExpertShape, LocalExperts
from model.checkpoint import Checkpoint
from model.families import nemotron_h

FAMILIES: dict[str, ModuleType] = {"nemotron_h": nemotron_h}


@dataclass(frozen=True)
class ModelFamily:
    """A `ModelFamily` combines a checkpoint with the module of `model.families` that loads and runs the checkpoint."""

    checkpoint: Checkpoint
    config: nemotron_h.NemotronHConfig

    @property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        """Return the shapes of all MoE layers for which the checkpoint has weights, also those of the MTP module."""
        return nemotron_h.served_expert_shapes(self.checkpoint, self.config)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer: those of both configs, and that of the tokenizer's `eos_token`.

        An id beyond the vocabulary is left out, because the model never generates it.
        """
        found = dict.fromkeys([*self.config.eos_token_ids, self.checkpoint.tokenizer_eos_id])
        return tuple(token_id for token_id in found if token_id is not None and token_id < self.config.vocab_size)

    @property
    def has_mtp(self) -> bool:
        """Return True if the config asks for an MTP module and the checkpoint has its weights."""
        return nemotron_h.has_mtp(self.checkpoint, self.config)

    def check(self) -> None:
        """Check the names and shapes of all tensors in the checkpoint without reading weights.

        Raises ValueError if a tensor is missing, is unknown or has the wrong shape; the message names the first such
        tensor.
        """
        nemotron_h.check(self.checkpoint, self.config)

    def load_expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Read the weights of one routed expert in their stored dtype: {"up": (M, L), "down": (L, M)}."""
        return nemotron_h.load_expert(self.checkpoint, self.config, layer, expert)

    def load_backbone(
        self, experts: Experts, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> nemotron_h.NemotronH:
        """Load the model without its routed experts; the loaded model calls `experts` to run routed experts."""
        return nemotron_h.load_backbone(self.checkpoint, self.config, experts, dtype, device)

    def load_local_experts(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> LocalExperts:
        """Load every routed expert into this process."""
        banks = {}
        for shape in self.expert_shapes:
            bank = banks[shape.layer] = ExpertBank(shape, dtype, device)
            for expert in range(shape.num_experts):
                bank.load(expert, self.load_expert(shape.layer, expert))
        return LocalExperts(banks)


def load_family(path: str | Path) -> ModelFamily:
    """Open the Hugging Face model directory `path` and return its checkpoint with the module for its `model_type`.

    Raises ValueError if `path` is not a model directory, or if there is no module for the `model_type`.
    """
    checkpoint = Checkpoint(path)
    model_type = checkpoint.config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{checkpoint.path} has model_type {model_type!r}; supported are {', '.join(FAMILIES)}")
    config = nemotron_h.NemotronHConfig.from_json(checkpoint.config, checkpoint.generation_config)
    return ModelFamily(checkpoint, config)
