"""The script writes the demo model in the public checkpoint format and measures the model on the held-out files.

    python -m model.demo.export        # exports the training run's last saved state; trains nothing

Legend: B sequences, T tokens of each, V vocabulary, E experts.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.checkpoint import Checkpoint
from model.configs.nemotron_h import NemotronHConfig
from model.demo import DEMO
from model.demo.corpus import EOS, IM_END, encode_all, read_corpus, train_tokenizer, xz_bits_per_byte
from model.demo.sequence import TrainableExperts, sequence_draft, sequence_hidden
from model.families.nemotron_h import NemotronH, NemotronHFamily, expert_tensor_name, tensor_name

PREFIX = "backbone."
CHAT_TEMPLATE = DEMO / "chat_template.jinja"
CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 2048,
    "hidden_size": 256,
    "hybrid_override_pattern": "MEMEM*EMEMEM*E",
    "num_hidden_layers": 14,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 64,
    "expand": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "moe_latent_size": 64,
    "moe_intermediate_size": 192,
    "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 384,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "use_bias": False,
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    # tiny, because transformers uses the value as a lower bound of Δ, and Nemotron has no lower bound
    "time_step_min": 1e-30,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG = {
    "bos_token_id": 1,
    "eos_token_id": [EOS, IM_END],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 0.95,
}


def public_tensors(model: NemotronH, experts: TrainableExperts) -> dict[str, Tensor]:
    """Return the weights under their public names in bf16, except the router's correction bias, which stays fp32."""
    tensors = {}
    for name, value in model.state_dict().items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        tensors[tensor_name(name, PREFIX)] = value.detach().cpu().to(dtype).contiguous()
    for layer, (up_EML, down_ELM) in experts.weights.items():
        for expert, matrices in enumerate(zip(up_EML, down_ELM, strict=True)):
            for matrix_name, matrix in zip(("up", "down"), matrices, strict=True):
                name = expert_tensor_name(model.config, layer, expert, matrix_name, PREFIX)
                tensors[name] = matrix.detach().cpu().to(torch.bfloat16).contiguous()
    return tensors


def write_checkpoint(model: NemotronH, experts: TrainableExperts, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(public_tensors(model, experts), out / "model.safetensors", metadata={"format": "pt"})
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    length = CONFIG["max_position_embeddings"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **tokens)  # type: ignore[no-untyped-call]
    fast.save_pretrained(out)
    (out / CHAT_TEMPLATE.name).write_bytes(CHAT_TEMPLATE.read_bytes())
    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")


def load_for_measuring(path: Path) -> tuple[NemotronH, TrainableExperts]:
    """Load a model directory into the modules that training uses, with all weights as fp32."""
    family = NemotronHFamily(Checkpoint(path))
    experts = TrainableExperts(family.config, "cpu")
    model = NemotronH(family.config, experts)
    weights = {}
    for name, value in model.state_dict().items():
        tensor_name, shape = family.tensor_name(name), tuple(value.shape)
        if len(shape) == 2:
            weights[name] = family.checkpoint.matrix(tensor_name, (shape[0], shape[1])).dequantized().float()
        else:
            weights[name] = family.checkpoint.plain_tensor(tensor_name, shape).float()
    model.load_state_dict(weights)
    with torch.no_grad():
        for layer, (up_EML, down_ELM) in experts.weights.items():
            for expert in range(len(up_EML)):
                matrices = family.load_expert(layer, expert)
                up_EML[expert] = matrices["up"].dequantized()
                down_ELM[expert] = matrices["down"].dequantized()
    return model, experts


@torch.no_grad()
def measure(
    model: NemotronH,
    experts: TrainableExperts,
    tokenizer: Tokenizer,
    texts: list[str],
    length: int = 1024,
    context: int = 256,
) -> dict[str, Any]:
    """Measure next-token loss, bits per byte, the share of accepted first drafts, and each layer's use of its experts.

    The model reads the text in windows of `length` tokens. Each window starts with the last `context` tokens of the
    window before as context, which is not scored again. The model always reads the true text, never its own tokens, and
    computes in fp32 with the stored weights.
    """
    tokens = torch.from_numpy(encode_all(tokenizer, texts))
    nats, num_scored, accepted, num_drafts = 0.0, 0, 0, 0
    experts.counts.clear()
    for start in range(0, len(tokens) - context - 1, length - context):
        ids_BT = tokens[start : start + length][None]
        if pad := -ids_BT.shape[1] % model.config.chunk_align:
            ids_BT = F.pad(ids_BT, (0, pad), value=0)
        first, last = (0 if start == 0 else context - 1), ids_BT.shape[1] - pad - 1
        hidden = sequence_hidden(model, ids_BT)
        logits = model.logits(hidden)[0]
        losses = F.cross_entropy(logits[first:last], ids_BT[0, first + 1 : last + 1], reduction="sum")
        nats, num_scored = nats + float(losses), num_scored + last - first
        draft = model.logits(sequence_draft(model, F.pad(ids_BT[:, 1:], (0, 1)), hidden))[0].argmax(-1)
        hits = draft[first : last - 1] == logits.argmax(-1)[first + 1 : last]
        accepted, num_drafts = accepted + int(hits.sum()), num_drafts + len(hits)
    num_bytes = len("".join(texts).encode())
    return {
        "held_out_files": len(texts),
        "held_out_bytes": num_bytes,
        "bytes_per_token": num_bytes / len(tokens),
        "nats_per_token": nats / num_scored,
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "xz_9_bits_per_byte": xz_bits_per_byte(texts),
        "first_draft_accepted": accepted / num_drafts,
        "layers": {
            str(layer): {
                "balancedness": float(counts_E.float().mean() / counts_E.max()),
                "least_used_share_of_mean": float(counts_E.min() / counts_E.float().mean()),
            }
            for layer, counts_E in sorted(experts.counts.items())
        },
    }


def export(
    model: NemotronH,
    experts: TrainableExperts,
    tokenizer: Tokenizer,
    held_out: list[str],
    log: list[tuple[int, float, float]],
    out: Path,
) -> None:
    """Write the model directory `out`, with the measured figures in the file `metrics.json`."""
    write_checkpoint(model, experts, tokenizer, out)
    with torch.no_grad():
        for parameter in [*model.parameters(), *experts.parameters()]:
            parameter.copy_(parameter.bfloat16())
    recent = np.array(log[-50:]).mean(0)
    training = {"steps": len(log), "nats_per_token": recent[1], "first_draft_accepted": recent[2]}
    metrics = {"training_last_50_steps": training, "held_out": measure(model, experts, tokenizer, held_out)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics["held_out"], indent=2))


def restore(path: Path, model: NemotronH, experts: TrainableExperts) -> dict[str, Any]:
    """Load the weights of a saved training state into `model` and `experts`, and return the whole training state."""
    state: dict[str, Any] = torch.load(path, weights_only=False, map_location="cpu")
    model.load_state_dict(state["model"])
    for parameter, value in zip(experts.parameters(), state["experts"], strict=True):
        parameter.data.copy_(value)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description="Export the demo model from its training state.")
    parser.add_argument("--work", type=Path, default=Path("/tmp/expertmesh-demo"))
    parser.add_argument("--out", type=Path, default=DEMO)
    args = parser.parse_args()
    config = NemotronHConfig.from_json(CONFIG)
    experts = TrainableExperts(config, "cpu")
    model = NemotronH(config, experts)
    state = restore(args.work / "state.pt", model, experts)
    training, held_out = read_corpus()
    export(model, experts, train_tokenizer(training), held_out, state["log"], args.out)


if __name__ == "__main__":
    main()
