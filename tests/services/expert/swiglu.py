"""`SwigluFamily` is a model family of the tests, whose routed experts are SwiGLU on rows of the hidden size.

An expert's three matrices may have three different weight formats.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.checkpoint import Checkpoint
from model.configs.expert_shape import ExpertShape
from model.configs.weight_format import WeightFormat, matrix_bytes
from model.encoder import encode_tensors
from model.families.nemotron_h import NemotronHFamily
from tests.services.expert.checkpoint import CONFIG, LAYERS, NUM_EXPERTS

HIDDEN, WIDTH = 144, 80  # no multiples of 32, and more than one block of FP8
Formats = tuple[WeightFormat, WeightFormat, WeightFormat]  # of the matrices gate, up and down
PLAIN: Formats = ("plain", "plain", "plain")
MIXED: Formats = ("fp8_blocks", "fp8", "nvfp4")


class SwigluFamily(NemotronHFamily):
    """A `SwigluFamily` has only what a shard reads: the shapes of the experts and their weights."""

    @cached_property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        """Return the shapes of the config, with the kind of expert and the formats that the checkpoint has."""
        shapes = (replace(shape, kind="swiglu") for shape in self.config.expert_shapes)
        return tuple(replace(shape, formats=self._expert_formats(shape)) for shape in shapes)


def expert_bytes(formats: Formats, dtype: torch.dtype) -> int:
    """Return the bytes of one expert as a shard stores it that computes in `dtype`."""
    gate, up, down = formats
    sizes = ((gate, WIDTH, HIDDEN), (up, WIDTH, HIDDEN), (down, HIDDEN, WIDTH))
    return sum(matrix_bytes(*size, dtype) for size in sizes)


def write_swiglu_checkpoint(path: Path, formats: Formats = PLAIN) -> SwigluFamily:
    """Write a checkpoint with random experts in `formats` to the folder `path`, and return its family."""
    generator = torch.Generator().manual_seed(8)
    tensors, quantized = {"backbone.embeddings.weight": torch.zeros(1)}, dict[str, WeightFormat]()
    sizes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    for layer in LAYERS:
        for expert in range(NUM_EXPERTS):
            for (name, size), format in zip(sizes.items(), formats, strict=True):
                module = f"backbone.layers.{layer}.mixer.experts.{expert}.{name}_proj"
                tensors[f"{module}.weight"] = torch.randn(size, generator=generator) / size[1] ** 0.5
                if format != "plain":
                    quantized[module] = format
    path.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "moe_latent_size": None}
    (path / "config.json").write_text(json.dumps(config))
    save_file(encode_tensors(tensors, quantized), path / "model.safetensors")
    return SwigluFamily(Checkpoint(path))
