"""A fleet to plan for and to register, in one line each."""

from __future__ import annotations

from cluster.topology import LayerSpec, Shard


def make_shard(number: int, node: str = "node", memory_budget: int = 10**9, draining: bool = False) -> Shard:
    endpoint = f"127.0.0.1:{5000 + number}"
    return Shard(f"s{number:02}", endpoint, node, "cpu", "cpu", "i1", memory_budget, draining=draining)


def make_layers(num_layers: int = 3, num_experts: int = 32, expert_bytes: int = 100) -> list[LayerSpec]:
    return [LayerSpec(layer, num_experts, expert_bytes, top_k=4) for layer in range(num_layers)]
