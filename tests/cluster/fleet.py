"""The functions build shards and layers for tests, and compute the load of each shard."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.topology import Homes, LayerSpec, Shard


def make_shard(
    number: int, node: str = "node", memory_budget: int = 10**9, draining: bool = False, host_budget: int = 0
) -> Shard:
    endpoint = f"127.0.0.1:{5000 + number}"
    budgets = {"memory_budget": memory_budget, "host_budget": host_budget}
    return Shard(f"s{number:02}", endpoint, node, "cpu", "cpu", "i1", draining=draining, **budgets)


def make_layers(num_layers: int = 3, num_experts: int = 32, expert_bytes: int = 100) -> list[LayerSpec]:
    return [LayerSpec(layer, num_experts, expert_bytes, top_k=4) for layer in range(num_layers)]


def balancedness(loads: Sequence[float]) -> float:
    """Return the mean of the shards' loads divided by the largest load; 1 is perfect.

    For several layers, call this function for each layer and average the results, as EPLB does.
    """
    return sum(loads) / len(loads) / max(loads) if loads and max(loads) > 0 else 1.0


def shard_loads(homes: Homes, load: Sequence[float], shard_ids: Sequence[str]) -> list[float]:
    """Return the load of each shard in one layer if each expert's picks are split evenly over its homes."""
    loads = dict.fromkeys(shard_ids, 0.0)
    for ids, picks in zip(homes, load, strict=True):
        for id in ids:
            loads[id] += picks / len(ids)
    return list(loads.values())
