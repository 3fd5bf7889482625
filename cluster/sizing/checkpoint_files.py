"""`CheckpointFiles` tell from the headers of a checkpoint's files how each matrix is stored.

A header lists the names, dtypes and shapes of the tensors in a file. No weights are read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.sizing.weight_formats import BF16, Counts, Dtype, Storage
from model.configs.matrices import role_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of one number by dtype
# Scales: those of weights, which decide the format; of a layer's inputs; and of keys and values in the KV cache.
SCALES = ("weight_scale", "weight_scale_2", "weight_scale_inv", "input_scale", "k_scale", "v_scale")
IGNORED = (*SCALES, "rotary_emb.inv_freq")
SUPPORTED = "supported are plain numbers, FP8 in blocks, and FP8 and NVFP4 of Model Optimizer"
COMPRESSED = ("weight_packed", "weight_global_scale")  # names of tensors in the layout of compressed-tensors


@dataclass(frozen=True)
class CheckpointFiles:
    """`CheckpointFiles` hold the storages of all matrices of a checkpoint.

    `num_bytes` are the bytes of all tensors, also of those that are not served.
    """

    counts: Counts
    num_bytes: int

    @property
    def dtype(self) -> Dtype:
        """Return the dtype that has a name for the formats of the checkpoint: that of the smallest format."""
        formats = {storage.format for storages in self.counts.values() for storage in storages}
        return "nvfp4" if "nvfp4" in formats else "fp8" if formats & {"fp8", "fp8_blocks"} else "bf16"

    def completed(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config `raw` with the two facts that the tensors decide: if there is an MTP module and a head."""
        has_mtp = any(is_mtp for _, is_mtp in self.counts)
        found = {**raw, "num_nextn_predict_layers": int(has_mtp)}
        return {**found, "tie_word_embeddings": False} if ("lm_head", False) in self.counts else found


def read_files(directory: Path, num_layers: int) -> CheckpointFiles | None:
    """Read the headers of the checkpoint in `directory`; return None if not all of its files are there.

    `num_layers` is the number of layers without the MTP module. Raises ValueError if a file is damaged, or if a tensor
    has a format that is not supported.
    """
    paths = _paths(directory)
    if not paths or not all(path.is_file() for path in paths):
        return None
    tensors = {name: found for path in paths for name, found in _tensors(path)}
    counts: dict[tuple[str, bool], Counter[Storage]] = {}
    for name, (dtype, _) in tensors.items():
        if name.endswith(COMPRESSED):
            raise ValueError(f"tensor {name} is in the layout of compressed-tensors; {SUPPORTED}")
        if not name.endswith(IGNORED):
            counts.setdefault(role_of(name, num_layers), Counter())[_storage(name, dtype, tensors)] += 1
    return CheckpointFiles(counts, sum(num_bytes for _, num_bytes in tensors.values()))


def _paths(directory: Path) -> list[Path]:
    if not (directory / INDEX).is_file():
        return [directory / SINGLE]
    try:
        files = json.loads((directory / INDEX).read_text())["weight_map"]
        return [directory / file for file in sorted(set(files.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{directory / INDEX} is not an index of weight files: it has no weight_map") from None


def _tensors(path: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the name, the dtype and the bytes of each tensor in a file."""
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_slice(name)
                yield name, (tensor.get_dtype(), _nbytes(tensor))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _nbytes(tensor: Any) -> int:
    num = 1
    for length in tensor.get_shape():
        num *= length
    return num * {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}.get(tensor.get_dtype(), 1)


def _storage(name: str, dtype: str, tensors: Mapping[str, Any]) -> Storage:
    """Return how the matrix called `name` is stored; the tensors of its scales decide."""
    module = name.removesuffix(".weight")
    scales = tuple(scale for scale in SCALES[:3] if name != module and f"{module}.{scale}" in tensors)
    match dtype, scales:
        case ("F8_E4M3", ("weight_scale",)):
            return Storage("fp8")
        case ("F8_E4M3", ("weight_scale_inv",)):
            return Storage("fp8_blocks")
        case ("U8", ("weight_scale", "weight_scale_2")):
            return Storage("nvfp4")
        case (_, ()) if dtype in PLAIN:
            return Storage(BF16.format, PLAIN[dtype])
    with_scales = f" and the scales {', '.join(scales)}" if scales else " and no scale"
    raise ValueError(f"tensor {name} has the dtype {dtype}{with_scales}; {SUPPORTED}")
