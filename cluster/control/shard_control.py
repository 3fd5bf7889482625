"""The protocol `ShardControl` defines what the leader asks of shards, and with which errors shards fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.placement.migration import Holding
from cluster.topology import Experts, Shard


class ShardFailed(RuntimeError):
    """A shard did not do what it was asked to do."""


class WitnessFailed(ShardFailed):
    """In a comparison of two homes the old home failed, so the comparison says nothing about the new home."""


@dataclass(frozen=True)
class LeaderOrder:
    """A `LeaderOrder` accompanies every change on a shard: shards refuse orders with an older fencing token.

    - `epoch`: the newest published epoch, or 0 if no placement is published.
    - `fencing`: the fencing token of the leader's lease.
    """

    epoch: int
    fencing: int


class ShardControl(Protocol):
    """A `ShardControl` carries the leader's orders to shards.

    Every method may raise ShardFailed, and every method ends in bounded time.
    """

    async def holding(self, shard: Shard) -> Holding:
        """Return the experts that `shard` holds now."""

    async def load(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> Mapping[int, int]:
        """Load and verify experts on `shard`; return the largest gain exponent of each layer concerned."""

    async def drop(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> None:
        """Have `shard` give up experts of each tier."""

    async def disagreements(self, old: Shard, new: Shard, experts: Experts) -> dict[int, list[int]]:
        """Return the experts, by layer, for which the two shards compute different results.

        Raises WitnessFailed if the shard `old` fails.
        """
