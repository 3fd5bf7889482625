"""The script writes the checkpoint that throughput benchmarks use: random bf16 weights in the public format.

    python -m benchmarks.shape /tmp/shape      # then: expertmesh up --model /tmp/shape --dtype bfloat16

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
from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedTokenizerFast

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
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
STD = 0.02
LEAST_STEP, LARGEST_STEP = 1e-3, 0.1  # range of the initial Δ in Mamba-2's training
LARGEST_DECAY = 16.0  # largest initial A in Mamba-2's training


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw a parameter's initial value in fp32: matrices from N(0, STD²), and A and Δ as before Mamba-2's training."""
    if name.endswith("A_log"):
        return (1 + (LARGEST_DECAY - 1) * torch.rand(shape, generator=generator)).log()
    if name.endswith("dt_bias"):
        low, high = math.log(LEAST_STEP), math.log(LARGEST_STEP)
        step = (low + (high - low) * torch.rand(shape, generator=generator)).exp()
        return step + (-(-step).expm1()).log()  # the inverse of softplus
    if name.endswith((".D", "norm.weight", "norm_f.weight")):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    fan_in = 1 / math.sqrt(shape[-1]) if "conv1d" in name else STD
    return fan_in * torch.randn(shape, generator=generator)


def make_model(seed: int) -> NemotronHForCausalLM:
    """Return the transformers model. Its weights are bf16, but the router's correction bias is fp32."""
    model = NemotronHForCausalLM(NemotronHConfig(**CONFIG))
    model.train(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        is_bias = name.endswith("e_score_correction_bias")
        parameter.data = draw(name, parameter.shape, generator).to(torch.float32 if is_bias else torch.bfloat16)
    return model


def extended_tokenizer(vocab_size: int) -> Tokenizer:
    """Return the demo's tokenizer with new token ids. Each new id has its own text; no text is encoded to a new id."""
    raw = json.loads((DEMO / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    first = max(vocabulary.values()) + 1
    vocabulary.update({f"Ġw{token_id}": token_id for token_id in range(first, vocab_size)})
    return Tokenizer.from_str(json.dumps(raw))


def write_shape(out: Path, seed: int = 0) -> int:
    """Write the model directory and return the model's number of parameters."""
    out.mkdir(parents=True, exist_ok=True)
    model = make_model(seed)
    model.save_pretrained(out)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = extended_tokenizer(CONFIG["vocab_size"])
    length = CONFIG["max_position_embeddings"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **tokens)  # type: ignore[no-untyped-call]
    fast.save_pretrained(out)
    (out / "chat_template.jinja").write_text((DEMO / "chat_template.jinja").read_text())
    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    return sum(parameter.numel() for parameter in model.parameters())


def num_active(num_parameters: int) -> int:
    """Return how many of the model's `num_parameters` parameters one token uses.

    A token uses only the routed experts that it picks, and only its own row of the embedding.
    """
    num_layers = CONFIG["hybrid_override_pattern"].count("E")
    per_expert = 2 * CONFIG["moe_latent_size"] * CONFIG["moe_intermediate_size"]
    num_idle = CONFIG["n_routed_experts"] - CONFIG["num_experts_per_tok"]
    return int(num_parameters - num_layers * num_idle * per_expert - CONFIG["vocab_size"] * CONFIG["hidden_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the checkpoint of the measured shape.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = write_shape(args.out, args.seed)
    print(f"{args.out}: {count / 1e6:.1f} M parameters, {num_active(count) / 1e6:.1f} M active per token")


if __name__ == "__main__":
    main()
