"""Model sizes describe a model in numbers: its weights by part, the state of a request, and the shapes of its experts.

`model_sizes` computes model sizes from a `config.json` and, if they are there, from the headers of the checkpoint's
files. Some of the parts are:

- mixers: attention, Mamba-2 and DeltaNet layers.
- latent: the projections to and from the width in which Nemotron's experts work.
- copies: the second embedding and head that DeepSeek's checkpoints contain for the MTP module. No device needs the
  copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

from cluster.sizing.checkpoint_files import CheckpointFiles, read_files
from cluster.sizing.weight_formats import (
    BF16,
    DTYPES,
    FP32,
    QUANTIZED_MTP,
    Counts,
    Dtype,
    Storage,
    excluded,
    known_counts,
    recipe,
)
from cluster.topology import LayerSpec
from model.configs.expert_memory import ExpertMemory, expert_memory, pinned_bytes
from model.configs.expert_shape import ExpertShape
from model.configs.matrix_group import MatrixGroup
from model.configs.model_config import ModelConfig
from model.configs.registry import parse_config
from model.configs.weight_format import WeightFormat

PARTS = (
    *("embedding", "head", "norms", "mixers", "routers", "latent", "shared", "dense", "routed"),
    *("mtp backbone", "mtp routed", "mtp copies"),
)
GPU = "cuda"  # The device for which sizes are counted.
STATE_BYTES = 4  # Bytes of one number of recurrent state (fp32).
KV_BYTES = 2  # Bytes of one number of KV or of a convolution's inputs (bf16).
STORED_FP32 = ("e_score_correction_bias",)  # Ends of the roles that are fp32 in public checkpoints.
# Ends of the roles that are fp32 on a device. Families name them in `fp32_parameters`.
HELD_FP32 = (*STORED_FP32, ".A_log", ".D", ".dt_bias", ".gate")


@dataclass(frozen=True)
class StateSizes:
    """`StateSizes` count the numbers that the state of a request consists of.

    - `kv` and `mtp_kv`: the KV of one token, in the backbone's layers and in the MTP module.
    - `recurrent` and `conv`: the recurrent state (fp32) and the inputs of the convolutions, for the whole sequence.
    - `replay`: the numbers of one token that recurrent layers need to compute the token again.
    """

    kv: int
    mtp_kv: int
    recurrent: int = 0
    conv: int = 0
    replay: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> StateSizes:
        """Return the sizes of the state that `config` describes."""
        spec = config.state_spec
        kv = {paged.layer: prod(paged.shape) for paged in spec.paged}
        main_kv = sum(num for layer, num in kv.items() if layer < config.num_layers)
        numbers = Counter[str]()
        for recurrent in spec.recurrent:
            for shape, dtype in zip(recurrent.shapes, recurrent.dtypes, strict=True):
                numbers[dtype] += prod(shape)
        mtp_kv = sum(kv.values()) - main_kv
        return cls(main_kv, mtp_kv, numbers["float32"], numbers["model"], config.replay_width)

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of one token's KV in the backbone's layers."""
        return KV_BYTES * self.kv

    @property
    def mtp_kv_bytes(self) -> int:
        """Return the bytes of one token's KV in the MTP module."""
        return KV_BYTES * self.mtp_kv

    @property
    def sequence_bytes(self) -> int:
        """Return the bytes of the part of the state that does not grow with the sequence."""
        return STATE_BYTES * self.recurrent + KV_BYTES * self.conv


@dataclass(frozen=True)
class ModelSizes:
    """`ModelSizes` describe a model in numbers that follow from its config, and from its files if they are there.

    Methods that return bytes take the weight formats of a checkpoint in `dtype`:

    - `counts`, if it has an entry for the dtype. Matrices that are not counted are bf16.
    - `recipes` otherwise, the formats of a public checkpoint by role, except for the `excluded` matrices.
    """

    model_type: str
    config: ModelConfig
    files: CheckpointFiles | None
    counts: Mapping[Dtype, Counts]
    recipes: Mapping[Dtype, Mapping[str, WeightFormat]]
    excluded: Mapping[tuple[str, bool], int]

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def max_context(self) -> int:
        """Return the longest context in tokens for which the model was trained."""
        return self.config.max_position_embeddings

    @property
    def matrices(self) -> tuple[MatrixGroup, ...]:
        return self.config.matrices

    @property
    def experts(self) -> ExpertShape:
        """Return the shape of the first layer's routed experts, which all layers with routed experts share."""
        return self.config.expert_shapes[0]

    @cached_property
    def main_layers(self) -> tuple[int, ...]:
        """Return the layers with routed experts, without the layers of the MTP module."""
        shapes, num_layers = self.config.expert_shapes, self.config.num_layers
        return tuple(shape.layer for shape in shapes if shape.layer < num_layers)

    @cached_property
    def state(self) -> StateSizes:
        return StateSizes.of(self.config)

    @property
    def has_mtp(self) -> bool:
        """Return True if the checkpoint contains an MTP module."""
        return any(matrices.is_mtp for matrices in self.matrices)

    @cached_property
    def params(self) -> dict[str, int]:
        """Return the number of parameters of each part; the parts of the MTP module are called `mtp …`."""
        return self._by_part(lambda one: one.num_params)

    @property
    def num_params(self) -> int:
        """Return the number of parameters of the model without the MTP module."""
        return sum(num for part, num in self.params.items() if not part.startswith("mtp "))

    def stored(self, dtype: Dtype) -> dict[str, int]:
        """Return the bytes of each part in the checkpoint; the parts are named as in `params`."""
        return self._by_part(lambda one: _nbytes(one, self._storages(one, dtype)))

    @cached_property
    def backbone_bytes(self) -> int:
        """Return the bytes on the backbone's GPU: everything except routed experts and copies."""
        return sum(self._held(one) for one in self.matrices if one.part not in ("routed", "copies"))

    @property
    def step_bytes(self) -> int:
        """Return the bytes of the backbone's weights that one decode step without drafts reads.

        The embedding is not counted, because a step reads only single rows of the embedding.
        """
        return sum(self._held(one) for one in self._step)

    @property
    def step_params(self) -> int:
        """Return the number of the backbone's parameters that a step multiplies with every token."""
        return sum(one.num_params for one in self._step)

    @property
    def _step(self) -> list[MatrixGroup]:
        """Return the matrices of the backbone that one decode step without drafts reads."""
        # If the model has no head of its own, the embedding is also the head.
        has_head = any(one.part == "head" for one in self.matrices)
        skipped = ("routed", "copies", "embedding") if has_head else ("routed", "copies")
        return [one for one in self.matrices if one.part not in skipped and not one.is_mtp]

    def layer_specs(self, dtype: Dtype) -> tuple[LayerSpec, ...]:
        """Return a `LayerSpec` for each layer with routed experts; the layers of the MTP module come last.

        `expert_bytes` are the stored bytes. All layers count as equally large, but the MTP module's layers may have
        other formats than the main layers. `expert_memory` computes the memory on GPUs.
        """
        total, num_experts = Counter[bool](), Counter[bool]()
        for one in self.matrices:
            if one.part == "routed":
                total[one.is_mtp] += sum(
                    num * (BF16 if storage.format == "plain" else storage).nbytes(one.rows, one.columns)
                    for storage, num in self._storages(one, dtype)
                )
        memory = expert_memory(self.config.expert_shapes, BF16, is_packed=False, is_pinned=True)
        num_layers = self.config.num_layers
        for shape in self.config.expert_shapes:
            num_experts[shape.layer >= num_layers] += shape.num_experts
        specs = []
        for shape in self.config.expert_shapes:
            is_mtp = shape.layer >= num_layers
            nbytes = ceil(total[is_mtp] / num_experts[is_mtp])
            on_gpu = ExpertMemory(device=memory[shape.layer].device, host=pinned_bytes([nbytes]))
            specs.append(LayerSpec.of(shape, nbytes, {GPU: on_gpu}))
        return tuple(specs)

    def _held(self, one: MatrixGroup) -> int:
        """Return the bytes of the matrices on a GPU, where numbers of HELD_FP32 are fp32 and all others bf16.

        A GPU widens quantized matrices when it loads them.
        """
        return one.count * (FP32 if one.role.endswith(HELD_FP32) else BF16).nbytes(one.rows, one.columns)

    def _storages(self, one: MatrixGroup, dtype: Dtype) -> Iterator[tuple[Storage, int]]:
        """Yield each storage of the matrices `one` in a checkpoint, and the number of matrices stored like this."""
        key, left = (one.role, one.is_mtp), one.count
        if dtype in self.counts:
            for storage, num in self.counts[dtype].get(key, {}).items():
                yield storage, min(left, num)
                left -= min(left, num)
        elif (format := self.recipes[dtype].get(one.role)) and self._is_quantized(one, dtype):
            num = max(0, left - self.excluded.get(key, 0))
            yield Storage(format), num
            left -= num
        yield (FP32 if one.role.endswith(STORED_FP32) else BF16), left

    def _is_quantized(self, one: MatrixGroup, dtype: Dtype) -> bool:
        """Return True if a recipe holds for `one`: if it is no copy, and not in an MTP module that stays bf16."""
        return one.part != "copies" and (not one.is_mtp or (self.model_type, dtype) in QUANTIZED_MTP)

    def _by_part(self, value: Callable[[MatrixGroup], int]) -> dict[str, int]:
        """Return the sum of `value` over the matrices of each part, in the order of PARTS."""
        sums: Counter[str] = Counter()
        for one in self.matrices:
            mtp = one.part if one.part in ("routed", "copies") else "backbone"
            sums[f"mtp {mtp}" if one.is_mtp else one.part] += value(one)
        return {part: sums[part] for part in PARTS if part in sums}


def _nbytes(one: MatrixGroup, storages: Iterable[tuple[Storage, int]]) -> int:
    return sum(num * storage.nbytes(one.rows, one.columns) for storage, num in storages if num)


def model_sizes(raw: Mapping[str, Any], directory: Path | None = None) -> ModelSizes:
    """Return the sizes of the model that a parsed `config.json` describes.

    If all files of the checkpoint are in `directory`, their headers say how the matrices are stored. Raises ValueError
    that names the key or the tensor if the config or a file has something wrong or something that is not supported.
    """
    config = _config(raw)
    files = read_files(directory, config.num_layers) if directory else None
    if files is not None:
        config = _config(files.completed(raw))
        _check_counts(config, files)
        counts: dict[Dtype, Counts] = {files.dtype: files.counts}
    else:
        known = {dtype: known_counts(raw, dtype, config.num_layers) for dtype in DTYPES}
        counts = {dtype: found for dtype, found in known.items() if found is not None}
        _check_roles(config, counts.values())
    recipes = {dtype: recipe(raw, dtype) for dtype in DTYPES}
    return ModelSizes(str(raw["model_type"]), config, files, counts, recipes, excluded(raw, config.num_layers))


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    """Return the checked config; its quantization is left out, because a family may not serve this quantization."""
    config = parse_config({key: value for key, value in raw.items() if key != "quantization_config"})
    if not config.expert_shapes:
        raise ValueError("config.json describes no layer with routed experts, so there is nothing to put on shards")
    return config


def _check_roles(config: ModelConfig, lists: Iterable[Counts]) -> None:
    """Raise ValueError if a list of quantized matrices has a role that the config does not describe."""
    roles = {(one.role, one.is_mtp) for one in config.matrices if one.columns > 1}
    for role, is_mtp in (key for counts in lists for key in counts if key not in roles):
        place = " in the MTP module" if is_mtp else ""
        raise ValueError(f"config.json lists {role}{place} as quantized, but describes no such matrix")


def _check_counts(config: ModelConfig, files: CheckpointFiles) -> None:
    """Raise ValueError if the files do not have as many matrices of each role as the config describes."""
    for one in config.matrices:
        found = sum(files.counts.get((one.role, one.is_mtp), {}).values())
        if found != one.count and one.part != "copies":
            place = " in its MTP module" if one.is_mtp else ""
            raise ValueError(f"the checkpoint has {found} of {one.count} tensors called {one.role}{place}")
