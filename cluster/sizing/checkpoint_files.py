"""`CheckpointFiles` tell from the headers of a checkpoint's files how each matrix is stored.

A header lists the names, dtypes and shapes of the tensors in a file. No weights are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.sizing.weight_formats import Counts, Dtype, Storage, dtype_of_formats
from model.configs.matrix_group import role_of
from model.configs.model_files import SINGLE, read_index
from model.configs.weight_tensors import IGNORED_SCALES, SCALES, TensorHeader, check_layout, module_of, weight_format

ITEMSIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # bytes of a number; others: 1
NOT_COUNTED = (*SCALES, *IGNORED_SCALES, "inv_freq")


@dataclass(frozen=True)
class CheckpointFiles:
    """`CheckpointFiles` hold the storages of all matrices of a checkpoint.

    `num_bytes` are the bytes of all tensors, also of those that are not served.
    """

    counts: Counts
    num_bytes: int

    @property
    def dtype(self) -> Dtype:
        """Return the dtype that names the formats of the checkpoint."""
        return dtype_of_formats(storage.format for storages in self.counts.values() for storage in storages)

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
    for name in tensors:
        check_layout(directory, name)
        if not name.endswith(NOT_COUNTED):
            counts.setdefault(role_of(name, num_layers), Counter())[_storage(directory, name, tensors)] += 1
    return CheckpointFiles(
        counts, sum(prod(header.shape) * ITEMSIZES.get(header.dtype, 1) for header in tensors.values())
    )


def _paths(directory: Path) -> list[Path]:
    """Return the paths of the checkpoint's files, which may be missing."""
    files = read_index(directory)
    return [directory / file for file in ([SINGLE] if files is None else sorted({*files.values()}))]


def _tensors(path: Path) -> Iterator[tuple[str, TensorHeader]]:
    """Yield the name of each tensor in a file with its header."""
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_slice(name)
                yield name, TensorHeader(tensor.get_dtype(), tuple(tensor.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _storage(directory: Path, name: str, tensors: Mapping[str, TensorHeader]) -> Storage:
    """Return how the matrix called `name` is stored."""
    scales = [scale for scale in SCALES if f"{module_of(name)}.{scale}" in tensors] if name.endswith(".weight") else []
    dtype = tensors[name].dtype
    format = weight_format(directory, name, dtype, scales)
    return Storage(format, ITEMSIZES[dtype]) if format == "plain" else Storage(format)
