"""Weight formats determine how many bytes a weight takes in a checkpoint.

The formats of a checkpoint come from the first of these sources that there is:

1. the tensors in its files (`cluster/sizing/checkpoint_files.py`);
2. the list of quantized modules in its config, or the numbers of quantized matrices in `cluster/sizing/configs`;
3. `RECIPES`, which says what the public checkpoints of a family quantize. All other matrices are bf16.

What public checkpoints quantize, as the headers of their files show:

- Nemotron 3 FP8: routed and shared experts and the Mamba projections. Nano leaves six Mamba layers in bf16.
- Nemotron 3 NVFP4: Ultra has routed experts in NVFP4, and shared experts and Mamba projections in FP8. Super and Nano
  differ from Ultra, so `cluster/sizing/configs` has their numbers. The MTP module is bf16 in all of them.
- DeepSeek-V3 FP8: every linear map except the router and `eh_proj`, also in the MTP layer. Each block of 128 × 128
  weights has a scale.
- DeepSeek-V3 NVFP4: routed and shared experts and dense layers. V3.1 and R1 also quantize `o_proj`.
- Qwen3-Next FP8: every linear map except the router, the small map to β and decay, and the gate of the shared expert.
  Each block of 128 × 128 weights has a scale.
- Qwen3-Next NVFP4: routed and shared experts, `o_proj` of the attention and `out_proj` of the DeltaNet layers.

A quantized matrix also has a scale for its inputs in Model Optimizer's checkpoints. This scale is not counted, because
it is not served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from model.configs.config_keys import ConfigKeys
from model.configs.declared_formats import DeclaredFormats
from model.configs.matrix_group import role_of
from model.configs.weight_format import WeightFormat, matrix_bytes

Dtype = Literal["bf16", "fp8", "nvfp4"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True)
class Storage:
    """A `Storage` says how a matrix is stored: its format, and the bytes of one number if the format is plain."""

    format: WeightFormat
    itemsize: int = 2

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes of one matrix with its scales."""
        return matrix_bytes(self.format, rows, columns, self)


BF16, FP32 = Storage("plain"), Storage("plain", 4)
# Number of matrices by storage. The key is a role, and True for the MTP module.
Counts = Mapping[tuple[str, bool], Mapping[Storage, int]]

NEMOTRON_EXPERTS = ("mixer.experts.up_proj", "mixer.experts.down_proj")
NEMOTRON_WIDE = (
    *("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"),
    *("mixer.in_proj", "mixer.out_proj"),
)
MLP = ("gate_proj", "up_proj", "down_proj")
DEEPSEEK_MLPS = tuple(f"{module}.{name}" for module in ("mlp", "mlp.shared_experts", "mlp.experts") for name in MLP)
DEEPSEEK_ATTENTION = tuple(
    f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
)
QWEN_MLPS = tuple(f"{module}.{name}" for module in ("mlp", "mlp.shared_expert", "mlp.experts") for name in MLP)
QWEN_OUTPUTS = ("self_attn.o_proj", "linear_attn.out_proj")
QWEN_INPUTS = ("linear_attn.in_proj_qkvz", *(f"self_attn.{name}_proj" for name in "qkv"))
RECIPES: dict[tuple[str, Dtype], dict[str, WeightFormat]] = {
    ("nemotron_h", "fp8"): dict.fromkeys((*NEMOTRON_EXPERTS, *NEMOTRON_WIDE), "fp8"),
    ("nemotron_h", "nvfp4"): {**dict.fromkeys(NEMOTRON_WIDE, "fp8"), **dict.fromkeys(NEMOTRON_EXPERTS, "nvfp4")},
    ("deepseek_v3", "fp8"): dict.fromkeys((*DEEPSEEK_MLPS, *DEEPSEEK_ATTENTION), "fp8_blocks"),
    ("deepseek_v3", "nvfp4"): dict.fromkeys(DEEPSEEK_MLPS, "nvfp4"),
    ("qwen3_next", "fp8"): dict.fromkeys((*QWEN_MLPS, *QWEN_OUTPUTS, *QWEN_INPUTS), "fp8_blocks"),
    ("qwen3_next", "nvfp4"): dict.fromkeys((*QWEN_MLPS, *QWEN_OUTPUTS), "nvfp4"),
}
QUANTIZED_MTP = (("deepseek_v3", "fp8"), ("qwen3_next", "fp8"))  # recipes that also hold for the MTP module


def with_hf_quantization(raw: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config `raw` with the quantization of a `hf_quant_config.json`, unless it has a quantization itself.

    Model Optimizer writes this file; some of its checkpoints, such as Nemotron 3 Nano in NVFP4, have nothing else.
    Raises ValueError if the file names an algorithm that is not supported.
    """
    DeclaredFormats.of_modelopt(quantization)
    given = quantization.get("quantization")
    if raw.get("quantization_config") or not given:
        return dict(raw)
    return {**raw, "quantization_config": {"quant_method": "modelopt", "ignore": given.get("exclude_modules"), **given}}


def dtype_of(raw: Mapping[str, Any]) -> Dtype:
    """Return the dtype of the checkpoint that a `config.json` belongs to, named after its smallest format.

    Raises ValueError if the quantization is not supported.
    """
    declared = DeclaredFormats.of_config(raw)
    if declared.is_unlisted_mix:
        return "nvfp4"
    return dtype_of_formats(declared.listed.values() if declared.listed is not None else (declared.uniform or "plain",))


def dtype_of_formats(formats: Iterable[WeightFormat]) -> Dtype:
    """Return the dtype that names a checkpoint with matrices in `formats`: the dtype of the smallest format."""
    found = {*formats}
    return "nvfp4" if "nvfp4" in found else "fp8" if found & {"fp8", "fp8_blocks"} else "bf16"


def recipe(raw: Mapping[str, Any], dtype: Dtype) -> dict[str, WeightFormat]:
    """Return the formats that `dtype` has in public checkpoints by role; roles that are not in it are bf16.

    If the config declares one format for all modules, this format replaces the formats of the recipe.
    """
    found = RECIPES.get((str(raw.get("model_type")), dtype), {})
    uniform = DeclaredFormats.of_config(raw).uniform
    return dict.fromkeys(found, uniform) if uniform and dtype_of_formats([uniform]) == dtype else dict(found)


def known_counts(raw: Mapping[str, Any], dtype: Dtype, num_layers: int) -> Counts | None:
    """Return the numbers of quantized matrices; None if the config does not list these matrices.

    Two keys are read:

    - `quantized_matrices` is Expertmesh's own key in `cluster/sizing/configs`: {dtype: {role: {format: number}}}.
    - `quantized_layers` is written by Model Optimizer: {module: {"quant_algo": …}}.
    """
    ours = ConfigKeys(raw).section("quantized_matrices")
    if dtype in ours.raw:
        roles = ours.section(dtype)
        return {(role, False): _storages(roles.section(role)) for role in roles.raw}
    listed = DeclaredFormats.of_config(raw).listed
    if listed is None or dtype != dtype_of(raw):
        return None
    counts: dict[tuple[str, bool], Counter[Storage]] = {}
    for module, format in listed.items():
        counts.setdefault(role_of(module, num_layers), Counter())[Storage(format)] += 1
    return counts


def excluded(raw: Mapping[str, Any], num_layers: int) -> Counter[tuple[str, bool]]:
    """Return how many modules the config excludes from quantization by their whole names, by role.

    Patterns with a wildcard are left out, as a pattern may stand for a module and the modules below it, or for any name
    that begins like this.
    """
    patterns = DeclaredFormats.of_config(raw).excluded
    return Counter(role_of(module, num_layers) for module in patterns if not {*"*?["} & {*module})


def _storages(counts: ConfigKeys) -> Mapping[Storage, int]:
    """Return the numbers of matrices by storage, from `counts`, the numbers of matrices by format."""
    allowed: dict[str, WeightFormat] = {"fp8": "fp8", "nvfp4": "nvfp4"}
    for format in counts.raw:
        if format not in allowed:
            raise counts.wrong(format, "allowed are fp8 and nvfp4")
    return {Storage(allowed[format]): counts.whole(format) for format in counts.raw}
