"""The step time is how long a decode step takes at best, computed from data sheets; nothing is measured.

Reading weights and state takes most of a decode step, so times follow from bytes and memory bandwidth. If the
multiplications take longer, the time of the multiplications counts instead (roofline model). A GPU is assumed to reach
only BANDWIDTH_SHARE and FLOPS_SHARE of the figures on data sheets. Routing is assumed to be uniform. Uniform routing
touches the most experts. Real picks touch fewer experts, but load the shards less evenly.

Legend: E: experts of a layer. K: picks of a token. L: width of an expert's input. P: shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, comb

from cluster.sizing.gpus import Gpu
from cluster.sizing.model_sizes import GPU, STATE_BYTES, ModelSizes
from cluster.sizing.weight_formats import Dtype

BANDWIDTH_SHARE, FLOPS_SHARE = 0.6, 0.4  # Assumed shares of a data sheet's bandwidth and FLOP/s.
BALANCE = 0.8  # Balancedness of a batch's load on the shards if each row goes to the less busy of two homes.
ROW_BYTES, SUM_BYTES = 2, 4  # Bytes of one number on the way to a shard (bf16) and back (int32).
PICK_BYTES = 12  # Bytes of one pick in a message: the row, the expert and the weight.
GRID_BYTES = 2  # Bytes of a row's grid in a message. A row's sums are multiples of the row's grid.


def unique_shards(num_experts: int, top_k: int, num_shards: int, num_groups: int = 1, top_groups: int = 1) -> float:
    """Return the expected number of shards that hold the picks of a token, if all shards hold equally many experts.

    A router with groups picks only from the experts of `top_groups` of its `num_groups` groups. The planner spreads the
    experts of each group over all shards, so a shard holds equally many experts of the groups of a token.
    """
    pickable = num_experts // num_groups * top_groups
    small, num_large = divmod(pickable, num_shards)
    nowhere = sum(
        num * comb(pickable - held, top_k)
        for held, num in ((small, num_shards - num_large), (small + 1, num_large))
        if num
    )
    return num_shards - nowhere / comb(pickable, top_k)


def shards_of_token(model: ModelSizes, num_shards: int) -> float:
    """Return the expected number of shards that a token of `model` goes to in one layer."""
    experts, config = model.experts, model.config
    return unique_shards(experts.num_experts, experts.top_k, num_shards, config.n_group, config.topk_group)


def touched_experts(num_experts: int, top_k: int, num_rows: int) -> float:
    """Return the expected number of experts of a layer that a batch of independent rows picks."""
    return float(num_experts * (1 - (1 - top_k / num_experts) ** num_rows))


@dataclass(frozen=True)
class Wire:
    """A `Wire` holds the bytes of one token on the way to the shards (`out`) and back (`back`).

    `out` and `back` count all layers of experts except the layers of the MTP module.
    """

    out: int
    back: int

    @property
    def total(self) -> int:
        return self.out + self.back


def wire_of(model: ModelSizes, num_shards: int) -> Wire:
    """Return the bytes of one token in Expertmesh's messages.

    The token's row goes to each shard that computes a pick of the token, and each of these shards returns one sum.
    """
    experts = model.experts
    shards = shards_of_token(model, num_shards)
    out = shards * (ROW_BYTES * experts.input_dim + GRID_BYTES) + PICK_BYTES * experts.top_k
    num_layers = len(model.main_layers)
    return Wire(round(num_layers * out), round(num_layers * shards * SUM_BYTES * experts.input_dim))


@dataclass(frozen=True)
class StepCosts:
    """`StepCosts` estimate the milliseconds of each part of a decode step, for a model in one dtype on one GPU."""

    model: ModelSizes
    gpu: Gpu
    dtype: Dtype
    call_ms: float

    @property
    def calls_ms(self) -> float:
        """Return the time of all layer calls of a step in milliseconds, without the shards' computation."""
        return self.call_ms * len(self.model.main_layers)

    def backbone_ms(self, num_rows: int, context_len: int) -> float:
        """Return the time that a backbone computes in a step with `num_rows` requests, in milliseconds.

        A step reads the weights once, and every request's KV and recurrent state; the recurrent state is also written
        back.
        """
        state = self.model.state
        per_row = context_len * state.kv_bytes + STATE_BYTES * state.recurrent + state.sequence_bytes
        num_bytes = self._step_bytes + num_rows * per_row
        return self._roofline_ms(num_bytes, 2.0 * num_rows * self._step_params)

    def experts_ms(self, num_backbones: int, num_rows: int, num_shards: int) -> float:
        """Return the computing time in milliseconds of the busiest shard in one step of all backbones.

        Each of the `num_backbones` backbones sends `num_rows` rows. The shard computes the calls of the backbones one
        after the other. If an expert has several homes, the calls of different backbones go to different homes. A shard
        that is called reads at least one expert.
        """
        experts, share = self.model.experts, num_backbones / (BALANCE * num_shards)
        num_read = max(1.0, share * touched_experts(experts.num_experts, experts.top_k, num_rows))
        num_picks = max(1.0, share * num_rows * experts.top_k)
        one_ms = self._roofline_ms(num_read * self._expert_bytes, 2.0 * num_picks * experts.num_params)
        return len(self.model.main_layers) * one_ms

    def max_useful_shards(self, num_backbones: int, num_rows: int) -> int:
        """Return the number of shards with which the busiest shard computes a single pick; more shards do not help."""
        return ceil(num_backbones * num_rows * self.model.experts.top_k / BALANCE)

    def fastest_ms(self, context_len: int) -> float:
        """Return the shortest possible step time in ms: one backbone per request, and `max_useful_shards` shards."""
        return self.calls_ms + self.backbone_ms(1, context_len) + self.experts_ms(1, 1, self.max_useful_shards(1, 1))

    @cached_property
    def _step_bytes(self) -> int:
        return self.model.step_bytes

    @cached_property
    def _step_params(self) -> int:
        return self.model.step_params

    @cached_property
    def _expert_bytes(self) -> int:
        return self.model.layer_specs(self.dtype)[0].on_device(GPU)

    def _roofline_ms(self, num_bytes: float, flops: float) -> float:
        """Return the time to read `num_bytes` or the time to compute `flops`, whichever is longer, in milliseconds."""
        reading_s = num_bytes / (BANDWIDTH_SHARE * self.gpu.bytes_per_s)
        return 1e3 * max(reading_s, flops / (FLOPS_SHARE * self.gpu.bf16_flops))
