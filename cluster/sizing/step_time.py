"""How long a decode step takes at best, and what it sends, by arithmetic on data sheets: nothing here is measured.

Reading weights and state rules a decode step, so times follow from bytes and memory bandwidth; multiplying counts
where it takes longer. Of a data sheet's figures, BANDWIDTH_SHARE and FLOPS_SHARE are counted on. Routing is taken as
uniform, which touches the most experts; real picks touch fewer, but less evenly.

Legend: E experts of a layer, K picks of a token, L expert input, P shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, comb

from cluster.sizing.gpus import Gpu
from cluster.sizing.model_sizes import STATE_BYTES, ModelSizes
from cluster.sizing.weight_formats import Dtype

BANDWIDTH_SHARE, FLOPS_SHARE = 0.6, 0.4
BALANCE = 0.8  # a batch's mean load of a shard over that of the busiest, where rows go to the less busy of two homes
ROW_BYTES, SUM_BYTES = 2, 4  # of a number on its way to a shard (bf16) and back (int32)
PICK_BYTES, GRID_BYTES = 12, 2  # beside the rows: row, expert and weight of a pick; the unit of a row's sums


def unique_shards(num_experts: int, top_k: int, num_shards: int) -> float:
    """On how many of P shards the K picks of a token lie, where each has its even part of a layer's experts."""
    small, num_large = divmod(num_experts, num_shards)
    nowhere = sum(
        num * comb(num_experts - held, top_k)
        for held, num in ((small, num_shards - num_large), (small + 1, num_large))
        if num
    )
    return num_shards - nowhere / comb(num_experts, top_k)


def touched_experts(num_experts: int, top_k: int, num_rows: int) -> float:
    """How many experts of a layer a batch picks from, of independent rows."""
    return float(num_experts * (1 - (1 - top_k / num_experts) ** num_rows))


@dataclass(frozen=True)
class Wire:
    """Bytes of one token on their way to shards and back, over all layers of experts but the MTP module's."""

    out: int
    back: int

    @property
    def total(self) -> int:
        return self.out + self.back


def wire_of(model: ModelSizes, num_shards: int) -> Wire:
    """What Expertmesh's messages carry: a row for each shard that it goes to, and one sum from each."""
    experts = model.experts
    shards = unique_shards(experts.num_experts, experts.top_k, num_shards)
    out = shards * (ROW_BYTES * experts.input_dim + GRID_BYTES) + PICK_BYTES * experts.top_k
    num_layers = len(experts.main_layers)
    return Wire(round(num_layers * out), round(num_layers * shards * SUM_BYTES * experts.input_dim))


@dataclass(frozen=True)
class StepCosts:
    """A model in one dtype on one GPU: milliseconds of the parts of a decode step."""

    model: ModelSizes
    gpu: Gpu
    dtype: Dtype
    call_ms: float

    @property
    def calls_ms(self) -> float:
        """One call to the shards of each layer, beside what they compute."""
        return self.call_ms * len(self.model.experts.main_layers)

    def backbone_ms(self, num_rows: int, context_len: int) -> float:
        """Weights once, and every request's KV and recurrent state, which is written back."""
        state = self.model.state
        per_row = context_len * state.kv_bytes + STATE_BYTES * state.recurrent + state.sequence_bytes
        num_bytes = self._step_bytes + num_rows * per_row
        return self._longer_ms(num_bytes, 2.0 * num_rows * self._step_params)

    def experts_ms(self, num_backbones: int, num_rows: int, num_shards: int) -> float:
        """Of the busiest shard, which computes the calls of backbones one after the other: `num_rows` rows of each.

        Calls for the same experts go to different homes where there are; a shard that is called reads one at least.
        """
        experts, share = self.model.experts, num_backbones / (BALANCE * num_shards)
        num_read = max(1.0, share * touched_experts(experts.num_experts, experts.top_k, num_rows))
        num_picks = max(1.0, share * num_rows * experts.top_k)
        one_ms = self._longer_ms(num_read * self._expert_bytes, 2.0 * num_picks * experts.num_params)
        return len(experts.main_layers) * one_ms

    def most_shards(self, num_backbones: int, num_rows: int) -> int:
        """More make nothing faster: with so many, the busiest computes one pick of a layer."""
        return ceil(num_backbones * num_rows * self.model.experts.top_k / BALANCE)

    def fastest_ms(self, context_len: int) -> float:
        """Of a step, with as many backbones as requests and as many shards as help."""
        return self.calls_ms + self.backbone_ms(1, context_len) + self.experts_ms(1, 1, self.most_shards(1, 1))

    @cached_property
    def _step_bytes(self) -> int:
        return self.model.step_bytes(self.dtype)

    @cached_property
    def _step_params(self) -> int:
        return self.model.step_params

    @cached_property
    def _expert_bytes(self) -> int:
        return self.model.layer_specs(self.dtype)[0].expert_bytes

    def _longer_ms(self, num_bytes: float, flops: float) -> float:
        fastest = self.gpu.bf16_flops if self.dtype == "bf16" else self.gpu.fp8_flops or self.gpu.bf16_flops
        return 1e3 * max(num_bytes / (BANDWIDTH_SHARE * self.gpu.bytes_per_s), flops / (FLOPS_SHARE * fastest))
