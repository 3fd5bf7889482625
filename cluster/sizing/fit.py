"""Whether a model fits one kind of GPU, and how many it takes: memory to the byte, pace by estimate.

Three rules decide. A backbone is one GPU, whose memory holds its weights and the state of its requests. On expert GPUs
one home of every expert still fits when any one of them is lost. And a step takes no longer than the time that is
allowed between tokens, of which TRANSFER_SHARE is kept for what is on the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from cluster.sizing.gpus import GB, Gpu
from cluster.sizing.model_sizes import ModelSizes
from cluster.sizing.step_time import StepCosts
from cluster.sizing.weight_formats import Dtype

GIB = 2**30
USABLE = 0.9  # of a GPU's memory: the rest is for activations, kernels and fragments
SAVED_SHARE = 0.25  # of state memory, for states that later prompts start from
MARGIN = 1.1  # experts cannot be cut to make shares even, and hot ones want copies
PAGE = 16  # tokens of KV
TRANSFER_SHARE = 0.2
DRAFT_TOKENS, UNREAD_TOKENS = 4, 128  # at most: of a request, drafted at once; not yet read by the MTP module
MAX_REQUESTS = 100_000
NUM_HOMES = 2


@dataclass(frozen=True)
class Slo:
    """What is wanted: so many requests at once, each with a context of so many tokens, and so long between tokens.

    `call_ms` is what a call to the shards of one layer takes beside what they compute; 0.4 ms were measured over plain
    TCP on one small machine.
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
    """The next whole number of GiB, in bytes."""
    return ceil(num_bytes / GIB) * GIB


@dataclass(frozen=True)
class Fit:
    """A model on one kind of GPU."""

    model: ModelSizes
    gpu: Gpu
    dtype: Dtype
    slo: Slo

    @property
    def why_not(self) -> str | None:
        """Why it cannot be: a sentence without its end."""
        gpu, slo = self.gpu.name, self.slo
        if self.most_requests < 1:
            needed = self.weights + whole_gib(self.request_bytes / (1 - SAVED_SHARE))
            return (
                f"a backbone is one GPU: {self.weights / GB:.1f} GB of {self.dtype} weights and one request of "
                f"{slo.context_len:,} tokens need {needed / GB:.1f} GB, and {gpu} has {self.usable / GB:.1f} GB for "
                "them"
            )
        if self.least_shards is None:
            return f"an expert takes {self.largest_expert / GB:.1f} GB, and {gpu} has no room for three"
        if self.fleet is None:
            num_calls = len(self.model.experts.main_layers)
            return (
                f"no number of {gpu} decodes a token every {slo.itl_ms:g} ms in {self.dtype}: the fastest would take "
                f"{self.fastest_ms:.1f} ms, with {num_calls} calls to shards of {slo.call_ms:g} ms"
            )
        return None

    # Memory

    @cached_property
    def weights(self) -> int:
        """Of a backbone."""
        return self.model.backbone_bytes(self.dtype)

    @property
    def usable(self) -> int:
        return int(USABLE * self.gpu.memory_bytes) // GIB * GIB

    @property
    def kv_bytes(self) -> int:
        """Of a request's pages, the MTP module's share included."""
        state = self.model.state
        return ceil(self.slo.context_len / PAGE) * PAGE * (state.kv_bytes + state.mtp_kv_bytes)

    @property
    def draft_bytes(self) -> int:
        """What a request takes beside its state where tokens are drafted: hidden vectors that the MTP module has not
        read, and what recurrent layers need to move past the drafts that proved right, all fp32."""
        if not self.model.has_mtp:
            return 0
        return 4 * (UNREAD_TOKENS * self.model.hidden_size + (DRAFT_TOKENS + 1) * self.model.state.replay)

    @property
    def request_bytes(self) -> int:
        return self.kv_bytes + self.model.state.sequence_bytes + self.draft_bytes

    @cached_property
    def most_requests(self) -> int:
        """That one backbone has memory for."""
        room = (self.usable - self.weights) // GIB * GIB
        return max(0, int(room * (1 - SAVED_SHARE)) // self.request_bytes)

    @property
    def least_backbones(self) -> int:
        """That memory and the wish for more than one ask for."""
        return max(self.slo.min_backbones, ceil(self.slo.num_requests / self.most_requests))

    @cached_property
    def experts_bytes(self) -> int:
        """One home of every expert."""
        return sum(spec.num_experts * spec.expert_bytes for spec in self.model.layer_specs(self.dtype))

    @cached_property
    def largest_expert(self) -> int:
        return max(spec.expert_bytes for spec in self.model.layer_specs(self.dtype))

    @property
    def shard_memory(self) -> int:
        """For experts, on one GPU: never more than all of them, and one that is free, for moves."""
        return min(self.usable, whole_gib(self.experts_bytes + self.largest_expert))

    @property
    def shard_filled(self) -> int:
        """What one of many shards holds at least: an expert is free, and less than the bytes of one is left over."""
        return self.shard_memory - 2 * self.largest_expert

    @property
    def is_whole(self) -> bool:
        """Whether one shard can hold every expert."""
        return self.shard_memory >= self.experts_bytes + self.largest_expert

    @cached_property
    def least_shards(self) -> int | None:
        """That memory asks for: one home of every expert fits without any one of them, and with all there is room for
        more homes of hot experts. None where a shard has hardly room for an expert."""
        if self.is_whole:
            return 2
        if self.shard_filled < 1:
            return None
        after_a_loss = 1 + ceil(self.experts_bytes / self.shard_filled)
        return max(after_a_loss, ceil(MARGIN * self.experts_bytes / self.shard_memory))

    def has_device_cover(self, num_shards: int) -> bool:
        """Whether two homes of every expert fit on so many GPUs, also when one of three or more is lost."""
        return self.is_whole or (num_shards - 1) * self.shard_filled >= NUM_HOMES * self.experts_bytes

    # Pace

    @cached_property
    def costs(self) -> StepCosts:
        return StepCosts(self.model, self.gpu, self.dtype, self.slo.call_ms)

    @property
    def step_ms(self) -> float:
        """What a step may take without the transfer."""
        return (1 - TRANSFER_SHARE) * self.slo.itl_ms

    def batch(self, num_backbones: int) -> int:
        """Requests of the backbone that has most."""
        return ceil(self.slo.num_requests / num_backbones)

    def step_of(self, num_backbones: int, num_shards: int) -> dict[str, float]:
        """Milliseconds of a step, by its parts."""
        batch = self.batch(num_backbones)
        return {
            "calls": self.costs.calls_ms,
            "backbone": self.costs.backbone_ms(batch, self.slo.context_len),
            "experts": self.costs.experts_ms(num_backbones, batch, num_shards),
        }

    def is_fast(self, num_backbones: int, num_shards: int) -> bool:
        return sum(self.step_of(num_backbones, num_shards).values()) <= self.step_ms

    @cached_property
    def fleet(self) -> tuple[int, int] | None:
        """Backbones and shards: fewest GPUs in all, and of those fewest backbones. None if no number is fast enough."""
        assert self.least_shards is not None
        best = None
        if self.fastest_ms > self.slo.itl_ms:
            return best
        for num_backbones in range(self.least_backbones, self.slo.num_requests + 1):
            if best and num_backbones + self.least_shards >= sum(best):
                break
            num_shards = self._fewest_shards(num_backbones, self.least_shards)
            if num_shards and (best is None or num_backbones + num_shards < sum(best)):
                best = num_backbones, num_shards
        return best

    def _fewest_shards(self, num_backbones: int, least: int) -> int | None:
        low, high = least, max(least, self.costs.most_shards(num_backbones, self.batch(num_backbones)))
        if not self.is_fast(num_backbones, high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.is_fast(num_backbones, middle) else (middle + 1, high)
        return low

    @property
    def fastest_ms(self) -> float:
        """Between tokens, with as many GPUs as help."""
        return self.costs.fastest_ms(self.slo.context_len) / (1 - TRANSFER_SHARE)
