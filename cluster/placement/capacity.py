"""The capacity check finds out from sizes alone, before any process starts, if a fleet has memory for all experts."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.topology import LayerSpec, Shard


def check_capacity(layers: Sequence[LayerSpec], shards: Sequence[Shard], num_homes: int) -> None:
    """Raise ValueError if the shards do not have the memory for `num_homes` homes of every expert.

    If there are fewer shards than `num_homes`, one home on each shard is enough, because no shard holds an expert
    twice. One home of every expert must fit in device memory. Standbys in host memory may replace the other homes.
    """
    num_homes = min(num_homes, len(shards))
    one = sum(spec.num_experts * spec.expert_bytes for spec in layers)
    smallest = min((spec.expert_bytes for spec in layers), default=1)

    def whole(budget: int) -> int:
        """Round `budget` down to a multiple of the smallest expert's bytes."""
        return budget - budget % smallest

    on_devices = sum(min(whole(shard.memory_budget), one) for shard in shards)
    anywhere = sum(min(whole(shard.memory_budget) + whole(shard.host_budget), one) for shard in shards)
    num_experts = sum(spec.num_experts for spec in layers)
    if on_devices < one:
        raise ValueError(
            f"{num_experts} experts need {one:,} bytes on devices, but the {len(shards)} shards have room for "
            f"{on_devices:,} there; add shards or raise their memory_budget."
        )
    if anywhere < num_homes * one:
        raise ValueError(
            f"{num_experts} experts with {num_homes} homes each need {num_homes * one:,} bytes, but the {len(shards)} "
            f"shards have room for {anywhere:,} of them; add shards, or raise memory_budget or host_budget."
        )
