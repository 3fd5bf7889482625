"""The `MemoryRegistry` keeps a fleet's registry in the memory of one process, for the simulator and for tests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from cluster.control.operator_orders import PoolSize, StandingOrder
from cluster.control.registry_store import (
    HEARTBEAT_TTL_S,
    LEASE_TTL_S,
    MAX_DECISIONS,
    POOL_SIZE_TTL_S,
    Lease,
    stale_placement,
)
from cluster.topology import Placement, Shard


class MemoryRegistry:
    """A `MemoryRegistry` is a `RegistryStore` without Redis; the same tests check `MemoryRegistry` and `Registry`.

    `clock` returns the seconds since any fixed moment. `ttl_s` and `lease_ttl_s` are explained in `Registry`.
    """

    def __init__(self, clock: Callable[[], float], ttl_s: float = HEARTBEAT_TTL_S, lease_ttl_s: float = LEASE_TTL_S):
        self.clock = clock
        self.ttl_s = ttl_s
        self.lease_ttl_s = lease_ttl_s
        self._seen: dict[str, tuple[Shard, float]] = {}  # Each shard with the time of its last heartbeat.
        self._placement: Placement | None = None
        self._placement_fencing = 0
        self.lease: Lease | None = None
        self._lease_end = 0.0
        self.fencing = 0
        self._followers: dict[str, tuple[int, float]] = {}
        self._decisions: deque[dict[str, str]] = deque(maxlen=MAX_DECISIONS)
        self._orders: dict[str, StandingOrder] = {}
        self._pool_sizes: dict[str, tuple[PoolSize, float]] = {}  # The size of each pool and when the size expires.
        self._manifest: dict[tuple[str, int], dict[int, int]] = {}

    async def heartbeat(self, shard: Shard) -> None:
        self._seen[shard.id] = (shard, self.clock())

    async def remove(self, shard: Shard) -> None:
        if shard.id in self._seen and self._seen[shard.id][0].incarnation == shard.incarnation:
            del self._seen[shard.id]

    async def shards(self) -> list[Shard]:
        now = self.clock()
        self._seen = {id: (shard, at) for id, (shard, at) in self._seen.items() if now - at < self.ttl_s}
        return [self._seen[id][0] for id in sorted(self._seen)]

    @property
    def known_epoch(self) -> int:
        """Return the same value as `epoch`, but without `await`, for the simulator's checks."""
        return self._placement.epoch if self._placement else 0

    async def epoch(self) -> int:
        return self.known_epoch

    async def placement(self) -> Placement | None:
        return self._placement

    async def publish(self, placement: Placement, expected_epoch: int, fencing: int) -> None:
        assert placement.epoch > expected_epoch >= 0
        epoch = self._placement.epoch if self._placement else 0
        newest = max(self._placement_fencing, self.fencing if fencing > 0 else 0)
        if epoch != expected_epoch or newest > fencing:
            raise stale_placement(placement, expected_epoch, fencing, epoch, newest)
        self._placement, self._placement_fencing = placement, fencing

    async def follow(self, follower: str, epoch: int) -> None:
        self._followers[follower] = epoch, self.clock()

    async def unfollow(self, follower: str) -> None:
        self._followers.pop(follower, None)

    async def followers(self) -> dict[str, int]:
        return self.known_followers()

    def known_followers(self) -> dict[str, int]:
        """Return the same value as `followers`, but without `await`, for the simulator's checks."""
        now = self.clock()
        self._followers = {name: (epoch, at) for name, (epoch, at) in self._followers.items() if now - at < self.ttl_s}
        return {name: epoch for name, (epoch, _) in sorted(self._followers.items())}

    async def note_decision(self, decision: Mapping[str, str]) -> None:
        self._decisions.appendleft(dict(decision))

    async def decisions(self, count: int) -> list[dict[str, str]]:
        return [*self._decisions][:count]

    async def acquire_lease(self, owner: str) -> Lease | None:
        if self.lease is not None and self.clock() < self._lease_end:
            return None
        self.fencing = max(self.fencing + 1, round(1000 * self.clock()))
        self.lease, self._lease_end = Lease(owner, self.fencing), self.clock() + self.lease_ttl_s
        return self.lease

    async def renew_lease(self, lease: Lease) -> bool:
        if self.lease != lease or self.clock() >= self._lease_end:
            return False
        self._lease_end = self.clock() + self.lease_ttl_s
        return True

    async def release_lease(self, lease: Lease) -> None:
        if self.lease == lease:
            self.lease = None

    async def has_leader(self) -> bool:
        return self.lease is not None and self.clock() < self._lease_end

    async def leader(self) -> str | None:
        return self.lease.owner if self.lease is not None and await self.has_leader() else None

    async def give_order(self, order: StandingOrder) -> None:
        self._orders[order.name] = order

    async def lift_order(self, order: StandingOrder) -> bool:
        is_there = self._orders.get(order.name) == order
        if is_there:
            del self._orders[order.name]
        return is_there

    async def orders(self) -> dict[str, StandingOrder]:
        return dict(sorted(self._orders.items()))

    async def set_pool_size(self, pool: str, size: PoolSize) -> None:
        self._pool_sizes[pool] = size, self.clock() + POOL_SIZE_TTL_S

    async def pool_size(self, pool: str) -> PoolSize | None:
        size, end = self._pool_sizes.get(pool, (None, 0.0))
        return size if self.clock() < end else None

    async def checksums(self, weights: str, layer: int) -> dict[int, int]:
        return dict(self._manifest.get((weights, layer), {}))

    async def note_checksums(self, weights: str, layer: int, seen: Mapping[int, int]) -> dict[int, int]:
        known = self._manifest.setdefault((weights, layer), {})
        for expert, checksum in seen.items():
            known.setdefault(expert, checksum)
        return {expert: known[expert] for expert in seen}
