"""The tests compare what config files declare with the formats of modules, and check the errors for wrong files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import Checkpoint
from model.configs.declared_formats import DeclaredFormats, declarations
from model.configs.model_files import QUANTIZATION
from model.configs.weight_format import WeightFormat
from model.families.registry import load_family
from tests.model.checkpoints import Tiny, edit_config

LAYERS = {"a.up_proj": {"quant_algo": "NVFP4", "group_size": 16}, "a.down_proj": {"quant_algo": "fp8"}}


def of_config(**declared: Any) -> DeclaredFormats:
    return DeclaredFormats.of_config({"quantization_config": declared})


def agreeing(declared: DeclaredFormats, *modules: str) -> list[list[WeightFormat]]:
    formats: tuple[WeightFormat, ...] = ("plain", "fp8", "fp8_blocks", "nvfp4")
    return [[format for format in formats if not declared.contradicts(module, format)] for module in modules]


@pytest.mark.parametrize("name", ["W4A16_NVFP4", "nvfp4", "NVFP4"])
def test_one_format_for_all_but_exclusions(name: str) -> None:
    declared = of_config(quant_method="modelopt", quant_algo=name, ignore=["lm_head", "a.fc1", "mtp*"])
    found = agreeing(declared, "a.fc1", "a.fc1.in", "a.fc12", "mtp.layers.0.q_proj", "b")
    assert found == [["plain"], ["plain"], ["nvfp4"], ["plain"], ["nvfp4"]]


def test_a_wildcard_may_mean_the_tree_below_a_module() -> None:
    declared = DeclaredFormats.of_modelopt({"quantization": {"quant_algo": "FP8", "exclude_modules": ["layers.1*"]}})
    found = agreeing(declared, "layers.1.mixer", "layers.10.mixer", "layers.2.mixer")
    assert found == [["plain"], ["plain", "fp8"], ["fp8"]]


def test_a_list_of_modules_is_complete() -> None:
    declared = DeclaredFormats.of_modelopt(
        {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": LAYERS}}
    )
    assert agreeing(declared, "a.up_proj", "a.down_proj", "a.fc1") == [["nvfp4"], ["fp8"], ["plain"]]


def test_long_lists_of_exclusions_are_read_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check as many exclusions as Qwen3-Coder-Next has in FP8.

    A checkpoint has up to 70,000 modules. With one expression per exclusion, checking them took 25 seconds.
    """
    excluded = [f"model.layers.{i}.{name}" for i in range(48) for name in ("in_proj_ba", "gate", "shared_gate", "conv")]
    declared = of_config(quant_method="fp8", weight_block_size=[128, 128], modules_to_not_convert=excluded)
    num_compiled, compile_one = 0, re.compile

    def count(pattern: str, flags: int = 0) -> re.Pattern[str]:
        nonlocal num_compiled
        num_compiled += 1
        return compile_one(pattern, flags)

    monkeypatch.setattr(re, "compile", count)  # `fnmatch` uses this function, too
    for i in range(100):
        assert not declared.contradicts(f"model.layers.3.mlp.experts.{i}.up_proj", "fp8_blocks")
    assert agreeing(declared, "model.layers.3.conv", "model.layers.47.in_proj_ba.x") == [["plain"], ["plain"]]
    assert num_compiled == 2  # one expression for each reading of the 192 exclusions


def test_blocks_are_declared_by_their_size() -> None:
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["a.ba"]}
    found = agreeing(of_config(**block), "a.ba", "a.q_proj", "a.gate", "a.eh_proj", "lm_head")
    assert found == [["plain"], ["fp8_blocks"], *[["plain", "fp8_blocks"]] * 3]


def test_files_that_say_nothing_contradict_nothing() -> None:
    everything: list[WeightFormat] = ["plain", "fp8", "fp8_blocks", "nvfp4"]
    for declared in (
        DeclaredFormats.of_config({}),
        of_config(quant_method="modelopt"),
        DeclaredFormats.of_modelopt({}),
    ):
        assert agreeing(declared, "a") == [everything]


@pytest.mark.parametrize(
    "formats",
    [
        {"l.0.a": "fp8", "l.0.b": "fp8"},
        {"l.0.a": "nvfp4"},
        {"l.0.a": "nvfp4", "l.0.b": "fp8"},
        {"l.0.a": "fp8_blocks", "l.0.b": "fp8_blocks"},
    ],
    ids=str,
)
def test_what_is_declared_is_read_again(formats: dict[str, WeightFormat]) -> None:
    modules = ["l.0.a", "l.0.b", "l.0.c"]
    quantization_config, hf_quant_config = declarations(formats, modules)
    files = [of_config(**quantization_config)]
    files += [] if hf_quant_config is None else [DeclaredFormats.of_modelopt(hf_quant_config)]
    for declared in files:
        assert agreeing(declared, *modules) == [[formats.get(module, "plain")] for module in modules]


def test_a_contradiction_is_told_once_and_changes_nothing(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*experts*", "*.fc*", "*k_proj"]}
    path = edit_config(tiny_of("fp8").path, tmp_path, quantization_config=quantization)
    family = load_family(path)
    family.check()
    [warning] = [note for note in family.checkpoint.notes if note.startswith("Warning")]
    num = 3 * 2 * (8 + 1) + 3  # experts that are quantized all the same, and the plain q_proj, v_proj and o_proj
    assert warning.startswith(f"Warning: config.json declares other formats than the tensors have for {num} weights, ")
    assert warning.endswith("; the tensors decide.")
    assert family.expert_shapes[0].formats == ("fp8", "fp8")


def test_both_files_are_optional_and_the_identity_covers_both(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    tiny = tiny_of("nvfp4")
    without = edit_config(tiny.path, tmp_path / "without", quantization_config=None)
    (without / QUANTIZATION).unlink()
    load_family(without).check()
    assert not [note for note in Checkpoint(without).notes if note.startswith("Warning")]
    same = edit_config(tiny.path, tmp_path / "same")
    assert Checkpoint(same).digest == Checkpoint(tiny.path).digest
    (same / QUANTIZATION).unlink()
    assert Checkpoint(same).digest != Checkpoint(tiny.path).digest


SUPPORTED = "supported are FP8, NVFP4, W4A16_NVFP4, MIXED_PRECISION"


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        ({"quant_method": "compressed-tensors"}, "quant_method = 'compressed-tensors'; supported are fp8 and modelopt"),
        ({"quant_method": "awq"}, "quant_method = 'awq'; supported are fp8 and modelopt"),
        ({"quant_method": "fp8"}, "weight_block_size = None; supported are blocks of [128, 128]"),
        (
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            "weight_block_size = [64, 64]; supported are blocks of [128, 128]",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
            f"quant_algo = 'FP8_PER_CHANNEL_PER_TOKEN'; {SUPPORTED}",
        ),
        ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, f"quant_algo = 'fp8_pb_wo'; {SUPPORTED}"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32},
            "group_size = 32; supported are groups of 16",
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": 3}, "ignore = 3; allowed is a list of names"),
        ({"quant_method": "modelopt", "quantized_layers": [1]}, "quantized_layers = [1]; allowed is an object"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(
    tiny_of: Callable[[str], Tiny], tmp_path: Path, declared: dict[str, Any], sentence: str
) -> None:
    path = edit_config(tiny_of("fp8").path, tmp_path, quantization_config=declared)
    with pytest.raises(ValueError, match=f"^{re.escape(f'config.json has quantization_config.{sentence}')}$"):
        load_family(path).check()


def test_wrong_entries_of_the_other_file_are_named(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    path = edit_config(tiny_of("fp8").path, tmp_path)
    for quantization, sentence in (
        (
            {"quantized_layers": {"a.b": {"quant_algo": "INT4_AWQ"}}},
            "lists a.b with quant_algo = 'INT4_AWQ'; supported",
        ),
        ("FP8", "has quantization = 'FP8'; allowed is an object"),
    ):
        (path / QUANTIZATION).write_text(json.dumps({"quantization": quantization}))
        with pytest.raises(ValueError, match=f"^{re.escape(f'hf_quant_config.json {sentence}')}"):
            load_family(path).check()
