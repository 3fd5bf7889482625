"""The functions here write tiny random checkpoints of DeepSeek-V3 with transformers, in the public dialects.

Every variant also has an MTP module or a reason why it has none, and together they have every switch of the family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from model.checkpoint import SINGLE
from model.configs.declared_formats import declarations
from model.configs.weight_format import WeightFormat
from model.encoder import encode_tensors, linear_modules
from tests.model.checkpoints import Tiny, edit, edit_config, several_files
from tests.model.oracles import dequantized

BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 88,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 48,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 12,
    "qk_nope_head_dim": 20,
    "v_head_dim": 28,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
NO_YARN = {"rope_type": "default", "rope_theta": 50_000.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek": {"rope_parameters": YARN},
    "deepseek_moonlight": {  # as Moonlight: one projection of the queries, one group, no YaRN and no MTP module
        "rope_parameters": NO_YARN,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "rms_norm_eps": 1e-5,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_odd": {  # every number odd, a rotated part that is no multiple of 4, and an epsilon that is heard
        "rope_parameters": YARN | {"factor": 7.0, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 3, "beta_slow": 2},
        "vocab_size": 257,
        "hidden_size": 61,
        "intermediate_size": 37,
        "moe_intermediate_size": 29,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "n_shared_experts": 3,
        "n_routed_experts": 15,
        "n_group": 5,
        "topk_group": 3,
        "kv_lora_rank": 35,
        "q_lora_rank": 23,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 9,
        "v_head_dim": 11,
        "norm_topk_prob": False,
        "rms_norm_eps": 0.1,
    },
    "deepseek_tied": {  # rare settings: a tied head, half-split rotation, one magnitude, no dense layer
        "rope_parameters": YARN | {"mscale_all_dim": None},
        "tie_word_embeddings": True,
        "rope_interleave": False,
        "first_k_dense_replace": 0,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "deepseek_fp8": {  # sizes that are no multiples of 128, so that the last blocks are smaller
        "rope_parameters": YARN,
        "hidden_size": 160,
        "intermediate_size": 136,
        "moe_intermediate_size": 144,
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "kv_lora_rank": 136,
        "q_lora_rank": 132,
        "qk_nope_head_dim": 32,
        "v_head_dim": 40,
    },
}
DRAFTING = ("deepseek", "deepseek_odd", "deepseek_tied", "deepseek_fp8")
QUANTIZED = ("deepseek_fp8",)
TINY_LATENTS = "deepseek_moonlight"  # variant in which the epsilon of the latents' norm matters
SEVERAL_FILES = "deepseek_moonlight"
NESTED = ("deepseek_odd",)  # the variant with the config of transformers 5; the others have the public dialect


def write_deepseek(path: Path, name: str, **changes: Any) -> Tiny:
    """Write the checkpoint of variant `name`, with `changes` to its config, to `path`.

    Every call with the same arguments writes the same weights.
    """
    raw = BASE | VARIANTS[name] | changes
    generator = torch.Generator().manual_seed(list(VARIANTS).index(name))
    oracle = make_model(raw, generator)
    if name == TINY_LATENTS:
        for layer in oracle.model.layers:
            layer.self_attn.kv_a_proj_with_mqa.weight.data[: raw["kv_lora_rank"]] *= 0.003
    if raw["tie_word_embeddings"]:
        oracle.lm_head.weight = oracle.model.embed_tokens.weight
    oracle.save_pretrained(path)
    edit(path, path, lambda tensors: tensors.update(extra_tensors(tensors, name, raw, generator)))
    rewrite_config(path, name, raw)
    plain = path
    if name in QUANTIZED:
        plain = quantize(path)
        oracle = DeepseekV3ForCausalLM.from_pretrained(plain, dtype=torch.float32)
    if name == SEVERAL_FILES:
        several_files(path, path, 3)
    oracle.train(False)
    oracle.set_experts_implementation("eager")  # torch's grouped products do not support odd sizes
    oracle.generation_config.eos_token_id = None
    return Tiny(name, path, plain, oracle, raw)


def make_model(raw: dict[str, Any], generator: torch.Generator) -> DeepseekV3ForCausalLM:
    """Return a model with random weights that are large enough for every part to influence the logits."""
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(raw | {"rope_parameters": dict(raw["rope_parameters"])})))
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(value.shape, generator=generator)
        if "e_score_correction_bias" in key:
            # A score plus its correction is negative, so a mask of 0 would let experts of other groups in.
            value.data = noise / 8 - 0.9
        elif value.dim() >= 2:
            value.data = noise / value.shape[-1] ** 0.5
        elif "norm" in key:
            value.data = 1 + noise / 4
    return model


def extra_tensors(
    tensors: dict[str, Tensor], name: str, raw: dict[str, Any], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the tensors of the MTP module, if the variant has one, and tensors that a reader must skip."""
    extra = {}
    if name in DRAFTING:
        place, dim = f"model.layers.{raw['num_hidden_layers']}", raw["hidden_size"]
        one_layer = make_model(raw | {"num_hidden_layers": 1, "first_k_dense_replace": 0}, generator)
        own = public_tensors(one_layer)
        extra = {
            key.replace("model.layers.0", place): value
            for key, value in own.items()
            if key.startswith("model.layers.0.")
        }
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            extra[f"{place}.{norm}.weight"] = 1 + torch.randn(dim, generator=generator) / 4
        extra[f"{place}.eh_proj.weight"] = torch.randn(dim, 2 * dim, generator=generator) / (2 * dim) ** 0.5
        # The copies hold other numbers than the originals, so a reader that takes them computes something else.
        extra[f"{place}.embed_tokens.weight"] = torch.randn(raw["vocab_size"], dim, generator=generator)
        extra[f"{place}.shared_head.head.weight"] = torch.randn(raw["vocab_size"], dim, generator=generator)
    for layer in range(raw["num_hidden_layers"]):
        extra[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(raw["qk_rope_head_dim"] // 2)
    if raw["tie_word_embeddings"]:
        extra["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return extra


def public_tensors(model: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    """Return the weights as transformers saves them, with one tensor for each matrix of each expert."""
    found = {}
    for key, value in model.state_dict().items():
        place = key.removesuffix(".gate_up_proj").removesuffix(".down_proj")
        if ".mlp.experts." not in key:
            found[key] = value
        elif key.endswith("gate_up_proj"):
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                found[f"{place}.{e}.gate_proj.weight"], found[f"{place}.{e}.up_proj.weight"] = gate.clone(), up.clone()
        else:
            found |= {f"{place}.{e}.down_proj.weight": down.clone() for e, down in enumerate(value)}
    return found


def rewrite_config(path: Path, name: str, raw: dict[str, Any]) -> None:
    """Write the config in the dialect of the public files, unless the variant keeps the dialect of transformers 5."""
    public = {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
    }
    if name in NESTED:
        return
    rope = dict(raw["rope_parameters"])
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    scaling = None if kind == "default" else {"type": kind, **rope}
    edit_config(path, path, **public, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)


def quantize(path: Path) -> Path:
    """Quantize a checkpoint in place to FP8 blocks, and return a directory with the dequantized weights in fp32."""
    tensors = load_file(path / SINGLE)
    modules = linear_modules(tensors)
    left = ("mlp.gate", "eh_proj", "embed_tokens", "shared_head.head")
    formats: dict[str, WeightFormat] = {module: "fp8_blocks" for module in modules if not module.endswith(left)}
    plain = path / "plain"
    stored = encode_tensors({key: value.bfloat16() for key, value in tensors.items()}, formats)
    exact = {key: value.float() for key, value in stored.items() if not key.endswith("_scale_inv")}
    exact |= {f"{module}.weight": dequantized(stored, module) for module in formats}
    edit(path, plain, lambda own: (own.clear(), own.update(exact)))
    save_file(stored, path / SINGLE)
    declared, _ = declarations(formats, modules)
    declared.pop("modules_to_not_convert")  # DeepSeek's config does not list them
    edit_config(path, path, quantization_config=declared)
    return plain
