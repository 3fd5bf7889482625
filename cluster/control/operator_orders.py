"""A `StandingOrder` is an operator's order, which the registry keeps until it is carried out or lifted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Self

from cluster.topology import Shard

MAX_SHARDS = 1_000_000  # The largest number of shards in an order for a pool; a larger number is a typing error.


class OrderKind(StrEnum):
    """An `OrderKind` says what an operator orders.

    - DRAIN: a shard gives up its experts.
    - SCALE: a pool gets the number of shards that the order gives.
    - REBALANCE: the leader plans at once.
    """

    DRAIN = "drain"
    SCALE = "scale"
    REBALANCE = "rebalance"


@dataclass(frozen=True)
class StandingOrder:
    """A `StandingOrder` is an operator's order; it replaces any older order of the same kind and subject.

    - `subject`: the id of the shard to drain, or the name of the pool to scale; empty for an order to rebalance.
    - `count`: the number of shards that the pool should have; 0 except for an order to scale.
    - `by`: the name of the operator.
    - `at`: when the order was given, in seconds since 1970.
    """

    kind: OrderKind
    subject: str = ""
    count: int = 0
    by: str = ""
    at: float = 0.0

    def __post_init__(self) -> None:
        if (self.kind is not OrderKind.REBALANCE) != bool(self.subject):
            raise ValueError(
                f"An order to {self.kind} has the name {self.subject!r}; an order to drain or scale needs the name of "
                "a shard or pool, and an order to rebalance must not have a name."
            )
        if not 0 <= self.count <= MAX_SHARDS or (self.kind is OrderKind.SCALE) != (self.count > 0):
            raise ValueError(f"The number of shards is {self.count}; it must be from 1 to {MAX_SHARDS:,}.")

    @property
    def name(self) -> str:
        """Return the order's key in the registry: the order's kind and subject."""
        return f"{self.kind}:{self.subject}"

    def to_json(self) -> str:
        """Return the order as the JSON text that the registry stores."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the order that `to_json` wrote as `text`; raise ValueError for any other text."""
        try:
            body = json.loads(text)
            return cls(**{**body, "kind": OrderKind(body["kind"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The stored order {text!r} is not one that Expertmesh wrote ({error}).") from error


@dataclass(frozen=True)
class PoolSize:
    """A `PoolSize` is the leader's decision on how many shards a pool should have.

    `at` is when the leader decided, in seconds since 1970.
    """

    shards: int
    at: float

    def to_json(self) -> str:
        """Return the size as the JSON text that the registry stores."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the size that `to_json` wrote as `text`; raise ValueError for any other text."""
        try:
            body = json.loads(text)
            return cls(int(body["shards"]), float(body["at"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The stored pool size {text!r} is not an object with shards and at ({error!r})."
            ) from error


def with_drain_orders(shards: Iterable[Shard], orders: Mapping[str, StandingOrder]) -> list[Shard]:
    """Return the shards as the planner should see them: a shard that is ordered to drain counts as draining."""
    drained = {order.subject for order in orders.values() if order.kind is OrderKind.DRAIN}
    return [replace(shard, draining=True) if shard.id in drained else shard for shard in shards]


def rebalance_order(orders: Mapping[str, StandingOrder]) -> StandingOrder | None:
    """Return the order to rebalance, or None if `orders` contains no order to rebalance."""
    return next((order for order in orders.values() if order.kind is OrderKind.REBALANCE), None)


def scale_targets(orders: Mapping[str, StandingOrder]) -> dict[str, int]:
    """Return, for each pool with an order, how many shards the operator ordered."""
    return {order.subject: order.count for order in orders.values() if order.kind is OrderKind.SCALE}
