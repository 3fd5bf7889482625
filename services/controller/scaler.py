"""Decides how many shards each pool should have, and says so in the registry; the pool's shards tell Serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from cluster.control.leader.reconciler import Reconciler
from cluster.control.operator_orders import PoolSize, scale_targets, with_drain_orders
from cluster.control.registry_store import RegistryStore, StoreUnavailable
from cluster.control.scaling import (
    BusyShare,
    Decision,
    Pool,
    PoolPolicy,
    Wish,
    busy_shares,
    desired_shards,
    fewest_for_cover,
)
from cluster.load import ExpectedLoad
from cluster.placement.plan import PlanPolicy
from cluster.topology import LayerSpec, Shard

log = logging.getLogger(__name__)

PERIOD_S = 1.0


class Scaler:
    """`turn` is the loop's body; it decides only while the reconciler beside it leads. `clock`: seconds since 1970."""

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
        self._wanted: dict[str, int] = {}
        self._wishes: dict[str, Wish] = {}
        self._leaving: set[str] = set()  # shards that stop; one that an operator has emptied stays

    async def run(self) -> None:
        """Until cancelled."""
        while self.pools:
            try:
                await self.turn()
            except StoreUnavailable as error:
                log.warning("Pools stay as they are: %s", error)
            except Exception:
                log.exception("Pools stay as they are: no decision could be made.")
            await asyncio.sleep(PERIOD_S)

    async def turn(self) -> None:
        placement = self.reconciler.placement
        if not self.reconciler.is_leader or placement is None:
            self._wanted.clear()  # another leader decides meanwhile
            self._wishes.clear()
            return
        orders = await self.registry.orders()
        registered = await self.registry.shards()
        self._leaving = {shard.id for shard in registered if shard.draining}
        shards = with_drain_orders(registered, orders)
        if all(shard.draining for shard in shards):
            return
        ordered, load = scale_targets(orders), await self.load()
        shares = await asyncio.to_thread(busy_shares, self.layers, shards, placement, load, self.policy)
        for name, policy in self.pools.items():
            own = [shard for shard in shards if shard.pool == name]
            wanted = await self._last(name, own)
            others = [shard for shard in self._staying(shards) if shard.pool != name]
            pool = self._pool(own, others, shares, wanted, ordered.get(name))
            await self._decide(name, wanted, desired_shards(pool, policy), policy)

    async def _last(self, name: str, own: Sequence[Shard]) -> int:
        """What was decided last, by this leader or the one before; else the shards that are there."""
        if name not in self._wanted:
            before = await self.registry.pool_size(name)
            self._wanted[name] = before.shards if before else sum(not shard.draining for shard in own)
        return self._wanted[name]

    def _staying(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those that are not to go by what was decided: of a pool that shrinks, as many as it will have."""
        left = dict(self._wanted)
        staying = []
        for shard in shards:
            left[shard.pool] = left.get(shard.pool, len(shards)) - (not shard.draining)
            if not shard.draining and left[shard.pool] >= 0:
                staying.append(shard)
        return staying

    def _pool(
        self,
        own: Sequence[Shard],
        others: Sequence[Shard],
        shares: Mapping[str, BusyShare],
        wanted: int,
        ordered: int | None,
    ) -> Pool:
        staying = [shard for shard in own if not shard.draining]
        is_leaving = any(shard.id in self._leaving for shard in own)
        return Pool(
            wanted=wanted,
            shares={shard.id: shares[shard.id] for shard in staying},
            fewest=fewest_for_cover(self.layers, staying, others),
            is_settled=self.reconciler.is_settled and not is_leaving and len(own) == wanted,
            ordered=ordered,
        )

    async def _decide(self, name: str, wanted: int, decision: Decision, policy: PoolPolicy) -> None:
        """Says what holds from now on: the decision once it has lasted, until then what held before."""
        now, change = self.clock(), decision.shards - wanted
        wish = self._wishes.get(name, Wish()).then((change > 0) - (change < 0), now)
        self._wishes[name] = wish
        is_due = change != 0 and (decision.is_ordered or wish.is_ripe(now, policy))
        await self.registry.set_pool_size(name, PoolSize(decision.shards if is_due else wanted, now))
        if is_due:
            self._wanted[name], self._wishes[name] = decision.shards, Wish()
            log.info("Pool %s: %d shards instead of %d: %s.", name, decision.shards, wanted, decision.why)
            numbers = {"pool": name, "shards_before": str(wanted), "shards": str(decision.shards)}
            with suppress(StoreUnavailable):
                await self.registry.note_decision(
                    {"at": f"{now:.3f}", "by": self.reconciler.owner, "kind": "scale", **numbers, "why": decision.why}
                )
