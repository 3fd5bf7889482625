"""The tests check which tensors are read from a model directory, and the errors for every kind of broken directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import kernels
from model.blocks.expert_bank import ExpertBank
from model.checkpoint import Checkpoint
from model.configs.model_files import INDEX, SINGLE
from model.encoder import encode_tensors
from model.families.nemotron_h import NemotronH
from model.families.registry import load_family
from tests.model.checkpoints import SEVERAL_FILES, TIED, Tiny, edit
from tests.model.conftest import load_fp32
from tests.model.steps import full_logits, random_tokens


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each read of a tensor appends the tensor's name."""
    names: list[str] = []
    read = Checkpoint.tensor

    def spy(self: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        names.append(name)
        return read(self, name, shape)

    monkeypatch.setattr(Checkpoint, "tensor", spy)
    return names


def no_experts(layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
    raise AssertionError("these tests load models, but run none")


def test_the_backbone_reads_no_routed_expert(latent: Tiny, reads: list[str]) -> None:
    family = load_family(latent.path)
    family.load_backbone(no_experts, torch.float32)
    assert reads
    assert not [name for name in reads if ".experts." in name]
    assert len(reads) == len(set(reads))
    assert {name for name in family.checkpoint.names if ".experts." not in name} == set(reads)


@pytest.mark.parametrize("name", ["latent", TIED, "fp8_blocks", "nvfp4"])
def test_the_check_reads_no_numbers(tiny_of: Callable[[str], Tiny], name: str, reads: list[str]) -> None:
    load_family(tiny_of(name).path).check()
    assert reads == []


def test_a_shard_reads_only_its_own_experts(latent: Tiny, reads: list[str]) -> None:
    family = load_family(latent.path)
    shape = family.expert_shapes[1]
    bank = ExpertBank(shape, torch.float32)
    for expert in (2, 5):
        bank.load(expert, family.load_expert(shape.layer, expert))
    assert bank.held == {2, 5}
    assert bank.nbytes == 2 * shape.nbytes(torch.float32) == 2 * 4 * 2 * 32 * 48
    assert sorted(reads) == [
        f"backbone.layers.4.mixer.experts.{expert}.{part}_proj.weight" for expert in (2, 5) for part in ("down", "up")
    ]


def test_only_the_files_that_are_needed_are_opened(tiny_of: Callable[[str], Tiny]) -> None:
    path = tiny_of(SEVERAL_FILES).path
    assert len(list(path.glob("*.safetensors"))) > 3
    checkpoint = Checkpoint(path)
    tensor = checkpoint.tensor("backbone.norm_f.weight")
    assert tensor.shape == (64,)
    assert len(checkpoint._open) == 1


@pytest.mark.parametrize("prefix", ["model.", "language_model.backbone.", "language_model.model."])
def test_other_prefixes_are_the_same_model(latent: Tiny, tmp_path: Path, prefix: str) -> None:
    root = prefix.removesuffix("backbone.").removesuffix("model.")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            new = prefix + name.removeprefix("backbone.") if name.startswith("backbone.") else root + name
            tensors[new] = tensors.pop(name)

    tokens = random_tokens(9)
    renamed, original = load_family(edit(latent.path, tmp_path, rename)), load_family(latent.path)
    assert renamed.has_mtp
    assert torch.equal(full_logits(load_fp32(renamed), tokens), full_logits(load_fp32(original), tokens))


def fails(path: Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_fp32(load_family(path))


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mixer.A_log",
        "layers.1.mixer.gate.e_score_correction_bias",
        "layers.1.mixer.experts.7.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(latent: Tiny, tmp_path: Path, name: str) -> None:
    path = edit(latent.path, tmp_path, lambda tensors: tensors.pop(f"backbone.{name}"))
    fails(path, f"has no tensor backbone.{name}")


def test_a_missing_expert_is_named_by_the_backbone_too(latent: Tiny, tmp_path: Path) -> None:
    name = "backbone.layers.4.mixer.experts.0.up_proj.weight"
    family = load_family(edit(latent.path, tmp_path, lambda tensors: tensors.pop(name)))
    with pytest.raises(ValueError, match=f"has no tensor {name}"):
        family.load_backbone(no_experts, torch.float32)


def test_a_head_of_its_own_is_served_although_the_config_ties_it(
    tiny_of: Callable[[str], Tiny], tmp_path: Path
) -> None:
    tied, tokens = tiny_of(TIED).path, random_tokens(9)

    def with_head(change: Callable[[Tensor], Tensor]) -> tuple[NemotronH, Tensor]:
        def add(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.weight"] = change(tensors["backbone.embeddings.weight"])

        family = load_family(edit(tied, tmp_path, add))
        family.check()
        model = load_fp32(family)
        return model, full_logits(model, tokens)

    expected = full_logits(load_fp32(load_family(tied)), tokens)
    equal, logits = with_head(torch.clone)
    assert equal.lm_head is None, "equal weights are kept only once"
    assert torch.equal(logits, expected)
    other, logits = with_head(lambda embeddings: 2 * embeddings)
    assert other.lm_head is not None
    assert torch.allclose(logits, 2 * expected)

    def quantize_embeddings(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].bfloat16()
        tensors.update(encode_tensors(tensors, {"backbone.embeddings": "fp8"}))

    family = load_family(edit(tied, tmp_path, quantize_embeddings))
    family.check()
    assert load_fp32(family).lm_head is not None, "weights of two formats are not equal"
    with pytest.raises(ValueError, match=r"lm_head\.weight .* is \[1, 2\], the config requires"):
        with_head(lambda _: torch.zeros(1, 2))


@pytest.mark.parametrize("is_compiled", [True, False])
def test_quantized_embeddings_are_exact_or_the_log_says_that_they_are_rounded(
    latent: Tiny,
    tmp_path: Path,
    is_compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def quantize_embeddings(tensors: dict[str, Tensor]) -> None:
        tensors.update(encode_tensors(tensors, {"backbone.embeddings": "fp8"}))

    monkeypatch.setattr(kernels, "has_compiled", lambda: is_compiled)
    family = load_family(edit(latent.path, tmp_path, quantize_embeddings))
    exact = family.checkpoint.matrix("backbone.embeddings.weight", (256, 64)).dequantized()
    with caplog.at_level(logging.INFO, logger="model.families.checkpoint_family"):
        model = family.load_backbone(no_experts, torch.bfloat16)
    rows = model.embeddings(torch.arange(256))
    assert torch.equal(rows, exact if is_compiled else exact.bfloat16())
    sentence = "1 quantized weights, among them embeddings.weight, are dequantized and rounded to bfloat16."
    assert [record.message for record in caplog.records] == ([] if is_compiled else [sentence])


def test_missing_embeddings_are_named(latent: Tiny, tmp_path: Path) -> None:
    path = edit(latent.path, tmp_path, lambda tensors: tensors.pop("backbone.embeddings.weight"))
    fails(path, r"has no tensor backbone\.embeddings\.weight")


def test_an_extra_tensor_is_named(latent: Tiny, tmp_path: Path) -> None:
    name = "backbone.layers.3.mixer.q_norm.weight"
    fails(edit(latent.path, tmp_path, lambda tensors: tensors.update({name: torch.zeros(1)})), f"unknown tensor {name}")


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("backbone.norm_f.weight", (63,), r"is \[63\], the config requires \[64\]"),
        (
            "backbone.layers.1.mixer.experts.3.up_proj.weight",
            (32, 48),
            r"is \[32, 48\], the config requires \[48, 32\]",
        ),
        ("mtp.layers.0.eh_proj.weight", (64, 64), r"is \[64, 64\], the config requires \[64, 128\]"),
    ],
)
def test_a_misshapen_tensor_is_named(
    latent: Tiny, tmp_path: Path, name: str, shape: tuple[int, ...], wanted: str
) -> None:
    path = edit(latent.path, tmp_path, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    fails(path, f"tensor {name} in .* {wanted}")


def test_an_expert_that_is_not_there_is_named(latent: Tiny) -> None:
    family = load_family(latent.path)
    for layer, expert in ((0, 0), (1, 8), (9, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"the model has no expert {expert} in layer {layer}"):
            family.load_expert(layer, expert)


@pytest.fixture
def several(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> Path:
    """Return a new copy of a checkpoint with several weight files, so that a test may damage the copy."""
    for file in tiny_of(SEVERAL_FILES).path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_an_absent_file_of_the_index_is_named(several: Path) -> None:
    file = sorted(several.glob("*.safetensors"))[1]
    file.unlink()
    fails(several, f"lacks the file {file.name} that the index names")


def test_a_tensor_that_only_the_index_has_is_named(several: Path) -> None:
    index = json.loads((several / INDEX).read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"]["lm_head.weight"])
    index["weight_map"]["lm_head.weight"] = other
    (several / INDEX).write_text(json.dumps(index))
    fails(several, f"{other} lacks the tensor lm_head.weight that the index names")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", f"{INDEX} is not valid JSON"),
        ("{}", f"{INDEX} has no weight_map"),
        ('{"weight_map": 3}', f"{INDEX} has no weight_map"),
        ('{"weight_map": {"a": 3}}', f"{INDEX} has no weight_map"),
    ],
)
def test_a_broken_index_is_named(several: Path, text: str, sentence: str) -> None:
    (several / INDEX).write_text(text)
    fails(several, sentence)


def test_headers_are_read_only_once(latent: Tiny, tmp_path: Path) -> None:
    checkpoint = Checkpoint(edit(latent.path, tmp_path, lambda tensors: None))
    before = checkpoint.header("lm_head.weight")
    (tmp_path / SINGLE).unlink()
    assert checkpoint.header("lm_head.weight") == before
    with pytest.raises(ValueError, match=r"model\.safetensors can no longer be read"):
        checkpoint.tensor("lm_head.weight")


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"config\.json cannot be read: it is not a text file$"):
        load_family(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read: Is a directory$"):
        load_family(tmp_path)


def test_a_broken_file_is_named(latent: Tiny, tmp_path: Path) -> None:
    file = edit(latent.path, tmp_path, lambda tensors: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    fails(tmp_path, r"model\.safetensors is not a readable safetensors file")
    file.unlink()
    fails(tmp_path, r"has neither model\.safetensors nor model\.safetensors\.index\.json")
