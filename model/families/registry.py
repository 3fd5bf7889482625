"""The registry finds the family of a checkpoint by the `model_type` in its config."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint import Checkpoint
from model.families.checkpoint_family import CheckpointFamily
from model.families.deepseek_v3 import DeepseekV3Family
from model.families.nemotron_h import NemotronHFamily
from model.families.qwen3_next import Qwen3NextFamily

FAMILIES: dict[str, type[CheckpointFamily]] = {
    "nemotron_h": NemotronHFamily,
    "deepseek_v3": DeepseekV3Family,
    "qwen3_next": Qwen3NextFamily,
}


def load_family(path: str | Path) -> CheckpointFamily:
    """Open the Hugging Face model directory `path` as a model of the family that its `model_type` names.

    Raises ValueError if `path` is not a model directory, or if no family has this `model_type`.
    """
    checkpoint = Checkpoint(path)
    model_type = checkpoint.config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{checkpoint.path} has model_type {model_type!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type](checkpoint)
