"""The tests check which weight formats are found, and the error for every kind of broken or unsupported weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.configs.model_files import INDEX
from model.families.registry import load_family
from tests.model.checkpoints import QUANTIZED, Tiny, edit, format_of, several_files
from tests.model.conftest import load_fp32
from tests.model.steps import full_logits, random_tokens

E4M3 = torch.float8_e4m3fn
FP8 = "backbone.layers.0.mixer.in_proj"  # quantized modules of the variant `nvfp4`
NVFP4 = "backbone.layers.1.mixer.shared_experts.down_proj"
PLAIN = "backbone.layers.0.mixer.out_proj"


@pytest.fixture
def mixed(tiny_of: Callable[[str], Tiny]) -> Tiny:
    return tiny_of("nvfp4")


@pytest.fixture
def blocks(tiny_of: Callable[[str], Tiny]) -> Tiny:
    return tiny_of("fp8_blocks")


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_format_of_every_matrix_is_found(tiny_of: Callable[[str], Tiny], name: str) -> None:
    """Check the formats; in `nvfp4_flat`, a wildcard in the config also matches layers that are quantized."""
    checkpoint = Checkpoint(tiny_of(name).path)
    modules = [key.removesuffix(".weight") for key in checkpoint.names if key.endswith(".weight")]
    modules.remove("backbone.embeddings")
    found = {module: checkpoint.weight_format(f"{module}.weight") for module in modules}
    wide = {module for module in modules if len(checkpoint.header(f"{module}.weight").shape) == 2}
    assert found == {module: format_of(name, module) if module in wide else "plain" for module in modules}
    assert len(set(found.values())) == (3 if name in ("nvfp4", "w4a16") else 2)
    assert not any("declares" in note for note in checkpoint.notes)


def test_experts_say_the_formats_of_their_matrices(mixed: Tiny) -> None:
    family = load_family(mixed.path)
    formats = {shape.layer: shape.formats for shape in family.expert_shapes}
    assert formats == {1: ("nvfp4", "nvfp4"), 4: ("nvfp4", "fp8"), 6: ("nvfp4", "nvfp4"), 8: ()}
    expert = family.load_expert(4, 3)
    assert [expert[name].format for name in ("up", "down")] == ["nvfp4", "fp8"]


def test_scales_of_other_shapes_and_dtypes_with_the_same_numbers_are_read(
    blocks: Tiny, mixed: Tiny, tmp_path: Path
) -> None:
    """Check scales in bf16, as in Qwen's checkpoints, and scalars as vectors of one number."""

    def to_bf16(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name] = (2.0 ** tensors[name].log2().round()).bfloat16()

    def to_fp32(tensors: dict[str, Tensor]) -> None:
        to_bf16(tensors)
        tensors.update({name: tensors[name].float() for name in tensors if name.endswith("weight_scale_inv")})

    def to_vectors(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value.reshape(1) for name, value in tensors.items() if value.dim() == 0})

    tokens = random_tokens(9)
    logits = [
        full_logits(load_fp32(load_family(edit(tiny.path, tmp_path / change.__name__, change))), tokens)
        for tiny, change in ((blocks, to_bf16), (blocks, to_fp32), (mixed, to_vectors))
    ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[2], full_logits(load_fp32(load_family(mixed.path)), tokens))


# Notes at the start ---------------------------------------------------------------------------------------------------


def test_ignored_scales_are_told_with_their_numbers(tiny_of: Callable[[str], Tiny], latent: Tiny) -> None:
    notes = Checkpoint(tiny_of("fp8").path).notes
    ignored = "60 scales of the inputs and 2 scales of the KV cache are ignored"
    assert notes == (f"{ignored}, because activations and the KV cache are not quantized.",)
    assert Checkpoint(latent.path).notes == Checkpoint(tiny_of("fp8_blocks").path).notes == ()


def test_the_values_of_ignored_scales_change_nothing(mixed: Tiny, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("input_scale", "k_scale"))]:
            tensors[name] = torch.tensor(float("nan"))
        for name in [name for name in tensors if name.endswith("v_scale")]:
            tensors.pop(name)

    tokens = random_tokens(9)
    changed = load_fp32(load_family(edit(mixed.path, tmp_path, change)))
    assert torch.equal(full_logits(changed, tokens), full_logits(load_fp32(load_family(mixed.path)), tokens))


# Errors ---------------------------------------------------------------------------------------------------------------


def refused(tiny: Tiny, path: Path, sentence: str, changes: Mapping[str, Tensor | None]) -> None:
    """Check that `check` and loading raise `sentence` after `changes` to the tensors; None removes a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value for name, value in changes.items() if value is not None})
        for name in [name for name, value in changes.items() if value is None]:
            tensors.pop(name)

    edit(tiny.path, path, change)
    expected = re.escape(sentence.replace("PATH", str(path)))
    with pytest.raises(ValueError, match=f"^{expected}$"):
        load_family(path).check()
    with pytest.raises(ValueError, match=f"^{expected}$"):
        load_fp32(load_family(path))


def test_a_missing_scale_is_named(mixed: Tiny, blocks: Tiny, tmp_path: Path) -> None:
    sentence = f"tensor {FP8}.weight in PATH has the dtype F8_E4M3, but there is no tensor {FP8}.weight_scale or "
    refused(mixed, tmp_path, f"{sentence}{FP8}.weight_scale_inv", {f"{FP8}.weight_scale": None})
    for scale in ("weight_scale", "weight_scale_2"):
        sentence = f"tensor {NVFP4}.weight in PATH has the dtype U8 (NVFP4), but there is no tensor {NVFP4}.{scale}"
        refused(mixed, tmp_path, sentence, {f"{NVFP4}.{scale}": None})


def test_a_missing_scale_of_an_expert_is_named(mixed: Tiny, tmp_path: Path) -> None:
    expert = "backbone.layers.4.mixer.experts.5.down_proj"
    sentence = f"tensor {expert}.weight in PATH has the dtype F8_E4M3, but there is no tensor {expert}.weight_scale or "
    refused(mixed, tmp_path, f"{sentence}{expert}.weight_scale_inv", {f"{expert}.weight_scale": None})


def test_scales_too_many_are_named(mixed: Tiny, tmp_path: Path) -> None:
    sentence = f"tensor {FP8}.weight in PATH has the dtype F8_E4M3 and the scales weight_scale, weight_scale_inv; no "
    extra = {f"{FP8}.weight_scale_inv": torch.ones(2, 1)}
    refused(mixed, tmp_path, f"{sentence}supported format has all these scales", extra)
    sentence = f"tensor {PLAIN}.weight in PATH has the dtype BF16, which needs no scale, but there is the tensor "
    refused(mixed, tmp_path, f"{sentence}{PLAIN}.weight_scale", {f"{PLAIN}.weight_scale": torch.ones(())})
    name = "backbone.layers.0.norm.weight_scale_3"
    sentence = f"the checkpoint PATH has the unknown tensor {name} (1 in all)"
    refused(mixed, tmp_path, sentence, {name: torch.ones(())})


ONE_SCALE = "supported is one scale per matrix ([] or [1]), and not"
SUPPORTED = "allowed are BF16, F16, F32, F8_E4M3, U8"


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "end"),
    [
        (f"{FP8}.weight_scale", (328,), torch.float32, f"is [328]; {ONE_SCALE} FP8_PER_CHANNEL_PER_TOKEN"),
        (f"{FP8}.weight_scale", (3, 1, 1, 1), torch.float32, f"is [3, 1, 1, 1]; {ONE_SCALE} FP8_PB_WO"),
        (f"{FP8}.weight_scale", (), torch.uint8, "has the dtype U8; the format fp8 requires BF16, F16, F32"),
        (f"{FP8}.weight", (320, 64), E4M3, "is [320, 64], the config and the format fp8 require [328, 64]"),
        (f"{NVFP4}.weight_scale", (64, 12), E4M3, "is [64, 12], the config and the format nvfp4 require [64, 6]"),
        (f"{NVFP4}.weight_scale", (64, 6), torch.float32, "has the dtype F32; the format nvfp4 requires F8_E4M3"),
        (f"{NVFP4}.weight_scale", (64, 6), torch.uint8, "has the dtype U8; the format nvfp4 requires F8_E4M3"),
        (f"{NVFP4}.weight", (64, 96), torch.uint8, "is [64, 96], the config and the format nvfp4 require [64, 48]"),
        (f"{PLAIN}.weight", (64, 128), torch.int8, f"has the dtype I8; {SUPPORTED}"),
        (f"{PLAIN}.weight", (64, 128), torch.float8_e5m2, f"has the dtype F8_E5M2; {SUPPORTED}"),
        ("backbone.norm_f.weight", (64,), torch.int8, f"has the dtype I8; {SUPPORTED}"),
    ],
    ids=str,
)
def test_a_wrong_shape_or_dtype_is_named(
    mixed: Tiny, tmp_path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, end: str
) -> None:
    refused(mixed, tmp_path, f"tensor {name} in PATH {end}", {name: torch.zeros(shape).to(dtype)})


def test_a_grid_of_another_block_size_is_named(blocks: Tiny, tmp_path: Path) -> None:
    name = "backbone.layers.1.mixer.in_proj.weight_scale_inv"
    sentence = f"tensor {name} in PATH is [6, 3], the config and the format fp8_blocks require [3, 2]"
    refused(blocks, tmp_path, sentence, {name: torch.ones(6, 3)})


def test_a_norm_cannot_be_quantized(mixed: Tiny, tmp_path: Path) -> None:
    name = "backbone.norm_f.weight"
    sentence = f"tensor {name} in PATH has the format fp8; only matrices may be quantized"
    changes = {name: torch.zeros(64).to(E4M3), "backbone.norm_f.weight_scale": torch.ones(())}
    refused(mixed, tmp_path, sentence, changes)


def test_sizes_that_nvfp4_cannot_hold_are_named(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    name = "backbone.layers.1.mixer.shared_experts.down_proj"
    sentence = f"tensor {name}.weight in PATH does not fit the config: NVFP4 needs rows of a multiple of 16 numbers, "
    scales = {"weight_scale": torch.ones(61, 2).to(E4M3), "weight_scale_2": torch.ones(())}
    changes = {f"{name}.{part}": value for part, value in scales.items()}
    changes[f"{name}.weight"] = torch.zeros(61, 16, dtype=torch.uint8)
    refused(tiny_of("odd"), tmp_path, f"{sentence}not of 33", changes)


def test_the_layout_of_compressed_tensors_is_named(mixed: Tiny, tmp_path: Path) -> None:
    packed = torch.zeros(64, 48, dtype=torch.uint8)
    changes = {f"{NVFP4}.weight": None, f"{NVFP4}.weight_scale_2": None, f"{NVFP4}.weight_packed": packed}
    sentence = f"tensor {NVFP4}.weight_packed in PATH is of the layout compressed-tensors, which is not supported; "
    refused(mixed, tmp_path, f"{sentence}supported are plain, fp8, fp8_blocks, nvfp4", changes)


def test_experts_of_a_layer_have_one_format(mixed: Tiny, tmp_path: Path) -> None:
    experts = [f"backbone.layers.1.mixer.experts.{expert}.up_proj" for expert in (0, 6)]
    changes = {f"{experts[1]}.{part}": None for part in ("weight_scale", "weight_scale_2")}
    changes |= {f"{experts[1]}.weight": torch.zeros(48, 32)}
    sentence = f"tensor {experts[1]}.weight in PATH has the format plain, and {experts[0]}.weight has the format nvfp4"
    refused(mixed, tmp_path, f"{sentence}; a layer's experts must have one", changes)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize(
    "name", [f"{FP8}.weight", f"{NVFP4}.weight_scale", "backbone.layers.4.mixer.experts.5.down_proj.weight"]
)
def test_nan_codes_are_named_when_they_are_loaded(mixed: Tiny, tmp_path: Path, name: str, code: int) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.uint8)[-1, -1] = code

    family = load_family(edit(mixed.path, tmp_path, damage))
    family.check()  # reads no codes
    sentence = f"tensor {name} in {tmp_path} has a code 0x7F or 0xFF (NaN in e4m3); allowed are numbers only"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        load_fp32(family)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_are_numbers(mixed: Tiny, tmp_path: Path, value: float) -> None:
    name = f"{NVFP4}.weight_scale_2"
    family = load_family(edit(mixed.path, tmp_path, lambda tensors: tensors.update({name: torch.tensor(value)})))
    sentence = f"tensor {name} in {tmp_path} has a scale that is NaN or infinite; allowed are numbers only"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        load_fp32(family)


def test_a_truncated_file_of_several_is_named(mixed: Tiny, tmp_path: Path) -> None:
    path = several_files(mixed.path, tmp_path, 4)
    tokens = random_tokens(9)
    assert (path / INDEX).exists()
    whole = full_logits(load_fp32(load_family(path)), tokens)
    assert torch.equal(whole, full_logits(load_fp32(load_family(mixed.path)), tokens))
    file = sorted(path.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(ValueError, match=rf"{re.escape(file.name)} is not a readable safetensors file: .*incomplete"):
        load_family(path).check()
