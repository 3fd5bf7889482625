"""What a model is made of, in numbers: its weights by part, the state of a request, the shapes of its experts.

`cluster/sizing/model_configs.py` reads them from a `config.json`. Legend of the parts: mixers are attention, Mamba-2 and
DeltaNet layers; latent, the projections to and from the width that Nemotron's experts work in; copies, the embedding
and head that DeepSeek's checkpoints bring once more for the MTP module, and that no device needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from cluster.sizing.weight_formats import RECIPES, Counts, Dtype, Format, matrix_bytes
from cluster.topology import LayerSpec

PARTS = (
    *("embedding", "head", "norms", "mixers", "routers", "latent", "shared", "dense", "routed"),
    *("mtp backbone", "mtp routed", "mtp copies"),
)
STATE_BYTES, KV_BYTES = 4, 2  # of a number of recurrent state, and of KV or of a convolution's inputs


@dataclass(frozen=True)
class Matrices:
    """`count` matrices (or vectors: one column) of one part; the role decides how they are quantized, if at all."""

    part: str
    role: str
    rows: int
    columns: int
    count: int
    is_mtp: bool = False

    @property
    def num_params(self) -> int:
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class ExpertSizes:
    """The routed experts: which layers have them, those of the MTP module last; one is `num_matrices` of one size."""

    layers: tuple[int, ...]
    num_mtp_layers: int
    num_experts: int
    top_k: int
    input_dim: int
    width: int
    num_matrices: int

    @property
    def num_params(self) -> int:
        """Of one expert."""
        return self.num_matrices * self.input_dim * self.width

    @property
    def main_layers(self) -> tuple[int, ...]:
        return self.layers[: len(self.layers) - self.num_mtp_layers]


@dataclass(frozen=True)
class StateSizes:
    """Numbers that a request leaves behind: a token's KV, in the backbone and in the MTP module; of a sequence the
    recurrent state (fp32) and the convolutions' inputs; of a token what a recurrent layer needs to replay it."""

    kv: int
    mtp_kv: int
    recurrent: int = 0
    conv: int = 0
    replay: int = 0

    @property
    def kv_bytes(self) -> int:
        """Of a token, without the MTP module's."""
        return KV_BYTES * self.kv

    @property
    def mtp_kv_bytes(self) -> int:
        return KV_BYTES * self.mtp_kv

    @property
    def sequence_bytes(self) -> int:
        """Of a sequence, however long."""
        return STATE_BYTES * self.recurrent + KV_BYTES * self.conv


@dataclass(frozen=True)
class ModelSizes:
    """A model as its config describes it. Bytes are of a checkpoint in the public layout of `dtype`."""

    model_type: str
    hidden_size: int
    max_context: int | None
    matrices: tuple[Matrices, ...]
    experts: ExpertSizes
    state: StateSizes
    counts: Mapping[Dtype, Counts]  # of the dtypes whose checkpoint is known matrix by matrix

    @property
    def has_mtp(self) -> bool:
        return any(matrices.is_mtp for matrices in self.matrices)

    @cached_property
    def params(self) -> dict[str, int]:
        """Parameters by part; the MTP module's parts are called `mtp …`."""
        return self._by_part(lambda one: one.num_params)

    @property
    def num_params(self) -> int:
        """Without the MTP module."""
        return sum(num for part, num in self.params.items() if not part.startswith("mtp "))

    def stored(self, dtype: Dtype) -> dict[str, int]:
        """Bytes in the checkpoint, by part as in `params`."""
        return self._by_part(lambda one: self._nbytes(one, dtype))

    def backbone_bytes(self, dtype: Dtype) -> int:
        """On the backbone's device: all but routed experts and copies. Routers are widened to fp32."""
        return sum(self._held(one, dtype) for one in self.matrices if one.part not in ("routed", "copies"))

    def step_bytes(self, dtype: Dtype) -> int:
        """Of the backbone's weights, what one decode step reads that drafts nothing: of the embedding, single rows."""
        return sum(self._held(one, dtype) for one in self._step)

    @property
    def step_params(self) -> int:
        """Of the backbone's parameters, those that a token is multiplied by."""
        return sum(one.num_params for one in self._step)

    @property
    def _step(self) -> list[Matrices]:
        has_head = any(one.part == "head" for one in self.matrices)  # else the embedding is the head
        skipped = ("routed", "copies", "embedding") if has_head else ("routed", "copies")
        return [one for one in self.matrices if one.part not in skipped and not one.is_mtp]

    def layer_specs(self, dtype: Dtype) -> tuple[LayerSpec, ...]:
        """The layers of experts as the planner knows them, the MTP module's last."""
        experts, num_main = self.experts, len(self.experts.main_layers)
        specs = []
        for i, layer in enumerate(experts.layers):
            is_mtp = i >= num_main
            total = sum(
                self._nbytes(one, dtype) for one in self.matrices if one.part == "routed" and one.is_mtp == is_mtp
            )
            num = experts.num_experts * (experts.num_mtp_layers if is_mtp else num_main)
            specs.append(LayerSpec(layer, experts.num_experts, ceil(total / num), experts.top_k))
        return tuple(specs)

    def _held(self, one: Matrices, dtype: Dtype) -> int:
        return 4 * one.num_params if one.role == "router" else self._nbytes(one, dtype)

    def _nbytes(self, one: Matrices, dtype: Dtype) -> int:
        return sum(num * matrix_bytes(format, one.rows, one.columns) for format, num in self._formats(one, dtype))

    def _formats(self, one: Matrices, dtype: Dtype) -> Iterator[tuple[Format, int]]:
        """How many of them are stored in which format."""
        plain: Format = "fp32" if one.role == "fp32" else "bf16"
        is_whole = self.model_type == "nemotron_h" or dtype == "nvfp4"  # then the MTP module is not quantized
        left = one.count
        if not (one.is_mtp and is_whole):
            if dtype in self.counts:
                total = sum(other.count for other in self.matrices if other.role == one.role and not other.is_mtp)
                for name, num in self.counts[dtype].get(one.role, {}).items():
                    quantized: Format = "nvfp4" if name == "nvfp4" else "fp8"
                    share = min(left, round(one.count * num / total))
                    left -= share
                    yield quantized, share
            elif recipe := RECIPES.get((self.model_type, dtype), {}).get(one.role):
                yield recipe, one.count
                left = 0
        yield plain, left

    def _by_part(self, value: Callable[[Matrices], int]) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for one in self.matrices:
            mtp = one.part if one.part in ("routed", "copies") else "backbone"
            sums[f"mtp {mtp}" if one.is_mtp else one.part] += value(one)
        return {part: sums[part] for part in PARTS if part in sums}
