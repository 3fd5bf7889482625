"""The first placement of experts on an empty fleet: every expert gets its homes, every shard an even part of the load.

Two homes of an expert are never in the same failure domain. A domain is a node if there are enough nodes with room,
else a shard. The planner first says how many experts of a layer each shard takes (its slots), then deals the experts
out, those with most load first, each to the domains that are least loaded so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.topology import Homes, LayerSpec, Shard


def first_placement(
    layers: Sequence[LayerSpec],
    shards: Sequence[Shard],
    load: Mapping[int, Sequence[float]] | None = None,
    num_homes: int = 2,
) -> dict[int, Homes]:
    """Homes for every expert of every layer, the same for the same input in any order of shards.

    `load[layer][expert]` are expected picks (a layer that is not there counts as even). Every expert has
    min(num_homes, number of shards) homes. A fleet without the memory for that is a ValueError with the numbers.
    """
    assert num_homes >= 1
    hosts = [_Host(shard) for shard in sorted(shards, key=lambda shard: shard.id) if not shard.draining]
    if not hosts:
        raise ValueError("There is no shard to place experts on: start at least one that is not draining.")
    num_homes = min(num_homes, len(hosts))
    _choose_domains(hosts, layers, num_homes)
    return {spec.layer: _place_layer(spec, hosts, _load_of(spec, load), num_homes) for spec in layers}


@dataclass
class _Host:
    """A shard while experts are dealt out: `share` is the part of every layer it should take."""

    shard: Shard
    domain: str = ""
    share: float = 0.0
    used_bytes: int = 0
    num_slots: int = 0
    load: float = 0.0

    def has_room(self, spec: LayerSpec) -> bool:
        return self.used_bytes + (self.num_slots + 1) * spec.expert_bytes <= self.shard.memory_budget


def _load_of(spec: LayerSpec, load: Mapping[int, Sequence[float]] | None) -> list[float]:
    picks = list((load or {}).get(spec.layer, [1.0] * spec.num_experts))
    if len(picks) != spec.num_experts or min(picks) < 0:
        raise ValueError(
            f"The load of layer {spec.layer} has {len(picks)} entries, least {min(picks, default=0)}; "
            f"it needs {spec.num_experts}, one for each expert, none below zero."
        )
    return picks


def _choose_domains(hosts: Sequence[_Host], layers: Sequence[LayerSpec], num_homes: int) -> None:
    """Sets every host's domain and share: nodes if they have the memory, else shards, else a ValueError."""
    total_bytes = num_homes * sum(spec.num_experts * spec.expert_bytes for spec in layers)
    for by_node in (True, False):
        for host in hosts:
            host.domain = host.shard.node if by_node else host.shard.id
        if len({host.domain for host in hosts}) >= num_homes and _share_out(hosts, total_bytes, num_homes):
            return
    num_experts = sum(spec.num_experts for spec in layers)
    raise ValueError(
        f"{num_experts} experts with {num_homes} homes each need {total_bytes:,} bytes, but the {len(hosts)} shards "
        f"have room for {_room(hosts, total_bytes, num_homes):,} of them; "
        f"add shards, raise their memory budget, or ask for fewer homes."
    )


def _room(hosts: Sequence[_Host], total_bytes: int, num_homes: int) -> int:
    return sum(min(host.shard.memory_budget, total_bytes // num_homes) for host in hosts)


def _share_out(hosts: Sequence[_Host], total_bytes: int, num_homes: int) -> bool:
    """Raises all shares together until they sum to 1; a host stops at its memory, a domain at one home per expert."""
    for host in hosts:
        host.share = 0.0
    growing = list(hosts)
    left = 1.0
    while left > 1e-12 and growing:
        step = min(left / len(growing), *(_headroom(host, hosts, growing, total_bytes, num_homes) for host in growing))
        for host in growing:
            host.share += step
        left -= step * len(growing)
        growing = [h for h in growing if _headroom(h, hosts, growing, total_bytes, num_homes) > 1e-12]
    return left <= 1e-9


def _headroom(host: _Host, hosts: Sequence[_Host], growing: Sequence[_Host], total_bytes: int, num_homes: int) -> float:
    in_memory = host.shard.memory_budget / total_bytes - host.share
    in_domain = 1 / num_homes - sum(other.share for other in hosts if other.domain == host.domain)
    return min(in_memory, in_domain / sum(other.domain == host.domain for other in growing))


def _place_layer(spec: LayerSpec, hosts: Sequence[_Host], load: Sequence[float], num_homes: int) -> Homes:
    _set_slots(spec, hosts, num_homes)
    homes: list[tuple[str, ...]] = [()] * spec.num_experts
    order = sorted(range(spec.num_experts), key=lambda expert: (-load[expert], expert))
    for num_left, expert in zip(range(spec.num_experts, 0, -1), order, strict=True):
        chosen = _choose_hosts(hosts, num_left, num_homes)
        for host in chosen:
            host.num_slots -= 1
            host.used_bytes += spec.expert_bytes
            host.load += load[expert] / num_homes
        homes[expert] = tuple(host.shard.id for host in chosen)
    assert all(host.used_bytes <= host.shard.memory_budget for host in hosts)
    return tuple(homes)


def _set_slots(spec: LayerSpec, hosts: Sequence[_Host], num_homes: int) -> None:
    """Gives each host its share of the layer's homes in whole experts; what rounding leaves goes to the emptiest."""
    num_slots = spec.num_experts * num_homes
    for host in hosts:
        host.load = 0.0
        fits = (host.shard.memory_budget - host.used_bytes) // spec.expert_bytes
        host.num_slots = min(int(host.share * num_slots + 1e-6), fits)
    for _ in range(num_slots - sum(host.num_slots for host in hosts)):
        free = [host for host in hosts if host.has_room(spec) and _domain_slots(hosts, host.domain) < spec.num_experts]
        if not free:
            raise ValueError(
                f"Layer {spec.layer} needs {num_homes} homes for each of {spec.num_experts} experts of "
                f"{spec.expert_bytes:,} bytes, but the {len(hosts)} shards are full; add shards or memory budget."
            )
        min(free, key=lambda host: _fullness(host, spec)).num_slots += 1


def _fullness(host: _Host, spec: LayerSpec) -> float:
    return (host.used_bytes + host.num_slots * spec.expert_bytes) / max(host.share, 1e-12)


def _domain_slots(hosts: Sequence[_Host], domain: str) -> int:
    return sum(host.num_slots for host in hosts if host.domain == domain)


def _choose_hosts(hosts: Sequence[_Host], num_left: int, num_homes: int) -> list[_Host]:
    """The homes of the next expert, in different domains.

    A domain with as many slots as experts are left must take part in every one of them, or its slots cannot be filled.
    """
    slots: dict[str, int] = {}
    best: dict[str, _Host] = {}
    for host in hosts:
        slots[host.domain] = slots.get(host.domain, 0) + host.num_slots
        rival = best.get(host.domain)
        if host.num_slots and (rival is None or host.load < rival.load):
            best[host.domain] = host
    chosen = sorted(best.values(), key=lambda host: (slots[host.domain] < num_left, host.load))[:num_homes]
    assert len(chosen) == num_homes
    assert max(slots.values()) <= num_left
    return sorted(chosen, key=lambda host: host.load)
