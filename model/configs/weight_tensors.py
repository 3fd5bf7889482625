"""The functions here find a weight's format from the tensors of a checkpoint, and check the tensors that hold a weight.

What decides is the dtype of X.weight and the scales that are present:

| X.weight        | scales                            | format     |
|-----------------|-----------------------------------|------------|
| BF16, F16, F32  | none                              | plain      |
| F8_E4M3         | X.weight_scale                    | fp8        |
| F8_E4M3         | X.weight_scale_inv                | fp8_blocks |
| U8              | X.weight_scale, X.weight_scale_2  | nvfp4      |

Two weights of one model, and of one expert, may have different formats. Every function raises ValueError with one
sentence that names the tensor, what is wrong with the tensor, and what is allowed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from model.configs.weight_format import FORMATS, PartDtype, StoredPart, WeightFormat, stored_parts

SCALES = ("weight_scale", "weight_scale_2", "weight_scale_inv")
IGNORED_SCALES = ("input_scale", "k_scale", "v_scale")  # scales of activations, which are never quantized here
OTHER_LAYOUTS = {  # tensors of layouts that are not supported, with the layouts' names
    "weight_packed": "compressed-tensors",
    "weight_global_scale": "compressed-tensors",
}
FLOATS = ("BF16", "F16", "F32")
DTYPES: dict[PartDtype, tuple[str, ...]] = {  # names of dtypes in safetensors files
    "plain": FLOATS,
    "float32": FLOATS,  # a scale of 16 bits has the same value in fp32
    "e4m3": ("F8_E4M3",),
    "uint8": ("U8",),
}


@dataclass(frozen=True)
class TensorHeader:
    """A `TensorHeader` is what a safetensors file says of a tensor before the tensor's numbers are read."""

    dtype: str
    shape: tuple[int, ...]


def module_of(name: str) -> str:
    """Return the name of the module whose weight or scale is called `name`."""
    return name.rpartition(".")[0]


def weight_format(path: Path, name: str, dtype: str, scales: Collection[str]) -> WeightFormat:
    """Return the format of the weight called `name`; `scales` are the names in SCALES that the weight's module has."""
    module, present = module_of(name), set(scales)
    weight = f"tensor {name} in {path} has the dtype {dtype}"
    match dtype:
        case "F8_E4M3" if present == {"weight_scale"}:
            return "fp8"
        case "F8_E4M3" if present == {"weight_scale_inv"}:
            return "fp8_blocks"
        case "U8" if present == {"weight_scale", "weight_scale_2"}:
            return "nvfp4"
        case "F8_E4M3" if not present:
            raise ValueError(f"{weight}, but there is no tensor {module}.weight_scale or {module}.weight_scale_inv")
        case "U8" if missing := [scale for scale in SCALES[:2] if scale not in present]:
            raise ValueError(f"{weight} (NVFP4), but there is no tensor {module}.{missing[0]}")
        case "F8_E4M3" | "U8":
            raise ValueError(f"{weight} and the scales {_listed(present)}; no supported format has all these scales")
        case _ if dtype not in FLOATS:
            raise ValueError(f"{weight}; allowed are {_listed([*FLOATS, 'F8_E4M3', 'U8'])}")
        case _ if present:
            raise ValueError(f"{weight}, which needs no scale, but there is the tensor {module}.{min(present)}")
    return "plain"


def weight_parts(path: Path, name: str, format: WeightFormat, shape: tuple[int, int]) -> dict[str, StoredPart]:
    """Return the tensors, by their names, that hold the weight called `name` with `shape` = (outputs, inputs)."""
    try:
        parts = stored_parts(format, *shape)
    except ValueError as error:
        raise ValueError(f"tensor {name} in {path} does not fit the config: {error}") from None
    return {name if part.suffix == "weight" else f"{module_of(name)}.{part.suffix}": part for part in parts}


def check_part(path: Path, name: str, part: StoredPart, header: TensorHeader, format: WeightFormat) -> None:
    """Check the dtype and the shape of the tensor called `name`, which is one part of a weight."""
    tensor, given, wanted = f"tensor {name} in {path}", list(header.shape), list(part.shape)
    if header.shape != part.shape and not (part.shape == () and header.shape == (1,)):
        needed = "the config requires" if format == "plain" else f"the config and the format {format} require"
        if part.shape == ():
            kind = "FP8_PB_WO" if len(given) == 4 else "FP8_PER_CHANNEL_PER_TOKEN"
            raise ValueError(f"{tensor} is {given}; supported is one scale per matrix ([] or [1]), and not {kind}")
        raise ValueError(f"{tensor} is {given}, {needed} {wanted}")
    if header.dtype not in DTYPES[part.dtype]:
        allowed = _listed(DTYPES[part.dtype])
        raise ValueError(f"{tensor} has the dtype {header.dtype}; the format {format} requires {allowed}")


def check_layout(path: Path, name: str) -> None:
    """Raise ValueError if the tensor called `name` belongs to a layout of quantized weights that is not supported."""
    if layout := OTHER_LAYOUTS.get(name.rpartition(".")[2]):
        sentence = f"is of the layout {layout}, which is not supported; supported are {', '.join(FORMATS)}"
        raise ValueError(f"tensor {name} in {path} {sentence}")


def _listed(words: Collection[str]) -> str:
    return ", ".join(sorted(words))
