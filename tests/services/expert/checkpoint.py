"""`write_checkpoint` writes a small checkpoint. It has only what a shard reads: a config and routed experts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS = (1, 3)
NUM_EXPERTS, TOP_K, LATENT, WIDTH = 32, 4, 64, 128
CONFIG = {
    "model_type": "nemotron_h",
    "vocab_size": 256,
    "hidden_size": 4 * LATENT,
    "hybrid_override_pattern": "MEME",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_shared_experts": 1,
    "moe_intermediate_size": WIDTH,
    "moe_shared_expert_intermediate_size": 96,
    "moe_latent_size": LATENT,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


def write_checkpoint(path: Path, without: str = "") -> Path:
    """Write a checkpoint to the folder `path` and return `path`; every call writes the same random experts.

    The checkpoint lacks the tensor with the name `without`.
    """
    generator = torch.Generator().manual_seed(7)
    # The model family looks at the name of this tensor, and so finds the prefix of all tensor names.
    tensors = {"backbone.embeddings.weight": torch.zeros(1)}
    for layer in LAYERS:
        for expert in range(NUM_EXPERTS):
            stem = f"backbone.layers.{layer}.mixer.experts.{expert}"
            tensors[f"{stem}.up_proj.weight"] = torch.randn(WIDTH, LATENT, generator=generator) / LATENT**0.5
            tensors[f"{stem}.down_proj.weight"] = torch.randn(LATENT, WIDTH, generator=generator) / WIDTH**0.5
    tensors.pop(without, None)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, path / "model.safetensors")
    return path
