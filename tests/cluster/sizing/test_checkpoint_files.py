"""The tests compare sizes with the tensors of small checkpoints of each family, in each format.

The plain checkpoints are written by transformers. A quantized checkpoint has tensors of zeros, because sizes depend on
dtypes and shapes only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from cluster.sizing.model_sizes import model_sizes
from cluster.sizing.weight_formats import Dtype
from model.configs.model_files import read_json
from model.configs.weight_format import WeightFormat, stored_parts
from model.stored_matrix import CODE_DTYPES
from tests.model.checkpoints import QUANTIZED, write_tiny

DEEPSEEK = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 144,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "q_lora_rank": None,
    "num_nextn_predict_layers": 1,
}
QWEN = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mlp_only_layers": [3],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "full_attention_interval": 3,
    "shared_expert_intermediate_size": 80,
    "tie_word_embeddings": True,
}
Format = Callable[[str], WeightFormat]  # the format of the weight with the given name


def write_plain(path: Path, family: str) -> None:
    if family == "nemotron_h":
        write_tiny(path, "latent")
    elif family == "deepseek_v3":
        DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)).save_pretrained(path)
    else:
        Qwen3NextForCausalLM(Qwen3NextConfig(**QWEN)).save_pretrained(path)


def parts_of(name: str, shape: torch.Size, format: WeightFormat) -> dict[str, Tensor]:
    """Return the tensors of a quantized weight, together with the scale of its inputs."""
    module = name.removesuffix(".weight")
    parts = {
        f"{module}.{part.suffix}": torch.zeros(part.shape, dtype=CODE_DTYPES[part.dtype])
        for part in stored_parts(format, shape[0], shape[1])
    }
    return parts | {f"{module}.input_scale": torch.zeros(())}


def quantize(path: Path, format_of: Format) -> dict[str, Tensor]:
    """Rewrite a checkpoint with the formats that `format_of` gives, and return its tensors."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        format = format_of(name) if tensor.dim() == 2 else "plain"
        tensors |= {name: tensor.bfloat16()} if format == "plain" else parts_of(name, tensor.shape, format)
    save_file(tensors, path / "model.safetensors")
    return tensors


def config_of(path: Path) -> dict[str, Any]:
    return read_json(path / "config.json")


def nemotron_fp8(name: str) -> WeightFormat:
    return "fp8" if ".experts." in name or "shared_experts." in name or "in_proj" in name else "plain"


def nemotron_mixed(name: str) -> WeightFormat:
    """Return formats as in NVIDIA's mixed checkpoint of Super: also two formats in one shared expert."""
    if name.endswith(("layers.1.mixer.shared_experts.down_proj.weight", "lm_head.weight")) or ".experts." in name:
        return "plain" if name.startswith("mtp.") else "nvfp4"
    is_fp8 = name.endswith(("layers.0.mixer.in_proj.weight", "layers.3.mixer.o_proj.weight", "up_proj.weight"))
    return "fp8" if is_fp8 else "plain"


def blocks(name: str) -> WeightFormat:
    skipped = ("gate.weight", "in_proj_ba.weight", "embed_tokens.weight", "lm_head.weight")
    return "plain" if name.endswith(skipped) else "fp8_blocks"


def outputs(name: str) -> WeightFormat:
    return "nvfp4" if "experts." in name or name.endswith(("o_proj.weight", "out_proj.weight")) else "plain"


@pytest.mark.parametrize(
    ("family", "format_of", "dtype"),
    [
        ("nemotron_h", lambda name: "plain", "bf16"),
        ("nemotron_h", nemotron_fp8, "fp8"),
        ("nemotron_h", nemotron_mixed, "nvfp4"),
        ("deepseek_v3", lambda name: "plain", "bf16"),
        ("deepseek_v3", blocks, "fp8"),
        ("deepseek_v3", outputs, "nvfp4"),
        ("qwen3_next", lambda name: "plain", "bf16"),
        ("qwen3_next", blocks, "fp8"),
        ("qwen3_next", outputs, "nvfp4"),
    ],
)
def test_the_bytes_are_those_of_the_tensors(family: str, format_of: Format, dtype: Dtype, tmp_path: Path) -> None:
    """Check bytes in all; without the ignored scales of inputs, they are exact. The configs are as transformers 5's."""
    write_plain(tmp_path, family)
    tensors = quantize(tmp_path, format_of)
    sizes = model_sizes(config_of(tmp_path), tmp_path)
    assert sizes.files is not None
    assert sizes.files.dtype == dtype
    total = sum(tensor.nbytes for tensor in tensors.values())
    ignored = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("input_scale"))
    stored = sizes.stored(dtype)
    assert sizes.files.num_bytes == total
    assert sum(stored.values()) == total - ignored == pytest.approx(total, rel=0.01)
    is_routed = [".experts." in name and "input_scale" not in name for name in tensors]
    routed = sum(tensor.nbytes for tensor, is_one in zip(tensors.values(), is_routed, strict=True) if is_one)
    assert stored["routed"] + stored.get("mtp routed", 0) == routed
    specs = sizes.layer_specs(dtype)
    assert sum(spec.num_experts * spec.expert_bytes for spec in specs) == pytest.approx(routed, rel=1e-3)
    assert sizes.has_mtp == (family == "nemotron_h")  # transformers writes no MTP module.


@pytest.mark.parametrize("variant", QUANTIZED)
def test_the_encoders_checkpoints_have_the_predicted_bytes(variant: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, variant)
    found = [tensor for file in tmp_path.glob("*.safetensors") for tensor in load_file(file).values()]
    sizes = model_sizes(config_of(tmp_path), tmp_path)
    assert sizes.files is not None
    assert sizes.files.dtype == ("fp8" if variant.startswith("fp8") else "nvfp4")
    total = sum(tensor.nbytes for tensor in found)
    assert sum(sizes.stored(sizes.files.dtype).values()) == pytest.approx(total, rel=0.01)


def test_numbers_in_fp32_are_stored_in_fp32_and_held_in_bf16(tmp_path: Path) -> None:
    write_plain(tmp_path, "nemotron_h")
    tensors = load_file(tmp_path / "model.safetensors")
    sizes = model_sizes(config_of(tmp_path), tmp_path)
    assert sum(sizes.stored("bf16").values()) == sum(4 * tensor.numel() for tensor in tensors.values())
    assert sizes.backbone_bytes == model_sizes(config_of(tmp_path)).backbone_bytes


def test_another_dtype_than_the_files_is_a_public_checkpoints(tmp_path: Path) -> None:
    write_plain(tmp_path, "nemotron_h")
    quantize(tmp_path, nemotron_mixed)
    with_files, alone = model_sizes(config_of(tmp_path), tmp_path), model_sizes(config_of(tmp_path))
    assert with_files.stored("fp8") == alone.stored("fp8")
    assert with_files.stored("nvfp4") != alone.stored("nvfp4")


def test_without_all_files_the_config_decides(tmp_path: Path) -> None:
    write_plain(tmp_path, "nemotron_h")
    config = config_of(tmp_path)
    index = {"weight_map": {"a.weight": "model.safetensors", "b.weight": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_sizes(config, tmp_path) == model_sizes(config)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    assert model_sizes(config, tmp_path) == model_sizes(config)


def test_several_files_are_one_checkpoint(tmp_path: Path) -> None:
    write_plain(tmp_path, "nemotron_h")
    whole = model_sizes(config_of(tmp_path), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in {*index.values()}:
        save_file({name: tensors[name] for name in tensors if index[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert model_sizes(config_of(tmp_path), tmp_path) == whole


def changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


PROJECTION = "backbone.layers.0.mixer.in_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda path: changed(path, lambda found: found.pop(PROJECTION)),
            "the checkpoint has 2 of 3 tensors called mixer.in_proj",
        ),
        (
            lambda path: changed(path, lambda found: found.update({PROJECTION: found[PROJECTION].to(torch.int64)})),
            "has the dtype I64; allowed are BF16, F16, F32, F8_E4M3, U8",
        ),
        (
            lambda path: changed(path, lambda found: found.update({PROJECTION: found[PROJECTION].to(torch.uint8)})),
            "has the dtype U8 (NVFP4), but there is no tensor backbone.layers.0.mixer.in_proj.weight_scale",
        ),
        (
            lambda path: changed(path, lambda found: found.update({f"{PROJECTION}_packed": torch.zeros(1)})),
            "is of the layout compressed-tensors, which is not supported",
        ),
        (cut, "is not a readable safetensors file: "),
        (
            lambda path: (path / "model.safetensors.index.json").write_text("[]"),
            "model.safetensors.index.json must hold a JSON object, not a list",
        ),
    ],
)
def test_files_that_cannot_be_sized_are_one_sentence(
    spoil: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    write_plain(tmp_path, "nemotron_h")
    spoil(tmp_path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is compared
        model_sizes(config_of(tmp_path), tmp_path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
