"""The script writes the checkpoint that throughput benchmarks use: random bf16 weights in the public format.

    python -m benchmarks.shape /tmp/shape      # then: expertmesh up --model /tmp/shape --dtype bfloat16
    python -m benchmarks.shape /tmp/shape --family qwen3_next

The library transformers writes the weights. Therefore transformers, Expertmesh and llama.cpp's converter can all read
the files. Two runs with the same seed write the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from model.configs.registry import parse_config
from model.demo import DEMO

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EME",
    "num_hidden_layers": 16,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "expand": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_latent_size": 256,
    "moe_intermediate_size": 512,
    "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 1024,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "num_nextn_predict_layers": 0,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "use_bias": False,
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "time_step_min": 1e-30,  # transformers uses this value as a lower bound of Δ, but the model family has no bound
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
DEEPSEEK: dict[str, Any] = {  # as Moonlight, but with a projection of the queries in two steps and groups of experts
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 224,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
QWEN: dict[str, Any] = {  # as Qwen3-Coder-Next, but with half of the width and a sixth of the layers
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 192,
    "shared_expert_intermediate_size": 192,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "attention_bias": False,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
SHAPES = {"nemotron_h": CONFIG, "deepseek_v3": DEEPSEEK, "qwen3_next": QWEN}  # by family
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
STD = 0.02
LEAST_STEP, LARGEST_STEP = 1e-3, 0.1  # range of the initial Δ in Mamba-2's training
LARGEST_DECAY = 16.0  # largest initial A in Mamba-2's training


def draw(name: str, shape: torch.Size, generator: torch.Generator, is_zero_centred: bool) -> Tensor:
    """Draw a parameter's initial value in fp32: matrices from N(0, STD²), and A and Δ as before Mamba-2's training.

    If `is_zero_centred` is True, the scale of the norms is 1 + weight, except in DeltaNet layers.
    """
    if name.endswith("A_log"):
        return (1 + (LARGEST_DECAY - 1) * torch.rand(shape, generator=generator)).log()
    if name.endswith("dt_bias"):
        low, high = math.log(LEAST_STEP), math.log(LARGEST_STEP)
        step = (low + (high - low) * torch.rand(shape, generator=generator)).exp()
        return step + (-(-step).expm1()).log()  # the inverse of softplus
    if name.endswith((".D", "norm.weight", "norm_f.weight")):
        return torch.zeros(shape) if is_zero_centred and "linear_attn" not in name else torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    fan_in = 1 / math.sqrt(shape[-1]) if "conv1d" in name else STD
    return fan_in * torch.randn(shape, generator=generator)


def make_model(config: dict[str, Any], seed: int) -> PreTrainedModel:
    """Return the transformers model. Its weights are bf16, but the router's correction bias is fp32."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.train(False)
    generator, is_zero_centred = torch.Generator().manual_seed(seed), config["model_type"] == "qwen3_next"
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        parameter.data = draw(name, parameter.shape, generator, is_zero_centred).to(dtype)
    return model


def extended_tokenizer(vocab_size: int) -> Tokenizer:
    """Return the demo's tokenizer with new token ids. Each new id has its own text; no text is encoded to a new id."""
    raw = json.loads((DEMO / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    first = max(vocabulary.values()) + 1
    vocabulary.update({f"Ġw{token_id}": token_id for token_id in range(first, vocab_size)})
    return Tokenizer.from_str(json.dumps(raw))


def write_shape(out: Path, family: str = "nemotron_h", seed: int = 0) -> int:
    """Write the model directory and return the model's number of parameters."""
    out.mkdir(parents=True, exist_ok=True)
    config = SHAPES[family]
    model = make_model(config, seed)
    model.save_pretrained(out)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = extended_tokenizer(config["vocab_size"])
    length = config["max_position_embeddings"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **tokens)  # type: ignore[no-untyped-call]
    fast.save_pretrained(out)
    (out / "chat_template.jinja").write_text((DEMO / "chat_template.jinja").read_text())
    for name, value in (("config.json", config), ("generation_config.json", GENERATION_CONFIG)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    return sum(parameter.numel() for parameter in model.parameters())


def num_active(num_parameters: int, family: str) -> int:
    """Return how many of the model's `num_parameters` parameters one token uses.

    A token uses only the routed experts that it picks, and only its own row of the embedding.
    """
    config = parse_config(SHAPES[family])
    num_idle = sum((shape.num_experts - shape.top_k) * shape.num_params for shape in config.expert_shapes)
    return num_parameters - num_idle - config.vocab_size * config.hidden_size


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the checkpoint of the measured shape.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=SHAPES, default="nemotron_h")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = write_shape(args.out, args.family, args.seed)
    active = num_active(count, args.family)
    print(f"{args.out}: {count / 1e6:.1f} M parameters, {active / 1e6:.1f} M active per token")


if __name__ == "__main__":
    main()
