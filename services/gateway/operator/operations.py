"""What operators can ask and order, over the registry: the admin API without HTTP."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.control.load_store import LoadStore, recent_rates
from cluster.control.operator_orders import OrderKind, StandingOrder, scale_targets, with_drain_orders
from cluster.control.registry_store import RegistryStore, StoreUnavailable
from cluster.placement.coverage import PlacementArrays
from cluster.topology import LayerSpec, Placement, Shard
from services.gateway.errors import ApiError, ApiRefusal, invalid

KEPT_FOR_THE_DEAD_S = 3600.0  # an order to drain a shard that is gone: it may only be hung

Preview = Callable[[], Awaitable[dict[str, Any] | None]]
Trace = Callable[[dict[str, Any] | None], Awaitable[list[dict[str, Any]]]]


@dataclass(frozen=True)
class ExpertTier:
    """What there is to operate: the experts of each layer, the pools, and the two who can be asked.

    `pools` says how many shards each may have, from and to. `preview` tells the controller's plan; `trace` has every
    backbone record within bounds, or without them stop.
    """

    layers: Sequence[LayerSpec]
    pools: Mapping[str, tuple[int, int]]
    preview: Preview
    trace: Trace


@contextmanager
def _plain_refusals() -> Iterator[None]:
    try:
        yield
    except StoreUnavailable as error:
        raise ApiError(ApiRefusal.UNAVAILABLE, f"The store does not answer: {error}", retry_after=1) from error


class Operations:
    """Every method may raise ApiError. Orders are idempotent: giving one again replaces it."""

    def __init__(self, tier: ExpertTier, registry: RegistryStore, loads: LoadStore) -> None:
        self.tier, self._registry, self._loads = tier, registry, loads

    async def drain(self, shard_id: str, by: str) -> dict[str, Any]:
        """Has the controller empty a shard; the last one that may hold experts cannot be."""
        with _plain_refusals():
            shards, orders = await self._registry.shards(), await self._registry.orders()
            known = {shard.id: shard for shard in shards}
            if shard_id not in known:
                raise ApiError(ApiRefusal.NOT_FOUND, f"There is no shard {shard_id!r:.100}; there are {_names(known)}.")
            if not [one for one in with_drain_orders(shards, orders) if one.id != shard_id and not one.draining]:
                raise invalid(f"{shard_id} is the last shard that is not draining, and somebody must hold the experts.")
            await self._forget_the_dead(known, orders)
            return await self._give(StandingOrder(OrderKind.DRAIN, shard_id, by=by, at=time.time()))

    async def lift_drain(self, shard_id: str) -> dict[str, Any]:
        return await self._lift(f"{OrderKind.DRAIN}:{shard_id}")

    async def scale(self, pool: str, num_shards: int, by: str) -> dict[str, Any]:
        """Has a pool grow or shrink to so many shards, as far as the cluster allows."""
        self._check_pool(pool)
        least, most = self.tier.pools[pool]
        if not least <= num_shards <= most:
            allowed = f"{least} alone: its size is fixed" if least == most else f"from {least} to {most}"
            bounds = "min_shards and max_shards in its arguments"
            raise invalid(f"shards of {pool} must be {allowed}, not {num_shards}; {bounds} say so.", "shards")
        try:
            order = StandingOrder(OrderKind.SCALE, pool, num_shards, by, time.time())
        except ValueError as error:
            raise invalid(str(error), "shards") from None
        with _plain_refusals():
            return await self._give(order)

    async def lift_scale(self, pool: str) -> dict[str, Any]:
        self._check_pool(pool)
        return await self._lift(f"{OrderKind.SCALE}:{pool}")

    async def rebalance(self, by: str) -> dict[str, Any]:
        """Has the controller plan at its next turn, without asking whether it is worth the moves."""
        with _plain_refusals():
            return await self._give(StandingOrder(OrderKind.REBALANCE, by=by, at=time.time()))

    async def plan(self) -> dict[str, Any]:
        """What an order to rebalance would lead to; nothing is changed."""
        plan = await self.tier.preview()
        if plan is None:
            raise ApiError(
                ApiRefusal.UNAVAILABLE, "There is no placement yet that a plan could start from.", retry_after=1
            )
        if "error" in plan:
            raise ApiError(ApiRefusal.UNAVAILABLE, str(plan["error"]))
        return plan

    async def decisions(self, count: int) -> dict[str, Any]:
        with _plain_refusals():
            return {"decisions": await self._registry.decisions(count)}

    async def placement(self) -> dict[str, Any]:
        """Homes by layer and expert, who stands by, the shards, and the layers: all that a planner starts from."""
        with _plain_refusals():
            placement, shards = await self._registry.placement(), await self._registry.shards()
        layers = [asdict(spec) for spec in self.tier.layers]
        told = placement and {name: getattr(placement, name) for name in ("epoch", "model", "homes", "standby")}
        return {"layers": layers, "shards": [shard.to_json() for shard in shards], "placement": told}

    async def load(self, top: int | None) -> dict[str, Any]:
        """Picks per second over the last minutes: of every expert by layer, or of the `top` most picked."""
        num_experts = {spec.layer: spec.num_experts for spec in self.tier.layers}
        with _plain_refusals():
            seconds, rates = await recent_rates(self._loads, num_experts, time.time())
            if top is None:
                layers = {layer: np.round(rate_E, 4).tolist() for layer, rate_E in rates.items()}
                return {"seconds": seconds, "layers": layers}
            placement = await self._registry.placement()
        unplaced = Placement(0, {layer: ((),) * count for layer, count in num_experts.items()}, {})
        arrays = PlacementArrays(placement or unplaced)
        total = {layer: float(rate_E.sum()) for layer, rate_E in rates.items()}
        experts = [
            {**asdict(hot), "share": hot.picks_per_s / total[hot.layer], **_homes(placement, hot.layer, hot.expert)}
            for hot in arrays.hottest(arrays.rates(rates), top)
        ]
        return {"seconds": seconds, "experts": experts}

    async def trace(self, bounds: dict[str, Any] | None) -> dict[str, Any]:
        return {"backbones": await self.tier.trace(bounds)}

    async def fleet(self) -> dict[str, Any]:
        """For `expertmesh status`: what the registry knows beside what backbones do."""
        with _plain_refusals():
            leader, orders = await self._registry.leader(), await self._registry.orders()
            decisions, shards = await self._registry.decisions(5), await self._registry.shards()
        shards, targets = with_drain_orders(shards, orders), scale_targets(orders)
        pools = [
            {
                "name": pool,
                "num_shards": sum(shard.pool == pool for shard in shards),
                "num_draining": sum(shard.pool == pool and shard.draining for shard in shards),
                "num_ordered": targets.get(pool),
                "queue_depth": sum(shard.queue_depth for shard in shards if shard.pool == pool),
            }
            for pool in sorted({*self.tier.pools, *(shard.pool for shard in shards)})
        ]
        told = [asdict(order) for order in orders.values()]
        return {"leader": leader, "pools": pools, "orders": told, "decisions": decisions}

    async def _give(self, order: StandingOrder) -> dict[str, Any]:
        await self._registry.give_order(order)
        return {"order": asdict(order)}

    async def _lift(self, name: str) -> dict[str, Any]:
        """Also where it is given anew at the same time: whoever lifts it has seen it stand."""
        with _plain_refusals():
            order = (await self._registry.orders()).get(name)
            return {"lifted": order is not None and await self._registry.lift_order(order)}

    async def _forget_the_dead(self, known: Mapping[str, Shard], orders: Mapping[str, StandingOrder]) -> None:
        """Shards' ids are never used again, so orders for those that are gone would only gather."""
        for order in orders.values():
            is_old = time.time() - order.at > KEPT_FOR_THE_DEAD_S
            if order.kind is OrderKind.DRAIN and order.subject not in known and is_old:
                await self._registry.lift_order(order)

    def _check_pool(self, pool: str) -> None:
        if pool not in self.tier.pools:
            raise ApiError(
                ApiRefusal.NOT_FOUND, f"There is no pool {pool!r:.100}; there are {_names(self.tier.pools)}."
            )


def _names(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _homes(placement: Placement | None, layer: int, expert: int) -> dict[str, Any]:
    if placement is None:
        return {"homes": [], "standby": []}
    standby = placement.standby[layer][expert] if layer in placement.standby else ()
    return {"homes": list(placement.homes[layer][expert]), "standby": list(standby)}
