"""An `Operations` reads the fleet's state and writes operator orders, on behalf of the admin API."""

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

# Seconds for which an order to drain a missing shard is kept, because the shard may only hang and come back.
DEAD_SHARD_ORDER_TTL_S = 3600.0

Preview = Callable[[], Awaitable[dict[str, Any] | None]]
Trace = Callable[[dict[str, Any] | None], Awaitable[list[dict[str, Any]]]]


@dataclass(frozen=True)
class ExpertTier:
    """An `ExpertTier` describes the layers and pools that an operator administers.

    The tier also holds the functions that call the controller and the backbones.
    """

    layers: Sequence[LayerSpec]
    pools: Mapping[str, tuple[int, int]]  # minimum and maximum number of shards of each pool, by the pool's name
    preview: Preview  # function that returns the controller's plan, or None if no placement exists yet
    # function that makes every backbone record the router's choices within the given bounds; the argument None stops
    # the recording
    trace: Trace


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turn a StoreUnavailable that the `with` block raises into an ApiError for the operator."""
    try:
        yield
    except StoreUnavailable as error:
        raise ApiError(ApiRefusal.UNAVAILABLE, f"The store does not answer: {error}", retry_after=1) from error


class Operations:
    """An `Operations` reads the registry and the load store for operators, and writes operator orders to the registry.

    Every method may raise ApiError. Orders are idempotent: an order that is given again replaces the earlier order.
    """

    def __init__(self, tier: ExpertTier, registry: RegistryStore, loads: LoadStore) -> None:
        self.tier, self._registry, self._loads = tier, registry, loads

    async def drain(self, shard_id: str, by: str) -> dict[str, Any]:
        """Order the controller to drain a shard. Raises ApiError if all other shards are already draining.

        `by` names the operator.
        """
        with _store_errors():
            shards, orders = await self._registry.shards(), await self._registry.orders()
            known = {shard.id: shard for shard in shards}
            if shard_id not in known:
                raise ApiError(ApiRefusal.NOT_FOUND, f"There is no shard {shard_id!r:.100}; there are {_names(known)}.")
            if not [one for one in with_drain_orders(shards, orders) if one.id != shard_id and not one.draining]:
                raise invalid(
                    f"{shard_id} is the last shard that is not draining, and one shard must hold the experts."
                )
            await self._lift_orders_of_dead(known, orders)
            return await self._give(StandingOrder(OrderKind.DRAIN, shard_id, by=by, at=time.time()))

    async def lift_drain(self, shard_id: str) -> dict[str, Any]:
        """Lift the order to drain a shard, so that the shard may hold experts again."""
        return await self._lift(f"{OrderKind.DRAIN}:{shard_id}")

    async def scale(self, pool: str, num_shards: int, by: str) -> dict[str, Any]:
        """Order the controller to scale a pool to `num_shards` shards, as far as the cluster's resources allow.

        `by` names the operator.
        """
        self._check_pool(pool)
        fewest, most = self.tier.pools[pool]
        if not fewest <= num_shards <= most:
            allowed = f"{fewest}, the pool's fixed size" if fewest == most else f"from {fewest} to {most}"
            bounds = "min_shards and max_shards in the pool's arguments"
            raise invalid(f"shards of {pool} must be {allowed}, not {num_shards}; {bounds} set the limits.", "shards")
        try:
            order = StandingOrder(OrderKind.SCALE, pool, num_shards, by, time.time())
        except ValueError as error:
            raise invalid(str(error), "shards") from None
        with _store_errors():
            return await self._give(order)

    async def lift_scale(self, pool: str) -> dict[str, Any]:
        """Lift the order to scale a pool, so that the pool's load decides its number of shards again."""
        self._check_pool(pool)
        return await self._lift(f"{OrderKind.SCALE}:{pool}")

    async def rebalance(self, by: str) -> dict[str, Any]:
        """Order the controller to make a plan in its next turn.

        The controller carries the plan out even if the cost of the plan exceeds the gain. `by` names the operator.
        """
        with _store_errors():
            return await self._give(StandingOrder(OrderKind.REBALANCE, by=by, at=time.time()))

    async def plan(self) -> dict[str, Any]:
        """Return the plan that the controller would carry out after an order to rebalance. No order is given."""
        plan = await self.tier.preview()
        if plan is None:
            raise ApiError(
                ApiRefusal.UNAVAILABLE, "There is no plan yet because there is no placement yet.", retry_after=1
            )
        if "error" in plan:
            raise ApiError(ApiRefusal.UNAVAILABLE, str(plan["error"]))
        return plan

    async def decisions(self, count: int) -> dict[str, Any]:
        """Return the last `count` decisions of the controller."""
        with _store_errors():
            return {"decisions": await self._registry.decisions(count)}

    async def placement(self) -> dict[str, Any]:
        """Return the inputs of a planner: the layers, the shards, and the homes and standbys by layer and expert."""
        with _store_errors():
            placement, shards = await self._registry.placement(), await self._registry.shards()
        layers = [asdict(spec) for spec in self.tier.layers]
        shown = placement and {name: getattr(placement, name) for name in ("epoch", "model", "homes", "standby")}
        return {"layers": layers, "shards": [shard.to_json() for shard in shards], "placement": shown}

    async def load(self, top: int | None) -> dict[str, Any]:
        """Return the picks per second of experts, averaged over the last minutes.

        The result holds the `top` hottest experts, or all experts by layer if `top` is None.
        """
        num_experts = {spec.layer: spec.num_experts for spec in self.tier.layers}
        with _store_errors():
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
        """Make every backbone record the router's choices within `bounds`; if `bounds` is None, recording stops.

        Returns the response of each backbone.
        """
        return {"backbones": await self.tier.trace(bounds)}

    async def fleet(self) -> dict[str, Any]:
        """Return the leader, pools, orders and last decisions from the registry, for `expertmesh status`."""
        with _store_errors():
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
        shown = [asdict(order) for order in orders.values()]
        return {"leader": leader, "pools": pools, "orders": shown, "decisions": decisions}

    async def _give(self, order: StandingOrder) -> dict[str, Any]:
        await self._registry.give_order(order)
        return {"order": asdict(order)}

    async def _lift(self, name: str) -> dict[str, Any]:
        """Lift the order `name`; "lifted" in the result is True if this call lifted the order.

        If an operator gives the order again at the same time, the new order stays and "lifted" is False.
        """
        with _store_errors():
            order = (await self._registry.orders()).get(name)
            return {"lifted": order is not None and await self._registry.lift_order(order)}

    async def _lift_orders_of_dead(self, known: Mapping[str, Shard], orders: Mapping[str, StandingOrder]) -> None:
        """Lift the orders to drain missing shards that are older than DEAD_SHARD_ORDER_TTL_S seconds.

        Shard ids are not reused, so the orders have no effect and would only accumulate.
        """
        for order in orders.values():
            is_old = time.time() - order.at > DEAD_SHARD_ORDER_TTL_S
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
