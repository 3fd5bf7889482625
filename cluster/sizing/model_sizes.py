"""Model sizes describe a model in numbers: its weights by part, the state of a request, and the shapes of its experts.

`cluster/sizing/model_configs.py` computes model sizes from a `config.json`. Some of the parts are:

- mixers: attention, Mamba-2 and DeltaNet layers.
- latent: the projections to and from the width in which Nemotron's experts work.
- copies: the second embedding and head that DeepSeek's checkpoints contain for the MTP module. No device needs the
  copies.
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
STATE_BYTES = 4  # Bytes of one number of recurrent state (fp32).
KV_BYTES = 2  # Bytes of one number of KV or of a convolution's inputs (bf16).


@dataclass(frozen=True)
class Matrices:
    """`Matrices` are `count` matrices of one part and one shape in a model; a vector is a matrix with one column.

    The `role` determines whether and how the matrices are quantized.
    """

    part: str
    role: str
    rows: int
    columns: int
    count: int
    is_mtp: bool = False

    @property
    def num_params(self) -> int:
        """Return the number of parameters of all `count` matrices."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class ExpertSizes:
    """`ExpertSizes` describe the routed experts of a model.

    `layers` are the layers with routed experts; the layers of the MTP module come last. One expert consists of
    `num_matrices` matrices of `input_dim` by `width` numbers.
    """

    layers: tuple[int, ...]
    num_mtp_layers: int
    num_experts: int
    top_k: int
    input_dim: int
    width: int
    num_matrices: int

    @property
    def num_params(self) -> int:
        """Return the number of parameters of one expert."""
        return self.num_matrices * self.input_dim * self.width

    @property
    def main_layers(self) -> tuple[int, ...]:
        """Return the layers with routed experts, without the layers of the MTP module."""
        return self.layers[: len(self.layers) - self.num_mtp_layers]


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
    """`ModelSizes` describe a model in numbers that follow from its config.

    Methods that return bytes assume the weight formats of a public checkpoint in `dtype`. `counts` has entries only for
    dtypes whose quantized matrices the config lists.
    """

    model_type: str
    hidden_size: int
    max_context: int | None
    matrices: tuple[Matrices, ...]
    experts: ExpertSizes
    state: StateSizes
    counts: Mapping[Dtype, Counts]  # Numbers of quantized matrices by dtype, role and format.

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
        return self._by_part(lambda one: self._nbytes(one, dtype))

    def backbone_bytes(self, dtype: Dtype) -> int:
        """Return the bytes on the backbone's device: everything except routed experts and copies.

        Routers are widened to fp32.
        """
        return sum(self._held(one, dtype) for one in self.matrices if one.part not in ("routed", "copies"))

    def step_bytes(self, dtype: Dtype) -> int:
        """Return the bytes of the backbone's weights that one decode step without drafts reads.

        The embedding is not counted, because a step reads only single rows of the embedding.
        """
        return sum(self._held(one, dtype) for one in self._step)

    @property
    def step_params(self) -> int:
        """Return the number of the backbone's parameters that a step multiplies with every token."""
        return sum(one.num_params for one in self._step)

    @property
    def _step(self) -> list[Matrices]:
        """Return the matrices of the backbone that one decode step without drafts reads."""
        # If the model has no head of its own, the embedding is also the head.
        has_head = any(one.part == "head" for one in self.matrices)
        skipped = ("routed", "copies", "embedding") if has_head else ("routed", "copies")
        return [one for one in self.matrices if one.part not in skipped and not one.is_mtp]

    def layer_specs(self, dtype: Dtype) -> tuple[LayerSpec, ...]:
        """Return a `LayerSpec` for each layer with routed experts; the layers of the MTP module come last."""
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
        """Return the bytes of the matrices on a device, where routers are fp32."""
        return 4 * one.num_params if one.role == "router" else self._nbytes(one, dtype)

    def _nbytes(self, one: Matrices, dtype: Dtype) -> int:
        """Return the bytes of the matrices in a checkpoint."""
        return sum(num * matrix_bytes(format, one.rows, one.columns) for format, num in self._formats(one, dtype))

    def _formats(self, one: Matrices, dtype: Dtype) -> Iterator[tuple[Format, int]]:
        """Yield each storage format of the matrices `one`, and the number of matrices in this format."""
        plain: Format = "fp32" if one.role == "fp32" else "bf16"
        is_mtp_plain = self.model_type == "nemotron_h" or dtype == "nvfp4"  # True if the MTP module is not quantized.
        left = one.count
        if not (one.is_mtp and is_mtp_plain):
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
        """Return the sum of `value` over the matrices of each part, in the order of PARTS."""
        sums: Counter[str] = Counter()
        for one in self.matrices:
            mtp = one.part if one.part in ("routed", "copies") else "backbone"
            sums[f"mtp {mtp}" if one.is_mtp else one.part] += value(one)
        return {part: sums[part] for part in PARTS if part in sums}
