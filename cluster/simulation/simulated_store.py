"""The `SimStore` is a simulated Redis, which faults can kill, stop and wipe; processes use it over the network."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from cluster.control.memory_registry import MemoryRegistry
from cluster.control.operator_orders import PoolSize, StandingOrder
from cluster.control.registry_store import Lease, StoreUnavailable
from cluster.simulation.simulated_network import SimNetwork
from cluster.simulation.simulated_process import SimProcess
from cluster.topology import Placement, Shard

T = TypeVar("T")
EPOCH_OF_CLOCK = 1_800_000_000.0  # Seconds since 1970 at which every simulation begins.
STORE_TIMEOUT_S = 1.0  # Seconds until a call fails, equal to `cluster.control.registry.CALL_TIMEOUT_S`.


class SimStore:
    """A `SimStore` simulates a Redis server: the stored data, and whether the server answers.

    - `is_fenced`: if False, the store accepts a placement with any fencing token.
    - `on_publish`: is called after a placement was stored.
    """

    def __init__(self, is_fenced: bool = True) -> None:
        self.is_fenced = is_fenced
        self.process = SimProcess("store")
        # Picks by layer and expert. A wipe keeps these picks, so that `Invariants.check_loads` can find lost counts.
        self.loads: Counter[tuple[int, int]] = Counter()
        self.on_publish: Callable[[Placement], None] = lambda _: None
        self.wipe()

    def wipe(self) -> None:
        """Delete all data except the counts of expert load."""
        self.registry = MemoryRegistry(now)
        self.was_wiped = True


def now() -> float:
    """Return the virtual time in seconds since 1970."""
    return EPOCH_OF_CLOCK + asyncio.get_running_loop().time()


class RemoteStore:
    """A `RemoteStore` is a `RegistryStore` that reaches the simulated store over the network, so that calls may fail.

    A failed call may have changed the store nevertheless, as with a real store whose reply is lost.
    """

    def __init__(self, process: SimProcess, store: SimStore, network: SimNetwork) -> None:
        self._process, self._store, self._network = process, store, network

    async def _call(self, do: Callable[[MemoryRegistry], Awaitable[T]]) -> T:
        await self._process.wait_until_running()
        if not self._process.is_up:
            raise StoreUnavailable("the process that asks is dead")
        await asyncio.sleep(self._network.hop_s())
        store = self._store.process
        if not store.is_up:
            raise StoreUnavailable("the store is down")
        if store.is_stopped or self._network.loses(self._process.name, "store"):
            await asyncio.sleep(STORE_TIMEOUT_S)
            raise StoreUnavailable("the store does not answer")
        result = await do(self._store.registry)  # The sleep above is the time of request and reply.
        if self._network.loses(self._process.name, "store"):
            await asyncio.sleep(STORE_TIMEOUT_S)
            raise StoreUnavailable("the store's answer was lost")
        await self._process.wait_until_running()
        return result

    async def heartbeat(self, shard: Shard) -> None:
        await self._call(lambda registry: registry.heartbeat(shard))

    async def remove(self, shard: Shard) -> None:
        await self._call(lambda registry: registry.remove(shard))

    async def shards(self) -> list[Shard]:
        return await self._call(lambda registry: registry.shards())

    async def epoch(self) -> int:
        return await self._call(lambda registry: registry.epoch())

    async def placement(self) -> Placement | None:
        return await self._call(lambda registry: registry.placement())

    async def publish(self, placement: Placement, expected_epoch: int, fencing: int) -> None:
        async def publish(registry: MemoryRegistry) -> None:
            token = fencing if self._store.is_fenced or not fencing else 1 << 62
            await registry.publish(placement, expected_epoch, token)
            self._store.on_publish(placement)

        await self._call(publish)

    async def follow(self, follower: str, epoch: int) -> None:
        await self._call(lambda registry: registry.follow(follower, epoch))

    async def unfollow(self, follower: str) -> None:
        await self._call(lambda registry: registry.unfollow(follower))

    async def followers(self) -> dict[str, int]:
        return await self._call(lambda registry: registry.followers())

    async def note_decision(self, decision: Mapping[str, str]) -> None:
        await self._call(lambda registry: registry.note_decision(decision))

    async def decisions(self, count: int) -> list[dict[str, str]]:
        return await self._call(lambda registry: registry.decisions(count))

    async def leader(self) -> str | None:
        return await self._call(lambda registry: registry.leader())

    async def give_order(self, order: StandingOrder) -> None:
        await self._call(lambda registry: registry.give_order(order))

    async def lift_order(self, order: StandingOrder) -> bool:
        return await self._call(lambda registry: registry.lift_order(order))

    async def orders(self) -> dict[str, StandingOrder]:
        return await self._call(lambda registry: registry.orders())

    async def set_pool_size(self, pool: str, size: PoolSize) -> None:
        await self._call(lambda registry: registry.set_pool_size(pool, size))

    async def pool_size(self, pool: str) -> PoolSize | None:
        return await self._call(lambda registry: registry.pool_size(pool))

    async def has_leader(self) -> bool:
        return await self._call(lambda registry: registry.has_leader())

    async def checksums(self, weights: str, layer: int) -> dict[int, int]:
        return await self._call(lambda registry: registry.checksums(weights, layer))

    async def note_checksums(self, weights: str, layer: int, seen: Mapping[int, int]) -> dict[int, int]:
        return await self._call(lambda registry: registry.note_checksums(weights, layer, seen))

    async def acquire_lease(self, owner: str) -> Lease | None:
        return await self._call(lambda registry: registry.acquire_lease(owner))

    async def renew_lease(self, lease: Lease) -> bool:
        return await self._call(lambda registry: registry.renew_lease(lease))

    async def release_lease(self, lease: Lease) -> None:
        await self._call(lambda registry: registry.release_lease(lease))

    async def add_loads(self, taken: Mapping[int, Any]) -> None:
        """Add a backbone's counts, by layer, to the stored load; a failed call may have added the counts, too."""

        async def add(_: MemoryRegistry) -> None:
            for layer, counts_E in taken.items():
                for expert in counts_E.nonzero()[0].tolist():
                    self._store.loads[layer, expert] += int(counts_E[expert])

        await self._call(add)
