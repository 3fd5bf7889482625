"""The tests write the demo model in every quantized format and compare it with the bf16 model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model.configs.weight_format import WeightFormat
from model.demo import DEMO
from model.demo.corpus import encode_all, read_corpus
from model.demo.quantize import BITS_PER_BYTE_BARS, formats_of, write_quantized
from model.encoder import linear_modules
from model.families.registry import load_family
from model.state import Batch, State

WINDOW, NUM_WINDOWS = 512, 8
FORMATS: tuple[WeightFormat, ...] = ("fp8", "fp8_blocks", "nvfp4")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directory of the demo model in each format; "plain" is the bf16 model."""
    modules = linear_modules(load_file(DEMO / "model.safetensors"))
    written: dict[str, Path] = {"plain": DEMO}
    for format in FORMATS:
        written[format] = tmp_path_factory.mktemp("quantized") / format
        write_quantized(DEMO, written[format], formats_of(format, modules))
    return written


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    """Return the token ids of windows that lie far apart in the held-out text: (NUM_WINDOWS, WINDOW)."""
    tokens = torch.from_numpy(encode_all(Tokenizer.from_file(str(DEMO / "tokenizer.json")), read_corpus()[1]))
    starts = torch.linspace(0, len(tokens) - WINDOW, NUM_WINDOWS).long()
    return torch.stack([tokens[start : start + WINDOW] for start in starts])


def loss_of(path: Path, held_out: torch.Tensor) -> float:
    family = load_family(path)
    model = family.load_backbone(family.load_local_experts(torch.float32), torch.float32)
    state = State(model.config.state_spec, 1, WINDOW // 16, torch.float32)
    losses = []
    with torch.inference_mode():
        for token_ids in held_out:
            batch = Batch(token_ids, (WINDOW,), (0,), (0,), (tuple(range(WINDOW // 16)),))
            losses.append(F.cross_entropy(model.logits(model(batch, state))[:-1], token_ids[1:]))
    return float(torch.stack(losses).mean())


def test_each_format_is_smaller_and_as_good(paths: dict[str, Path], held_out: torch.Tensor) -> None:
    """Check the loss on a sample of the held-out text against the bars, and the sizes of the files."""
    losses = {format: loss_of(path, held_out) for format, path in paths.items()}
    sizes = {format: (path / "model.safetensors").stat().st_size for format, path in paths.items()}
    for format in FORMATS:
        assert losses[format] != losses["plain"]
        assert losses[format] < (1 + BITS_PER_BYTE_BARS[format]) * losses["plain"]
    assert sizes["nvfp4"] < sizes["fp8"] < 0.7 * sizes["plain"]
    assert sizes["fp8_blocks"] < 0.6 * sizes["plain"]


def test_the_formats_are_those_of_the_public_checkpoints(paths: dict[str, Path]) -> None:
    found = {format: load_family(paths[format]).expert_shapes for format in FORMATS}
    assert {shape.formats for shape in found["fp8"]} == {("fp8", "fp8"), ()}
    assert {shape.formats for shape in found["nvfp4"]} == {("nvfp4", "nvfp4"), ()}
    assert {shape.formats for shape in found["fp8_blocks"]} == {("fp8_blocks", "fp8_blocks")}
    for format in FORMATS:
        family = load_family(paths[format])
        family.check()
        assert family.checkpoint.notes == ()
        assert family.has_mtp
        shared = family.checkpoint.weight_format("backbone.layers.1.mixer.shared_experts.up_proj.weight")
        assert shared == ("fp8" if format == "nvfp4" else format)


def test_the_recorded_figures_are_within_the_bars() -> None:
    metrics: dict[str, Any] = json.loads((DEMO / "metrics.json").read_text())["quantized"]
    plain = metrics["formats"]["plain"]
    for format in FORMATS:
        found = metrics["formats"][format]
        assert found["bits_per_byte"] < (1 + BITS_PER_BYTE_BARS[format]) * plain["bits_per_byte"]
        assert found["first_draft_accepted"] > 0.98 * plain["first_draft_accepted"]
