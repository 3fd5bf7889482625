"""The `Scaler` decides how many shards each pool should have, and publishes the sizes in the registry.

The shards of a pool read the pool's size from the registry and report the size to Ray Serve (`serve_policy`). Ray Serve
then starts or stops shards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from cluster.control.leader.reconciler import Reconciler
from cluster.control.operator_orders import PoolSize, scale_targets, with_drain_orders
from cluster.control.registry_store import RegistryStore, StoreUnavailable
from cluster.control.scaling import (
    PendingChange,
    PoolDecision,
    PoolPolicy,
    PoolState,
    busy_shares,
    desired_shards,
    min_shards_for_cover,
)
from cluster.load import ExpectedLoad
from cluster.placement.plan import PlanPolicy
from cluster.topology import LayerSpec, Shard

log = logging.getLogger(__name__)

PERIOD_S = 1.0  # Seconds between decisions; a pool's delays are several times as long.


class Scaler:
    """A `Scaler` decides on the pools' sizes while the reconciler of the same controller is the leader.

    - `load`: returns the expected load by layer.
    - `clock`: gives seconds since 1970.
    - `policy`: the planner's policy, whose cost model predicts how busy shards are.
    """

    def __init__(
        self,
        pools: Mapping[str, PoolPolicy],
        layers: Sequence[LayerSpec],
        registry: RegistryStore,
        reconciler: Reconciler,
        load: Callable[[], Awaitable[Mapping[int, ExpectedLoad]]],
        clock: Callable[[], float],
        policy: PlanPolicy,
    ) -> None:
        self.pools, self.layers, self.policy = pools, layers, policy
        self.registry, self.reconciler, self.load, self.clock = registry, reconciler, load, clock
        self._sizes: dict[str, int] = {}  # The last decided size of each pool.
        self._pending: dict[str, PendingChange] = {}

    async def run(self) -> None:
        """Decide on the pools' sizes every second until cancelled; if a decision fails, pools keep their sizes."""
        while self.pools:
            try:
                await self.turn()
            except StoreUnavailable as error:
                log.warning("Pools keep their sizes, because the store does not answer: %s", error)
            except Exception:
                log.exception("Pools keep their sizes, because the decision failed.")
            await asyncio.sleep(PERIOD_S)

    async def turn(self) -> None:
        """Decide on the size of each pool once; may raise StoreUnavailable."""
        placement = self.reconciler.placement
        if not self.reconciler.is_leader or placement is None:
            self._sizes.clear()  # Another leader decides on the sizes.
            self._pending.clear()
            return
        orders = await self.registry.orders()
        registered = await self.registry.shards()
        stopping = {shard.id for shard in registered if shard.draining}  # An operator's drain stops no shard.
        shards = with_drain_orders(registered, orders)
        if all(shard.draining for shard in shards):
            return
        ordered, load = scale_targets(orders), await self.load()
        shares = await asyncio.to_thread(busy_shares, self.layers, shards, placement, load, self.policy)
        for name, policy in self.pools.items():
            in_pool = [shard for shard in shards if shard.pool == name]
            size = await self._size(name, in_pool)
            others = [shard for shard in remaining_shards(shards, self._sizes) if shard.pool != name]
            is_stopping = any(shard.id in stopping for shard in in_pool)
            remaining = [shard for shard in in_pool if not shard.draining]
            state = PoolState(
                size=size,
                shares={shard.id: shares[shard.id] for shard in remaining},
                min_for_cover=min_shards_for_cover(self.layers, remaining, others),
                is_settled=self.reconciler.is_settled and not is_stopping and len(in_pool) == size,
                ordered=ordered.get(name),
            )
            await self._apply(name, size, desired_shards(state, policy), policy)

    async def _size(self, name: str, in_pool: Sequence[Shard]) -> int:
        """Return the last decided size of the pool `name`, which may come from the previous leader.

        If no size is stored, the method returns the number of the pool's live shards that do not drain.
        """
        if name not in self._sizes:
            before = await self.registry.pool_size(name)
            self._sizes[name] = before.shards if before else sum(not shard.draining for shard in in_pool)
        return self._sizes[name]

    async def _apply(self, name: str, size: int, decision: PoolDecision, policy: PoolPolicy) -> None:
        """Publish the size in `decision` if the change is due, else publish the present `size` again.

        A change that an operator has ordered is due at once. Other changes are due after the delay that `policy` gives.
        """
        now, change = self.clock(), decision.shards - size
        pending = self._pending.get(name, PendingChange()).updated((change > 0) - (change < 0), now)
        self._pending[name] = pending
        is_due = change != 0 and (decision.is_ordered or pending.is_due(now, policy))
        await self.registry.set_pool_size(name, PoolSize(decision.shards if is_due else size, now))
        if is_due:
            self._sizes[name], self._pending[name] = decision.shards, PendingChange()
            log.info("Pool %s: %d shards instead of %d: %s.", name, decision.shards, size, decision.why)
            numbers = {"pool": name, "shards_before": str(size), "shards": str(decision.shards)}
            with suppress(StoreUnavailable):
                await self.registry.note_decision(
                    {"at": f"{now:.3f}", "by": self.reconciler.owner, "kind": "scale", **numbers, "why": decision.why}
                )


def remaining_shards(shards: Sequence[Shard], sizes: Mapping[str, int]) -> list[Shard]:
    """Return the shards that do not drain, but from each pool at most as many shards as `sizes` gives for the pool.

    A pool without an entry in `sizes` keeps all its shards that do not drain.
    """
    places = dict(sizes)
    remaining = []
    for shard in shards:
        places[shard.pool] = places.get(shard.pool, len(shards)) - (not shard.draining)
        if not shard.draining and places[shard.pool] >= 0:
            remaining.append(shard)
    return remaining
