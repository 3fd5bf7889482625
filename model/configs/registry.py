"""The registry finds the config class of a model by the `model_type` in its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from model.configs.deepseek_v3 import DeepseekV3Config
from model.configs.model_config import ModelConfig
from model.configs.nemotron_h import NemotronHConfig
from model.configs.qwen3_next import Qwen3NextConfig


class ConfigClass(Protocol):
    """A `ConfigClass` creates the checked config of a model."""

    def from_json(self, raw: dict[str, Any], generation: dict[str, Any] | None = None, /) -> ModelConfig:
        """Create a config from `config.json` and `generation_config.json`; raise ValueError for a wrong value."""


CONFIGS: dict[str, ConfigClass] = {
    "nemotron_h": NemotronHConfig,
    "deepseek_v3": DeepseekV3Config,
    "qwen3_next": Qwen3NextConfig,
}


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Return the checked config of the model that a parsed `config.json` describes.

    Raises ValueError that names the key if a key is missing or has a value that is not allowed.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        raise ValueError(f"config.json has model_type = {model_type!r}; supported are {', '.join(CONFIGS)}")
    return CONFIGS[model_type].from_json(dict(raw))
