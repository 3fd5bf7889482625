"""The capacity check finds out from sizes alone, before any process starts, if a fleet has memory for all experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from cluster.topology import LayerSpec, Shard


def memory_shares(layers: Sequence[LayerSpec], shard: Shard) -> tuple[Fraction, Fraction]:
    """Return which share of all experts fits into a shard's device memory, and which share into its host memory.

    A share may be more than 1. Experts of different sizes are taken in equal parts.
    """
    device = sum(spec.num_experts * spec.on_device(shard.device) for spec in layers)
    host = sum(spec.num_experts * spec.in_host_memory(shard.device) for spec in layers)
    return Fraction(shard.memory_budget, device or 1), Fraction(shard.host_budget, host or 1)


def check_capacity(layers: Sequence[LayerSpec], shards: Sequence[Shard], num_homes: int) -> None:
    """Raise ValueError if the shards do not have the memory for `num_homes` homes of every expert.

    If there are fewer shards than `num_homes`, one home on each shard is enough, because no shard holds an expert
    twice. One home of every expert must fit in device memory. Standbys in host memory may replace the other homes.
    """
    num_homes = min(num_homes, len(shards))
    unit = shards[0].device if shards else ""  # all bytes are told as if every shard had the device of the first
    one = sum(spec.num_experts * spec.on_device(unit) for spec in layers)
    shares = [memory_shares(layers, _with_whole_experts(layers, shard)) for shard in shards]
    on_devices = int(one * sum(min(device, Fraction(1)) for device, _ in shares))
    anywhere = int(one * sum(min(device + host, Fraction(1)) for device, host in shares))
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


def _with_whole_experts(layers: Sequence[LayerSpec], shard: Shard) -> Shard:
    """Return `shard` with its budgets rounded down to multiples of the smallest expert's bytes."""
    device = min((spec.on_device(shard.device) for spec in layers), default=1)
    host = min((spec.in_host_memory(shard.device) for spec in layers), default=1)
    on_device, in_host_memory = shard.memory_budget // device * device, shard.host_budget // host * host
    return replace(shard, memory_budget=on_device, host_budget=in_host_memory)
