"""What operators have ordered: kept in the registry until it is done or taken back, and obeyed by the controller."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Self

from cluster.topology import Shard

MAX_SHARDS = 1_000_000  # of a pool: more is a slip of the finger


class OrderKind(StrEnum):
    """Drain: a shard is to give up its experts. Scale: a pool is to have so many shards. Rebalance: plan at once."""

    DRAIN = "drain"
    SCALE = "scale"
    REBALANCE = "rebalance"


@dataclass(frozen=True)
class StandingOrder:
    """One order; `subject` is a shard's id or a pool's name, `count` the shards that a pool is to have.

    `at` is in seconds since 1970, `by` says who ordered it. Giving an order again replaces it: there is one at a time
    of each kind and subject.
    """

    kind: OrderKind
    subject: str = ""
    count: int = 0
    by: str = ""
    at: float = 0.0

    def __post_init__(self) -> None:
        if (self.kind is not OrderKind.REBALANCE) != bool(self.subject):
            raise ValueError(f"An order to {self.kind} needs the name of a shard or pool, and one to rebalance none.")
        if not 0 <= self.count <= MAX_SHARDS or (self.kind is OrderKind.SCALE) != (self.count > 0):
            raise ValueError(f"The number of shards is {self.count}; it must be from 1 to {MAX_SHARDS:,}.")

    @property
    def name(self) -> str:
        """What there is one of at a time."""
        return f"{self.kind}:{self.subject}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; anything else is a ValueError."""
        try:
            body = json.loads(text)
            return cls(**{**body, "kind": OrderKind(body["kind"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The stored order {text!r} is not one that Expertmesh wrote ({error}).") from error


@dataclass(frozen=True)
class PoolSize:
    """How many shards a pool was decided to have, and when (seconds since 1970)."""

    shards: int
    at: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; anything else is a ValueError."""
        try:
            body = json.loads(text)
            return cls(int(body["shards"]), float(body["at"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The stored pool size {text!r} is not an object with shards and at ({error!r})."
            ) from error


def with_drain_orders(shards: Iterable[Shard], orders: Mapping[str, StandingOrder]) -> list[Shard]:
    """The shards as a planner should see them: those that are ordered to drain count as draining."""
    drained = {order.subject for order in orders.values() if order.kind is OrderKind.DRAIN}
    return [replace(shard, draining=True) if shard.id in drained else shard for shard in shards]


def rebalance_order(orders: Mapping[str, StandingOrder]) -> StandingOrder | None:
    """Return the order to plan at once, if an operator has given one."""
    return next((order for order in orders.values() if order.kind is OrderKind.REBALANCE), None)


def scale_targets(orders: Mapping[str, StandingOrder]) -> dict[str, int]:
    """The number of shards that each pool was ordered to have; pools without an order are left out."""
    return {order.subject: order.count for order in orders.values() if order.kind is OrderKind.SCALE}
