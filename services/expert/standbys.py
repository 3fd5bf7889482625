"""The experts that a shard stands by for: in host memory as far as its budget goes, else on disk."""

from __future__ import annotations

from dataclasses import dataclass

from services.expert.weights import Weights

Key = tuple[int, int]  # layer, expert


@dataclass
class Standby:
    """One expert that stands by; `weights` if it does so in host memory, `peer` had it when it was loaded."""

    weights: Weights | None = None
    peer: str = ""
    num_promotions: int = 0
    last_promotion: int = 0  # a number that grows with every promotion of any expert


class StandbyStore:
    """First come, first kept in host memory; later, what was promoted last replaces what was promoted longest ago."""

    def __init__(self, host_budget: int) -> None:
        self.host_budget, self.used_bytes = host_budget, 0
        self._by_key: dict[Key, Standby] = {}
        self._num_promotions = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def get(self, key: Key) -> Standby | None:
        return self._by_key.get(key)

    @property
    def keys(self) -> list[Key]:
        return list(self._by_key)

    @property
    def in_host_memory(self) -> list[Key]:
        return [key for key, standby in list(self._by_key.items()) if standby.weights is not None]

    def has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.host_budget

    def add(self, key: Key, weights: Weights | None, peer: str = "") -> None:
        """Stands by in host memory if weights are given and fit, else on disk."""
        self.remove(key)
        standby = self._by_key[key] = Standby(peer=peer)
        if weights is not None and self.has_room(weights.nbytes):
            self._keep(standby, weights)

    def remove(self, key: Key) -> None:
        if (standby := self._by_key.pop(key, None)) is not None:
            self._drop(standby)

    def note_promotion(self, key: Key, weights: Weights | None) -> None:
        """Counts it; weights that were read from disk may stay in host memory, in the place of colder ones."""
        standby = self._by_key[key]
        self._num_promotions += 1
        standby.num_promotions += 1
        standby.last_promotion = self._num_promotions
        if weights is None or standby.weights is not None or weights.nbytes > self.host_budget:
            return
        colder = sorted((other for other in self._by_key.values() if other.weights), key=lambda o: o.last_promotion)
        for other in colder:
            if self.has_room(weights.nbytes):
                break
            self._drop(other)
        self._keep(standby, weights)

    def _keep(self, standby: Standby, weights: Weights) -> None:
        standby.weights = weights
        self.used_bytes += weights.nbytes

    def _drop(self, standby: Standby) -> None:
        if standby.weights is not None:
            self.used_bytes -= standby.weights.nbytes
            standby.weights = None
