"""A model family seen from outside: what the engine, the shards and the planner need, whichever model it is."""

from __future__ import annotations

from dataclasses import dataclass
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
    """A checkpoint and the module that understands it."""

    checkpoint: Checkpoint
    config: nemotron_h.NemotronHConfig

    @property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        """One per MoE layer that the checkpoint can fill, the MTP module's included."""
        return nemotron_h.served_expert_shapes(self.checkpoint, self.config)

    @property
    def has_mtp(self) -> bool:
        return nemotron_h.has_mtp(self.checkpoint, self.config)

    def check(self) -> None:
        """Raises ValueError naming the first tensor that is missing, unknown or misshapen. Reads no weights."""
        nemotron_h.check(self.checkpoint, self.config)

    def load_expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One routed expert, as stored: {"up": (M, L), "down": (L, M)}."""
        return nemotron_h.load_expert(self.checkpoint, self.config, layer, expert)

    def load_backbone(
        self, experts: Experts, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> nemotron_h.NemotronH:
        """The model without its routed experts, which `experts` runs."""
        return nemotron_h.load_backbone(self.checkpoint, self.config, experts, dtype, device)

    def load_local_experts(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> LocalExperts:
        """Every routed expert, in this process."""
        banks = {}
        for shape in self.expert_shapes:
            bank = banks[shape.layer] = ExpertBank(shape, dtype, device)
            for expert in range(shape.num_experts):
                bank.load(expert, self.load_expert(shape.layer, expert))
        return LocalExperts(banks)


def load_family(path: str | Path) -> ModelFamily:
    """Opens a Hugging Face model directory. Raises ValueError if it is not one, or not of a family that is served."""
    checkpoint = Checkpoint(path)
    model_type = checkpoint.config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{checkpoint.path} has model_type {model_type!r}; served are {', '.join(FAMILIES)}")
    config = nemotron_h.NemotronHConfig.from_json(checkpoint.config, checkpoint.generation_config)
    return ModelFamily(checkpoint, config)
