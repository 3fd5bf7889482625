"""`write_qwen` writes tiny random checkpoints of the Qwen3-Next family with transformers, and adds the MTP module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from model.configs.declared_formats import declarations
from model.configs.model_files import QUANTIZATION, SINGLE
from model.configs.weight_format import WeightFormat
from model.encoder import encode_tensors, linear_modules
from tests.model.checkpoints import Tiny, edit, edit_config
from tests.model.oracles import dequantized

BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 5,
    "full_attention_interval": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen": {},
    "qwen_sparse": {  # only layer 1 has experts; transformers' dialect of the config
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "linear_conv_kernel_dim": 3,
        "linear_num_value_heads": 2,
    },
    "qwen_odd": {  # most numbers odd, and an epsilon that is heard
        "hidden_size": 61,
        "head_dim": 18,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "linear_conv_kernel_dim": 2,
        "linear_key_head_dim": 12,  # the compiled kernels support only multiples of 16
        "linear_value_head_dim": 7,
        "linear_num_key_heads": 3,
        "moe_intermediate_size": 37,
        "shared_expert_intermediate_size": 33,
        "num_experts": 7,
        "rms_norm_eps": 0.1,
    },
    "qwen_fp8": {  # sizes that are no multiples of 128, so that the last blocks are smaller
        "num_hidden_layers": 3,
        "hidden_size": 160,
        "intermediate_size": 200,
        "linear_key_head_dim": 32,
        "moe_intermediate_size": 136,
        "shared_expert_intermediate_size": 144,
    },
    "qwen_nvfp4": {"moe_intermediate_size": 48},  # as NVIDIA's checkpoints, whose MTP module is plain
}
DRAFTING = ("qwen", "qwen_odd", "qwen_fp8", "qwen_nvfp4")
QUANTIZED = ("qwen_fp8", "qwen_nvfp4")
RE_SAVED = "qwen_sparse"  # the variant with the config as transformers writes it
THETA, ROTATED = 5e6, {"qwen_odd": 4 / 18}  # share of a head that is rotated, if it is not a quarter
PLAIN = ("in_proj_ba", "gate", "conv1d", "mtp.fc", "lm_head", "embed_tokens")  # ends of modules that FP8 leaves plain


def rotated_share(name: str) -> float:
    return ROTATED.get(name, 0.25)


def scramble_qwen(model: Qwen3NextForCausalLM, generator: torch.Generator) -> None:
    """Set random weights that are large enough for every part of the model to influence the logits."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(value.shape, generator=generator)
        if "inv_freq" in name:
            continue
        if name.endswith("A_log"):
            value.data = noise - 2  # decays between 0.3 and 0.99 per token: the state remembers earlier tokens
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            value.data = 1 + noise / 4
        elif "conv1d" in name:
            value.data = noise / 2
        elif value.dim() >= 2:
            value.data = noise / value.shape[-1] ** 0.5
        else:
            value.data = noise / 4  # the other norms, whose scale is 1 + weight


def write_qwen(path: Path, name: str, **changes: Any) -> Tiny:
    """Write the checkpoint of variant `name`, with `changes` to its config, to `path`.

    Every call with the same arguments writes the same weights.
    """
    raw = BASE | VARIANTS[name] | changes
    rope = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": rotated_share(name)}
    generator = torch.Generator().manual_seed(list(VARIANTS).index(name))
    oracle = Qwen3NextForCausalLM(Qwen3NextConfig(**raw, rope_parameters=rope))
    scramble_qwen(oracle, generator)
    if raw["tie_word_embeddings"]:
        oracle.tie_weights()
    oracle.save_pretrained(path)
    edit(path, path, lambda tensors: shrink_keys(tensors, raw))
    if name in DRAFTING:
        edit(path, path, lambda tensors: tensors.update(mtp_tensors(raw, rope, generator)))
    if name != RE_SAVED:  # the public dialect has no list of layers, and the settings of RoPE beside the other keys
        flat = {"rope_theta": THETA, "partial_rotary_factor": rotated_share(name), "rope_scaling": None}
        interval = raw["full_attention_interval"]
        edit_config(path, path, **flat, rope_parameters=None, layer_types=None, full_attention_interval=interval)
    plain = quantize(path, name) if name in QUANTIZED else path
    oracle = Qwen3NextForCausalLM.from_pretrained(plain, dtype=torch.float32)
    oracle.train(False)
    oracle.set_experts_implementation("eager")
    oracle.generation_config.eos_token_id = None
    return Tiny(name, path, plain, oracle, raw)


def shrink_keys(tensors: dict[str, Tensor], raw: dict[str, Any]) -> None:
    """Make the first key head of layer 0 so small that the epsilon of its length is heard."""
    first, size = raw["linear_num_key_heads"] * raw["linear_key_head_dim"], raw["linear_key_head_dim"]
    tensors["model.layers.0.linear_attn.conv1d.weight"][first : first + size] *= 3e-4


def mtp_tensors(raw: dict[str, Any], rope: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Return random tensors of an MTP module, which is a layer with full attention, under the public names."""
    one_layer = raw | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    module = Qwen3NextForCausalLM(Qwen3NextConfig(**one_layer, rope_parameters=rope))
    scramble_qwen(module, generator)
    hidden, tensors = raw["hidden_size"], dict[str, Tensor]()
    for name, value in module.model.layers[0].state_dict().items():
        if name == "mlp.experts.gate_up_proj":
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                tensors[f"mtp.layers.0.mlp.experts.{e}.gate_proj.weight"] = gate.clone()
                tensors[f"mtp.layers.0.mlp.experts.{e}.up_proj.weight"] = up.clone()
        elif name == "mlp.experts.down_proj":
            tensors |= {f"mtp.layers.0.mlp.experts.{e}.down_proj.weight": down.clone() for e, down in enumerate(value)}
        else:
            tensors[f"mtp.layers.0.{name}"] = value.clone()
    tensors["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) / (2 * hidden) ** 0.5
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        tensors[f"mtp.{name}.weight"] = torch.randn(hidden, generator=generator) / 4
    return tensors


def format_of(name: str, module: str) -> WeightFormat:
    """Return the format of a module's weight in the quantized variant `name`."""
    if name == "qwen_fp8":
        return "plain" if module.endswith(PLAIN) else "fp8_blocks"
    is_quantized = ".experts." in module or ".shared_expert." in module or module.endswith(("o_proj", "out_proj"))
    return "nvfp4" if is_quantized and not module.startswith("mtp.") else "plain"


def quantize(path: Path, name: str) -> Path:
    """Quantize a one-file checkpoint in place as variant `name`; return a directory with the dequantized weights."""
    tensors = load_file(path / SINGLE)
    modules = linear_modules(tensors)
    formats = {module: format for module in modules if (format := format_of(name, module)) != "plain"}
    exact = {key: value.float() for key, value in tensors.items()}
    tensors = encode_tensors(tensors, formats)
    exact |= {f"{module}.weight": dequantized(tensors, module) for module in formats}
    plain = edit(path, path / "plain", lambda own: (own.clear(), own.update(exact)))
    save_file(tensors, path / SINGLE)
    declared, hf_quant_config = declarations(formats, modules)
    edit_config(path, path, quantization_config=declared)
    if hf_quant_config is not None:
        (path / QUANTIZATION).write_text(json.dumps(hf_quant_config))
    return plain
