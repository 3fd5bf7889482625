"""A fit says if a model can be deployed on one kind of GPU, and how many GPUs it needs.

Memory is counted to the byte, and the time of a step is estimated. Three rules decide:

- A backbone is one GPU, whose memory holds the backbone's weights and the state of the backbone's requests. On GPUs,
  quantized weights take the memory of bf16, because they are widened when they are loaded.
- One home of every expert still fits on the expert GPUs when any one of these GPUs is lost.
- A step and its transfers take no longer than the time allowed between tokens; TRANSFER_SHARE of this time is kept for
  the transfers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from cluster.sizing.gpus import GB, Gpu
from cluster.sizing.model_sizes import GPU, ModelSizes
from cluster.sizing.step_time import StepCosts
from cluster.sizing.weight_formats import Dtype

GIB = 2**30
# Share of a GPU's memory that the sizing plans to fill; the rest is for activations, kernels and fragmentation.
USABLE = 0.9
SAVED_SHARE = 0.25  # Share of the state memory for state checkpoints, from which later prompts start.
# Memory for experts divided by the experts' size. Experts cannot be split, and hot experts need more homes.
MARGIN = 1.1
PAGE = 16  # Tokens in one page of KV.
TRANSFER_SHARE = 0.2  # Share of the time between tokens that is kept for transfers.
DRAFT_TOKENS = 4  # Maximum number of tokens that are drafted at once for a request.
UNREAD_TOKENS = 128  # Maximum number of tokens of a request that the MTP module has not read yet.
MAX_REQUESTS = 100_000
NUM_HOMES = 2  # Number of homes that every expert needs for full cover.


@dataclass(frozen=True)
class Slo:
    """An `Slo` states what a deployment must serve.

    - `num_requests`: the number of requests that decode at the same time.
    - `context_len`: the context of each request, in tokens.
    - `itl_ms`: the time between two tokens of a request, in milliseconds.
    - `min_backbones`: the minimum number of backbones.
    - `call_ms`: the time of a layer call without the shards' computation, in milliseconds; 0.4 ms were measured over
      plain TCP on one small machine.
    """

    num_requests: int = 64
    context_len: int = 8192
    itl_ms: float = 100.0
    min_backbones: int = 1
    call_ms: float = 0.4

    def __post_init__(self) -> None:
        if not 1 <= self.num_requests <= MAX_REQUESTS:
            raise ValueError(f"{self.num_requests} requests cannot be sized for; allowed are 1 to {MAX_REQUESTS:,}")
        if self.context_len < 1:
            raise ValueError(f"a context of {self.context_len} tokens cannot be sized for; allowed is 1 or more")
        if not 0 < self.itl_ms < float("inf"):
            raise ValueError(f"{self.itl_ms:g} ms between tokens cannot be sized for; allowed is a positive number")
        if not 0 <= self.call_ms < float("inf"):
            raise ValueError(f"{self.call_ms:g} ms for a call cannot be sized for; allowed is a number from 0 up")
        if not 1 <= self.min_backbones <= self.num_requests:
            raise ValueError(
                f"at least {self.min_backbones} backbones for {self.num_requests} requests cannot be sized for; "
                "allowed is up to one for each request"
            )


def whole_gib(num_bytes: float) -> int:
    """Return `num_bytes` rounded up to whole GiB, in bytes."""
    return ceil(num_bytes / GIB) * GIB


@dataclass(frozen=True)
class Fit:
    """A `Fit` computes how many GPUs of one kind a model needs for an `Slo`, and why it may not fit at all."""

    model: ModelSizes
    gpu: Gpu
    dtype: Dtype
    slo: Slo

    @property
    def why_not(self) -> str | None:
        """Return why the model does not fit the GPU or the SLO, without a final full stop; None if the model fits."""
        gpu, slo = self.gpu.name, self.slo
        if self.max_requests < 1:
            needed = self.weight_bytes + whole_gib(self.request_bytes / (1 - SAVED_SHARE))
            return (
                f"a backbone is one GPU: {self.weight_bytes / GB:.1f} GB of bf16 weights and one request of "
                f"{slo.context_len:,} tokens need {needed / GB:.1f} GB, and {gpu} has {self.usable_bytes / GB:.1f} GB "
                "for them"
            )
        if self.fewest_shards is None:
            return f"an expert takes {self.largest_expert / GB:.1f} GB, and {gpu} has no memory for three experts"
        if self.fleet is None:
            num_calls = len(self.model.main_layers)
            return (
                f"no number of {gpu} decodes a token every {slo.itl_ms:g} ms in {self.dtype}: the fastest fleet would "
                f"take {self.fastest_ms:.1f} ms, with {num_calls} calls to shards of {slo.call_ms:g} ms"
            )
        return None

    # Memory

    @cached_property
    def weight_bytes(self) -> int:
        """Return the bytes of a backbone's weights."""
        return self.model.backbone_bytes

    @property
    def usable_bytes(self) -> int:
        """Return how many bytes of a GPU's memory the sizing plans to fill, in whole GiB."""
        return int(USABLE * self.gpu.memory_bytes) // GIB * GIB

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of a request's KV pages, including the KV pages of the MTP module."""
        state = self.model.state
        return ceil(self.slo.context_len / PAGE) * PAGE * (state.kv_bytes + state.mtp_kv_bytes)

    @property
    def draft_bytes(self) -> int:
        """Return the bytes that a request needs for drafts, in addition to its state; 0 without an MTP module.

        The bytes hold two groups of fp32 numbers: the hidden vectors that the MTP module has not read yet, and the
        numbers with which recurrent layers advance over the accepted drafts.
        """
        if not self.model.has_mtp:
            return 0
        return 4 * (UNREAD_TOKENS * self.model.hidden_size + (DRAFT_TOKENS + 1) * self.model.state.replay)

    @property
    def request_bytes(self) -> int:
        """Return the bytes of a request's whole state: KV, recurrent state and drafts."""
        return self.kv_bytes + self.model.state.sequence_bytes + self.draft_bytes

    @cached_property
    def max_requests(self) -> int:
        """Return the maximum number of requests whose state fits in the memory of one backbone."""
        state_bytes = (self.usable_bytes - self.weight_bytes) // GIB * GIB
        return max(0, int(state_bytes * (1 - SAVED_SHARE)) // self.request_bytes)

    @property
    def fewest_backbones(self) -> int:
        """Return how many backbones the state of all requests needs, but at least `min_backbones`."""
        return max(self.slo.min_backbones, ceil(self.slo.num_requests / self.max_requests))

    @cached_property
    def experts_bytes(self) -> int:
        """Return the bytes of device memory that all experts together take, with one home each."""
        return sum(spec.num_experts * spec.on_device(GPU) for spec in self.model.layer_specs(self.dtype))

    @cached_property
    def standbys_bytes(self) -> int:
        """Return the bytes of host memory that all experts together take, with one standby each."""
        return sum(spec.num_experts * spec.in_host_memory(GPU) for spec in self.model.layer_specs(self.dtype))

    @cached_property
    def largest_expert(self) -> int:
        """Return the bytes of device memory that the largest expert takes."""
        return max(spec.on_device(GPU) for spec in self.model.layer_specs(self.dtype))

    @property
    def shard_bytes(self) -> int:
        """Return the bytes for experts on one GPU, limited to the bytes of all experts and one free slot for moves."""
        return min(self.usable_bytes, whole_gib(self.experts_bytes + self.largest_expert))

    @property
    def min_filled_bytes(self) -> int:
        """Return the minimum bytes of experts on a shard that has no room for a further expert.

        One slot stays free for moves. Experts cannot be split, so a part smaller than one expert may also stay unused.
        """
        return self.shard_bytes - 2 * self.largest_expert

    @property
    def holds_all_experts(self) -> bool:
        """Return True if one shard can hold every expert, with a free slot for moves."""
        return self.shard_bytes >= self.experts_bytes + self.largest_expert

    @cached_property
    def fewest_shards(self) -> int | None:
        """Return the minimum number of shards for the experts' memory; None if a shard has no memory for three experts.

        One home of every expert must fit when any one shard is lost. When no shard is lost, MARGIN times the bytes of
        all experts must fit, so that hot experts can have more homes.
        """
        if self.holds_all_experts:
            return 2
        if self.min_filled_bytes < 1:
            return None
        after_a_loss = 1 + ceil(self.experts_bytes / self.min_filled_bytes)
        return max(after_a_loss, ceil(MARGIN * self.experts_bytes / self.shard_bytes))

    def has_device_cover(self, num_shards: int) -> bool:
        """Return True if two homes of every expert fit in device memory, also after the loss of one of the shards.

        The result is also True if one shard can hold every expert. Two such shards are enough, although only one home
        of every expert is left when one of the two shards is lost.
        """
        return self.holds_all_experts or (num_shards - 1) * self.min_filled_bytes >= NUM_HOMES * self.experts_bytes

    # Time

    @cached_property
    def costs(self) -> StepCosts:
        """Return the estimates of how long each part of a step takes."""
        return StepCosts(self.model, self.gpu, self.dtype, self.slo.call_ms)

    @property
    def step_limit_ms(self) -> float:
        """Return how long a step may take without the transfers, in milliseconds."""
        return (1 - TRANSFER_SHARE) * self.slo.itl_ms

    def batch(self, num_backbones: int) -> int:
        """Return the number of requests on the fullest of `num_backbones` backbones."""
        return ceil(self.slo.num_requests / num_backbones)

    def step_parts_ms(self, num_backbones: int, num_shards: int) -> dict[str, float]:
        """Return the time of each part of a step in milliseconds: layer calls, backbone and experts."""
        batch = self.batch(num_backbones)
        return {
            "calls": self.costs.calls_ms,
            "backbone": self.costs.backbone_ms(batch, self.slo.context_len),
            "experts": self.costs.experts_ms(num_backbones, batch, num_shards),
        }

    def is_fast(self, num_backbones: int, num_shards: int) -> bool:
        """Return True if a step of `num_backbones` backbones and `num_shards` shards stays within `step_limit_ms`."""
        return sum(self.step_parts_ms(num_backbones, num_shards).values()) <= self.step_limit_ms

    @cached_property
    def fleet(self) -> tuple[int, int] | None:
        """Return the numbers of backbones and shards with the fewest GPUs in total; None if no fleet is fast enough.

        Among several choices with the same total, the choice with the fewest backbones is returned.
        """
        assert self.fewest_shards is not None
        best = None
        if self.fastest_ms > self.slo.itl_ms:
            return best
        for num_backbones in range(self.fewest_backbones, self.slo.num_requests + 1):
            if best and num_backbones + self.fewest_shards >= sum(best):
                break
            num_shards = self._search_shards(num_backbones, self.fewest_shards)
            if num_shards and (best is None or num_backbones + num_shards < sum(best)):
                best = num_backbones, num_shards
        return best

    def _search_shards(self, num_backbones: int, least: int) -> int | None:
        """Return the minimum number of shards, `least` or more, that is fast enough; None if there is none."""
        low, high = least, max(least, self.costs.max_useful_shards(num_backbones, self.batch(num_backbones)))
        if not self.is_fast(num_backbones, high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.is_fast(num_backbones, middle) else (middle + 1, high)
        return low

    @property
    def fastest_ms(self) -> float:
        """Return the shortest possible time between tokens in milliseconds, with any number of GPUs."""
        return self.costs.fastest_ms(self.slo.context_len) / (1 - TRANSFER_SHARE)
