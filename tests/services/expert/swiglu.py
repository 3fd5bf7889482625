"""`SwigluFamily` is a model family of the tests, whose routed experts are SwiGLU on rows of the hidden size."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.checkpoint import Checkpoint
from model.configs.expert_shape import ExpertShape
from model.families.nemotron_h import NemotronHFamily
from tests.services.expert.checkpoint import CONFIG, LAYERS, NUM_EXPERTS

HIDDEN, WIDTH = 72, 48
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 4


class SwigluFamily(NemotronHFamily):
    """A `SwigluFamily` has only what a shard reads: the shapes of the experts and their weights."""

    @cached_property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        """Return the shapes of the config, with the kind of expert that the checkpoint has."""
        return tuple(replace(shape, kind="swiglu") for shape in self.config.expert_shapes)


def write_swiglu_checkpoint(path: Path) -> SwigluFamily:
    """Write a checkpoint with random experts to the folder `path`, and return its family."""
    generator = torch.Generator().manual_seed(8)
    tensors = {"backbone.embeddings.weight": torch.zeros(1)}
    sizes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    for layer in LAYERS:
        for expert in range(NUM_EXPERTS):
            for name, size in sizes.items():
                stem = f"backbone.layers.{layer}.mixer.experts.{expert}.{name}_proj.weight"
                tensors[stem] = torch.randn(size, generator=generator) / size[1] ** 0.5
    path.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "moe_latent_size": None}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return SwigluFamily(Checkpoint(path))
