"""The protocol `ShardControl` defines the leader's calls to shards and the errors that these calls raise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.placement.migration import Holding
from cluster.topology import Experts, Shard


class ShardFailed(RuntimeError):
    """A shard did not answer, or did not carry out an order."""


class WitnessFailed(ShardFailed):
    """The witness failed during a canary, so the canary says nothing about the new home."""


@dataclass(frozen=True)
class LeaderOrder:
    """A `LeaderOrder` is sent with every change to a shard; shards refuse orders with an older fencing token.

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
        """Load and verify experts on `shard`; return the largest gain exponent of the experts of each layer.

        `device` are the experts, by layer, to load into device memory. `standby` are the experts, by layer, of which
        the shard becomes a standby.
        """

    async def drop(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> None:
        """Order `shard` to drop the experts `device` from device memory, and to drop the standbys `standby`."""

    async def disagreements(self, old: Shard, new: Shard, experts: Experts) -> dict[int, list[int]]:
        """Return the experts in `experts`, by layer, for which the shards `old` and `new` compute different results.

        Raises WitnessFailed if the shard `old` fails.
        """
