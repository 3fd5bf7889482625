"""`VARIANTS` lists the tiny checkpoints with which the suites run, and `write_tiny` writes them.

The tests of the model run with every variant. The tests of the engine serve the variants in `SERVED`. The models are
those of transformers with random weights; the functions here add the MTP module, which transformers lacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedModel

from model.configs.declared_formats import declarations
from model.configs.model_files import INDEX, QUANTIZATION, SINGLE
from model.configs.weight_format import WeightFormat
from model.encoder import encode_tensors, linear_modules
from tests.model.oracles import dequantized

BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "hybrid_override_pattern": "MEM*EME",
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
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 96,
    "moe_latent_size": 32,
    "routed_scaling_factor": 5.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "mlp_hidden_act": "relu2",
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "latent": {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"},
    "plain": {
        "moe_latent_size": None,
        "n_groups": 1,
        "routed_scaling_factor": 2.5,
    },  # Nano's settings; the checkpoint is written as several files
    "dense": {"hybrid_override_pattern": "M-*EM-", "n_groups": 4, "chunk_size": 16, "use_conv_bias": False},
    "grouped": {
        "n_groups": 4,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "num_key_value_heads": 1,
    },
    "tied": {
        "hybrid_override_pattern": "*MEM",
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "conv_kernel": 3,
        "chunk_size": 5,
        "num_nextn_predict_layers": 1,  # the config asks for an MTP module, but the checkpoint has none
    },
    "biased": {"use_bias": True, "mlp_bias": True, "n_groups": 8, "chunk_size": 32},
    "odd": {
        "hidden_size": 61,
        "head_dim": 9,
        "ssm_state_size": 24,  # the compiled kernels support only multiples of 16
        "mamba_head_dim": 7,
        "n_groups": 4,
        "conv_kernel": 2,
        "chunk_size": 7,
        "moe_intermediate_size": 37,
        "moe_shared_expert_intermediate_size": 33,
        "moe_latent_size": 29,
    },
    "fp8": {},
    "fp8_blocks": {  # sizes that are no multiples of 128, so that the last blocks are smaller
        "hybrid_override_pattern": "EM*E",
        "hidden_size": 160,
        "moe_latent_size": 144,
        "moe_intermediate_size": 136,
        "moe_shared_expert_intermediate_size": 200,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    },
    "nvfp4": {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"},  # three formats, as in Super
    "nvfp4_flat": {"hybrid_override_pattern": "MEM*EMEMMMEM", "moe_latent_size": None},  # as in Nano
    "w4a16": {"hybrid_override_pattern": "M*EME"},  # as in Lightning 3.5, which also quantizes the head
}
SEVERAL_FILES = "plain"
TIED = "tied"
SMALL_STEPS = "tied"  # variant with a Δ far below 0.001, the lower bound of Δ in transformers' chunked path
WITH_MTP = "latent"
DRAFTING = ("latent", "fp8_blocks", "nvfp4")  # the variants with an MTP module, which only `fp8_blocks` quantizes
QUANTIZED = ("fp8", "fp8_blocks", "nvfp4", "nvfp4_flat", "w4a16")
# The variants that the tests of the engine serve, with the dtype of the deployment. The blocks of "odd" run plain
# PyTorch; all blocks of the other variants have compiled kernels.
SERVED: tuple[tuple[str, torch.dtype], ...] = (
    (WITH_MTP, torch.float32),
    (WITH_MTP, torch.bfloat16),
    ("odd", torch.float32),
    *((name, torch.float32) for name in QUANTIZED),
    ("nvfp4", torch.bfloat16),
)


MIXED: dict[tuple[int, str], WeightFormat] = {  # layers and modules of the variant `nvfp4`, beside the routed experts
    (0, "in_proj"): "fp8",
    (2, "out_proj"): "fp8",
    (5, "in_proj"): "fp8",
    (5, "out_proj"): "nvfp4",
    (3, "o_proj"): "fp8",
    (3, "k_proj"): "nvfp4",
    (1, "fc1_latent_proj"): "fp8",
    (4, "fc2_latent_proj"): "fp8",
    (1, "shared_experts.up_proj"): "fp8",
    (1, "shared_experts.down_proj"): "nvfp4",
    (4, "shared_experts.up_proj"): "fp8",
    (6, "shared_experts.down_proj"): "fp8",
}


@dataclass(frozen=True)
class Tiny:
    """A `Tiny` is a checkpoint directory together with a transformers model that has the same weights.

    `plain` is a directory with the exact values of all weights as plain numbers: `path` itself, or if the checkpoint is
    quantized, a directory with the dequantized weights in fp32, because transformers cannot read these formats. `raw`
    is the config as transformers takes it; the config on disk may be in another dialect.
    """

    name: str
    path: Path
    plain: Path
    oracle: PreTrainedModel
    raw: dict[str, Any]

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> Tensor:
        out: Tensor = self.oracle(torch.tensor([token_ids])).logits[0]
        return out

    @torch.no_grad()
    def generate(self, token_ids: list[int], num_tokens: int, has_cache: bool = True) -> list[int]:
        """Return greedy tokens; transformers' cache needs an attention layer, and must be off in models without one."""
        prompt = torch.tensor([token_ids])
        oracle: Any = self.oracle  # transformers' annotations do not type-check
        out = oracle.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            use_cache=has_cache,
        )
        return out[0, len(token_ids) :].tolist()  # type: ignore[no-any-return]


def scramble(model: NemotronHForCausalLM, generator: torch.Generator) -> None:
    """Set random weights that are large enough for every part of the model to influence the logits."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() >= 2:
            value.data = noise / value.shape[-1] ** 0.5
        elif "norm" in name or name.endswith(".D"):
            value.data = 1 + noise / 4
        elif name.endswith(("bias", "A_log")):
            value.data = noise / 4


def write_tiny(path: Path, name: str, **changes: Any) -> Tiny:
    """Write the checkpoint of variant `name`, with `changes` to its config, to `path`.

    Every call with the same arguments writes the same weights.
    """
    generator = torch.Generator().manual_seed(list(VARIANTS).index(name))
    oracle = NemotronHForCausalLM(NemotronHConfig(**(BASE | VARIANTS[name] | changes)))
    scramble(oracle, generator)
    if name == SMALL_STEPS:
        for mixer in mamba_mixers(oracle):
            mixer.dt_bias.data.fill_(-8.0)
    oracle.save_pretrained(path, max_shard_size="60KB" if name == SEVERAL_FILES else "1GB")
    if name == TIED:  # transformers does not tie head and embeddings in this family
        oracle.lm_head.weight = oracle.model.embeddings.weight
        edit(path, path, lambda tensors: tensors.pop("lm_head.weight"))
    if name in DRAFTING:
        edit(path, path, lambda tensors: tensors.update(mtp_tensors(BASE | VARIANTS[name], generator)))
    plain = path
    if name in QUANTIZED:
        plain = quantize(path, name, generator)
        oracle = NemotronHForCausalLM.from_pretrained(plain)
    oracle.train(False)
    oracle.set_experts_implementation("eager")  # torch's grouped products do not support odd sizes
    for mixer in mamba_mixers(oracle):
        mixer.time_step_limit = (0.0, float("inf"))
    oracle.generation_config.eos_token_id = None
    return Tiny(name, path, plain, oracle, BASE | VARIANTS[name] | changes)


def mamba_mixers(oracle: NemotronHForCausalLM) -> list[Any]:
    return [layer.mixer for layer in oracle.model.layers if hasattr(layer.mixer, "dt_bias")]


def mtp_tensors(raw: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Return random tensors of an MTP module with the pattern `*E`, under the public names and in the public shapes."""
    dim, width, head = raw["hidden_size"], raw["moe_intermediate_size"], raw["head_dim"]
    latent, shared = raw["moe_latent_size"], raw["moe_shared_expert_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "0.enorm": (dim,),
        "0.hnorm": (dim,),
        "0.norm": (dim,),
        "0.eh_proj": (dim, 2 * dim),
        "0.mixer.q_proj": (raw["num_attention_heads"] * head, dim),
        "0.mixer.k_proj": (raw["num_key_value_heads"] * head, dim),
        "0.mixer.v_proj": (raw["num_key_value_heads"] * head, dim),
        "0.mixer.o_proj": (dim, raw["num_attention_heads"] * head),
        "1.norm": (dim,),
        "1.final_layernorm": (dim,),
        "1.mixer.gate": (raw["n_routed_experts"], dim),
        "1.mixer.fc1_latent_proj": (latent, dim),
        "1.mixer.fc2_latent_proj": (dim, latent),
        "1.mixer.shared_experts.up_proj": (shared, dim),
        "1.mixer.shared_experts.down_proj": (dim, shared),
    }
    for expert in range(raw["n_routed_experts"]):
        shapes[f"1.mixer.experts.{expert}.up_proj"] = (width, latent)
        shapes[f"1.mixer.experts.{expert}.down_proj"] = (latent, width)
    tensors = {
        f"mtp.layers.{name}.weight": torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        if len(shape) > 1
        else 1 + torch.randn(shape, generator=generator) / 4
        for name, shape in shapes.items()
    }
    bias = torch.randn(raw["n_routed_experts"], generator=generator) / 4
    return tensors | {"mtp.layers.1.mixer.gate.e_score_correction_bias": bias}


def quantize(path: Path, name: str, generator: torch.Generator) -> Path:
    """Quantize a one-file checkpoint in place as variant `name`, and return a directory with the dequantized weights.

    Model Optimizer's checkpoints also get the scales of activations, which are not used.
    """
    tensors = load_file(path / "model.safetensors")
    modules = linear_modules(tensors)
    found = {module: format_of(name, module) for module in (*modules, "lm_head")}
    formats = {module: format for module, format in found.items() if format != "plain"}
    if name in ("nvfp4", "nvfp4_flat", "w4a16"):
        tensors = {key: value if "correction_bias" in key else value.bfloat16() for key, value in tensors.items()}
    exact = {key: value.float() for key, value in tensors.items()}
    tensors = encode_tensors(tensors, formats)
    exact |= {f"{module}.weight": dequantized(tensors, module) for module in formats}
    plain = edit(path, path / "plain", lambda own: (own.clear(), own.update(exact)))
    if name != "fp8_blocks":
        with_input_scale = [module for module, format in formats.items() if (name, format) != ("w4a16", "nvfp4")]
        tensors |= {f"{module}.input_scale": torch.rand((), generator=generator) for module in with_input_scale}
    if name in ("fp8", "nvfp4"):
        for module, kind in ((module, module[-6]) for module in modules if module.endswith(("k_proj", "v_proj"))):
            tensors[f"{module}.{kind}_scale"] = torch.rand((), generator=generator)
    save_file(tensors, path / "model.safetensors")
    declared, hf_quant_config = declarations(formats, modules)
    if name == "w4a16":
        declared, hf_quant_config = json.loads(
            json.dumps([declared, hf_quant_config]).replace('"NVFP4"', '"W4A16_NVFP4"')
        )
    if name == "nvfp4_flat":
        assert hf_quant_config is not None
        excluded = hf_quant_config["quantization"]["exclude_modules"]
        own = [module for module in excluded if not module.startswith("backbone.layers.1.")]
        hf_quant_config["quantization"]["exclude_modules"] = [*own, "backbone.layers.1*"]  # not layers 10 and 11
    else:
        edit_config(path, path, quantization_config=declared | {"quant_algo": declared.get("quant_algo", "").lower()})
    if hf_quant_config is not None:
        (path / QUANTIZATION).write_text(json.dumps(hf_quant_config))
    return plain


def format_of(name: str, module: str) -> WeightFormat:
    """Return the format of a module's weight in the quantized variant `name`."""
    layer = int(module.split(".layers.")[1].split(".")[0]) if module.startswith("backbone.") else None
    part = module.partition(".mixer.")[2]
    is_routed, is_shared, is_mamba = "experts." in part[:8], "shared_experts" in part, part in ("in_proj", "out_proj")
    match name:
        case "w4a16":
            is_narrow = module == "lm_head" or is_routed or is_shared
            return "nvfp4" if is_narrow else "fp8" if is_mamba and layer is not None else "plain"
        case "fp8_blocks":
            return "plain" if module.endswith(("gate", "eh_proj", "lm_head")) else "fp8_blocks"
        case _ if layer is None:
            return "plain"
        case "fp8":
            return "fp8" if is_routed or is_shared or is_mamba else "plain"
        case "nvfp4_flat":
            return "nvfp4" if layer != 1 and (is_routed or is_shared or is_mamba) else "plain"
    if is_routed:
        return "fp8" if layer == 4 and part.endswith("down_proj") else "nvfp4"
    return MIXED.get((layer, part), "plain")


def edit(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Copy a one-file checkpoint to `target`, with its tensors changed by `change`."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    target.mkdir(exist_ok=True)
    for name in ("config.json", "generation_config.json", QUANTIZATION):
        if (source / name).exists():
            (target / name).write_text((source / name).read_text())
    save_file(tensors, target / "model.safetensors")
    return target


def edit_config(source: Path, target: Path, **changes: object) -> Path:
    """Copy a one-file checkpoint to `target`, with its config updated by `changes`."""
    edit(source, target, lambda tensors: None)
    raw = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(raw))
    return target


def several_files(source: Path, target: Path, num_files: int) -> Path:
    """Copy a one-file checkpoint to `target` as several files; scales may be in other files than their codes."""
    edit(source, target, lambda tensors: None)
    tensors = load_file(source / SINGLE)
    (target / SINGLE).unlink()
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        names = sorted(tensors)[i::num_files]
        save_file({name: tensors[name] for name in names}, target / file)
        weight_map |= dict.fromkeys(names, file)
    (target / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return target
