"""How many bytes a weight takes in a checkpoint, and which weights a quantized checkpoint quantizes.

What is known of public checkpoints, by role of a matrix; everything that is not named is bf16, and so are norms,
embeddings, the head and convolutions in all of them:

- Nemotron FP8: routed and shared experts and the Mamba projections; the MTP module is bf16 (as in NVFP4, assumed).
- Nemotron NVFP4: routed experts in NVFP4, shared experts and Mamba projections in FP8, as in Ultra. Super and Nano
  quantize some matrices and not others: the configs in `cluster/sizing/configs` count them, and so does the list of modules
  in a real checkpoint's `quantization_config`. The MTP module is bf16, its routed experts too.
- DeepSeek-V3 FP8: every linear map, the MTP layer's too, but for the router and `eh_proj`, with a scale for each block
  of 128 × 128. Qwen3-Next FP8 likewise, but for the small map to β and decay and the shared expert's gate.
- DeepSeek-V3 and Qwen3-Next NVFP4: routed and shared experts and dense layers; an assumption, for none was read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any, Literal, get_args

Dtype = Literal["bf16", "fp8", "nvfp4"]
Format = Literal["fp32", "bf16", "fp8", "fp8_blocks", "nvfp4"]
Counts = Mapping[str, Mapping[str, int]]  # how many matrices of a role are stored in which format

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
BLOCK = 128  # rows and columns that share a scale in FP8 with blocks
GROUP = 16  # columns that share a scale in NVFP4
SCALARS = 8  # bytes of a matrix's fp32 scales: of weights and of inputs
MODELOPT = {"FP8": "fp8", "NVFP4": "nvfp4"}

SHARED = ("shared_up", "shared_down")
NEMOTRON_WIDE = ("mixer_in", "mixer_out", *SHARED)
LINEAR = (*NEMOTRON_WIDE, "attention", "attention_out", "dense", "routed")
RECIPES: dict[tuple[str, Dtype], dict[str, Format]] = {
    ("nemotron_h", "fp8"): dict.fromkeys((*NEMOTRON_WIDE, "routed"), "fp8"),
    ("nemotron_h", "nvfp4"): {**dict.fromkeys(NEMOTRON_WIDE, "fp8"), "routed": "nvfp4"},
    ("deepseek_v3", "fp8"): dict.fromkeys(LINEAR, "fp8_blocks"),
    ("deepseek_v3", "nvfp4"): dict.fromkeys((*SHARED, "dense", "routed"), "nvfp4"),
    ("qwen3_next", "fp8"): dict.fromkeys(LINEAR, "fp8_blocks"),
    ("qwen3_next", "nvfp4"): dict.fromkeys((*SHARED, "dense", "routed"), "nvfp4"),
}
ROLES = {  # what a module's name in Nemotron's checkpoints ends with; the first that fits
    "shared_experts.up_proj": "shared_up",
    "shared_experts.down_proj": "shared_down",
    "up_proj": "routed",
    "down_proj": "routed",
    "in_proj": "mixer_in",
    "out_proj": "mixer_out",
    "o_proj": "attention_out",
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "fc1_latent_proj": "latent_in",
    "fc2_latent_proj": "latent_out",
}


def matrix_bytes(format: Format, rows: int, columns: int) -> int:
    """Bytes of one matrix with its scales."""
    num = rows * columns
    match format:
        case "fp32":
            return 4 * num
        case "bf16":
            return 2 * num
        case "fp8":
            return num + SCALARS
        case "fp8_blocks":
            return num + 4 * ceil(rows / BLOCK) * ceil(columns / BLOCK)
        case "nvfp4":
            return rows * (ceil(columns / 2) + ceil(columns / GROUP)) + SCALARS


def dtype_of(raw: Mapping[str, Any]) -> Dtype:
    """What a `config.json` says of its checkpoint's weights. Raises ValueError for a quantization that is not sized."""
    quantization = _object(raw, "quantization_config")
    if not quantization:
        return "bf16"
    method = quantization.get("quant_method")
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if block != [BLOCK, BLOCK]:
            raise ValueError(f"config.json has weight_block_size = {block!r}; sized are blocks of [{BLOCK}, {BLOCK}]")
        return "fp8"
    if method == "modelopt":
        algorithm = quantization.get("quant_algo")
        if algorithm == "FP8":
            return "fp8"
        if algorithm in ("NVFP4", "MIXED_PRECISION"):
            return "nvfp4"
        raise ValueError(f"config.json has quant_algo = {algorithm!r}; sized are FP8, NVFP4 and MIXED_PRECISION")
    raise ValueError(f"config.json has quant_method = {method!r}; sized are fp8 and modelopt")


def known_counts(raw: Mapping[str, Any], dtype: Dtype) -> Counts | None:
    """How many matrices of each role the checkpoint quantizes, where its config tells; else None.

    `quantized_matrices` is a key of our own, {dtype: {role: {format: how many}}}, in `cluster/sizing/configs`;
    `quantized_layers` is what Model Optimizer writes, {module: {"quant_algo": …}}.
    """
    ours = _object(raw, "quantized_matrices")
    if dtype in ours:
        return {role: _formats(_object(_object(ours, dtype), role)) for role in _object(ours, dtype)}
    layers = _object(_object(raw, "quantization_config"), "quantized_layers")
    return _counted(layers.items()) if layers and dtype == dtype_of(raw) else None


def _formats(counts: Mapping[Any, Any]) -> Mapping[str, int]:
    for format, num in counts.items():
        if format not in MODELOPT.values() or not isinstance(num, int):
            raise ValueError(f"config.json has {format!r}: {num!r} in quantized_matrices; allowed are fp8 and nvfp4")
    return counts


def _object(raw: Mapping[str, Any], key: str) -> Mapping[Any, Any]:
    """Empty where the key is missing or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"config.json has {key} = {value!r}; allowed is an object")
    return value or {}


def _counted(layers: Iterable[tuple[str, Any]]) -> Counts:
    counts: dict[str, Counter[str]] = {}
    for module, entry in layers:
        role = next((role for ending, role in ROLES.items() if module.endswith(ending)), None)
        format = MODELOPT.get(entry.get("quant_algo", "")) if isinstance(entry, Mapping) else None
        if role is None or format is None or module.startswith("mtp."):
            raise ValueError(f"config.json lists {module} among quantized_layers as {entry!r}, which is not sized")
        counts.setdefault(role, Counter())[format] += 1
    return counts
