"""`StandbyStore` keeps standbys in host memory as long as they fit into a budget; all other standbys stay on disk."""

from __future__ import annotations

from dataclasses import dataclass

from services.expert.load_order import Key
from services.expert.weights import Weights

HOT_PROMOTIONS = 3  # promotions after which an expert is hot; hot experts are evicted last


@dataclass
class Standby:
    """A `Standby` records where a standby's weights are, and how often and when the expert was promoted."""

    weights: Weights | None = None  # the copy in host memory, or None if the expert is only on disk
    peer: str = ""  # endpoint of the shard that was named as the source of the expert, if any
    num_promotions: int = 0
    last_promotion: int = 0  # sequence number of the last promotion, counted over all experts


class StandbyStore:
    """A `StandbyStore` knows the standbys of a shard and decides which standbys are kept in host memory.

    Standbys are kept in host memory in the order in which they are added, until the budget is used up. After that, an
    expert that is promoted from disk replaces the experts in host memory that were promoted least recently.
    """

    def __init__(self, host_budget: int) -> None:
        self.host_budget, self.used_bytes = host_budget, 0
        self._by_key: dict[Key, Standby] = {}
        self._num_promotions = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def get(self, key: Key) -> Standby | None:
        return self._by_key.get(key)

    def is_hot(self, key: Key) -> bool:
        standby = self._by_key.get(key)
        return standby is not None and standby.num_promotions >= HOT_PROMOTIONS

    @property
    def keys(self) -> list[Key]:
        return list(self._by_key)

    @property
    def in_host_memory(self) -> list[Key]:
        return [key for key, standby in list(self._by_key.items()) if standby.weights is not None]

    def has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.host_budget

    def add(self, key: Key, weights: Weights | None, peer: str = "") -> None:
        """Add a standby; if `weights` are given and fit, keep them in host memory, else read them from disk later."""
        self.remove(key)
        standby = self._by_key[key] = Standby(peer=peer)
        if weights is not None and self.has_room(weights.nbytes):
            self._keep(standby, weights)

    def remove(self, key: Key) -> None:
        """Remove the standby `key` if the store has it."""
        if (standby := self._by_key.pop(key, None)) is not None:
            self._drop(standby)

    def note_promotion(self, key: Key, weights: Weights | None) -> None:
        """Count a promotion of `key`, and keep `weights` in host memory.

        If necessary, `weights` replace experts that were promoted less recently. `weights` is None if the promotion
        made no copy for host memory.
        """
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
