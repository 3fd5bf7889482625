"""Weight formats determine how many bytes a weight takes in a checkpoint.

Public checkpoints quantize only the matrices in the following list. All other matrices are bf16. Norms, embeddings, the
head and convolutions are bf16 in all checkpoints.

- Nemotron FP8: routed and shared experts and the Mamba projections. The MTP module is bf16 (assumed, as in NVFP4).
- Nemotron NVFP4: routed experts in NVFP4, shared experts and Mamba projections in FP8, as in the Ultra checkpoint. The
  Super and Nano checkpoints quantize only some of these matrices. The numbers of quantized matrices stand in
  `cluster/sizing/configs`, or follow from the list of modules in a checkpoint's `quantization_config`. The MTP module
  is bf16, its routed experts included.
- DeepSeek-V3 FP8: every linear map except the router and `eh_proj`, also in the MTP layer. Each block of 128 × 128
  weights has a scale.
- Qwen3-Next FP8: every linear map except the router, the small map to β and decay, and the gate of the shared expert.
  Each block of 128 × 128 weights has a scale.
- DeepSeek-V3 and Qwen3-Next NVFP4: routed and shared experts and dense layers. This format is an assumption, because no
  such checkpoint was read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any, Literal, get_args

Dtype = Literal["bf16", "fp8", "nvfp4"]
Format = Literal["fp32", "bf16", "fp8", "fp8_blocks", "nvfp4"]
Counts = Mapping[str, Mapping[str, int]]  # Number of matrices by role and format.

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
BLOCK = 128  # Rows and columns that share a scale in FP8 with blocks.
GROUP = 16  # Columns that share a scale in NVFP4.
SCALARS = 8  # Bytes of a matrix's two fp32 scales, one for its weights and one for its inputs.
MODELOPT = {"FP8": "fp8", "NVFP4": "nvfp4"}  # Formats by the names that Model Optimizer gives them.

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
ROLES = {  # Roles of matrices by the end of the module's name in Nemotron's checkpoints; the first match counts.
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
    """Return the bytes of one matrix with its scales."""
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
    """Return the dtype of the checkpoint that a `config.json` belongs to.

    Raises ValueError if the quantization is not supported.
    """
    quantization = _object(raw, "quantization_config")
    if not quantization:
        return "bf16"
    method = quantization.get("quant_method")
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if block != [BLOCK, BLOCK]:
            raise ValueError(
                f"config.json has weight_block_size = {block!r}; supported are blocks of [{BLOCK}, {BLOCK}]"
            )
        return "fp8"
    if method == "modelopt":
        algorithm = quantization.get("quant_algo")
        if algorithm == "FP8":
            return "fp8"
        if algorithm in ("NVFP4", "MIXED_PRECISION"):
            return "nvfp4"
        raise ValueError(f"config.json has quant_algo = {algorithm!r}; supported are FP8, NVFP4 and MIXED_PRECISION")
    raise ValueError(f"config.json has quant_method = {method!r}; supported are fp8 and modelopt")


def known_counts(raw: Mapping[str, Any], dtype: Dtype) -> Counts | None:
    """Return the number of quantized matrices by role and format; None if the config does not list these matrices.

    Two keys are read:

    - `quantized_matrices` is Expertmesh's own key in `cluster/sizing/configs`: {dtype: {role: {format: number}}}.
    - `quantized_layers` is written by Model Optimizer: {module: {"quant_algo": …}}.
    """
    ours = _object(raw, "quantized_matrices")
    if dtype in ours:
        return {role: _formats(_object(_object(ours, dtype), role)) for role in _object(ours, dtype)}
    layers = _object(_object(raw, "quantization_config"), "quantized_layers")
    return _counted(layers.items()) if layers and dtype == dtype_of(raw) else None


def _formats(counts: Mapping[Any, Any]) -> Mapping[str, int]:
    """Check the keys and values of `counts`, the numbers of matrices by format, and return `counts`."""
    for format, num in counts.items():
        if format not in MODELOPT.values() or not isinstance(num, int):
            raise ValueError(f"config.json has {format!r}: {num!r} in quantized_matrices; allowed are fp8 and nvfp4")
    return counts


def _object(raw: Mapping[str, Any], key: str) -> Mapping[Any, Any]:
    """Return the value of `key`, a JSON object; empty if the key is missing or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"config.json has {key} = {value!r}; allowed is an object")
    return value or {}


def _counted(layers: Iterable[tuple[str, Any]]) -> Counts:
    """Return the number of quantized matrices by role and format, from Model Optimizer's list of modules."""
    counts: dict[str, Counter[str]] = {}
    for module, entry in layers:
        role = next((role for ending, role in ROLES.items() if module.endswith(ending)), None)
        format = MODELOPT.get(entry.get("quant_algo", "")) if isinstance(entry, Mapping) else None
        if role is None or format is None or module.startswith("mtp."):
            raise ValueError(f"config.json lists {module} among quantized_layers as {entry!r}, which is not supported")
        counts.setdefault(role, Counter())[format] += 1
    return counts
