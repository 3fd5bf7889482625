"""`choose_homes` chooses homes for a batch of picks without messages, for benchmarks and for the tests of routing.

Legend: P picks, S shards of a `HomeTable`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.dispatch.routing import HomeTable, choose, no_live_home


@dataclass(frozen=True)
class CallCost:
    """A `CallCost` says what makes a shard slow, in microseconds, where all shards are alike."""

    queued: float = 200.0  # a call in the shard's queue
    expert: float = 20.0  # the weights of one expert
    row: float = 1.0
    message: float = 200.0

    @property
    def max_piece(self) -> int:
        """Return how many rows of one expert stay together: their arithmetic costs as much as reading the weights."""
        return max(1, int(self.expert / self.row))


@dataclass(frozen=True, slots=True)
class ShardCosts:
    """`ShardCosts` says what makes each shard of a table slow, in microseconds, for experts of one size."""

    busy_S: NDArray[np.float64]  # until the shard is done with its work; the work of the call is added to it
    expert_S: NDArray[np.float64]
    row_S: NDArray[np.float64]
    message_S: NDArray[np.float64]
    max_piece: int  # rows of one expert that stay together


def choose_homes(
    expert_P: NDArray[np.integer],
    homes: HomeTable,
    queue_depth: Mapping[str, int],
    excluded: Collection[str] = (),
    cost: CallCost = CallCost(),
) -> NDArray[np.int64]:
    """Return the home of each pick as an index into `homes.shard_ids`; raise NoLiveHome if an expert has none.

    `queue_depth` is the number of calls in the queue of each shard, and `excluded` are shards that may not be asked.
    """
    busy_S = np.array([queue_depth.get(id, 0) * cost.queued for id in homes.shard_ids], dtype=np.float64)
    is_excluded_S = np.array([id in excluded for id in homes.shard_ids], dtype=np.bool_)
    expert_S, row_S, message_S = (np.full(len(busy_S), float(us)) for us in (cost.expert, cost.row, cost.message))
    return assign_homes(expert_P, homes, ShardCosts(busy_S, expert_S, row_S, message_S, cost.max_piece), is_excluded_S)


def assign_homes(
    expert_P: NDArray[np.integer], homes: HomeTable, costs: ShardCosts, is_excluded_S: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the home of each pick where each shard has its own costs; raise NoLiveHome if an expert has none."""
    home_P = np.empty(len(expert_P), dtype=np.int64)
    by_shard = (costs.expert_S, costs.row_S, costs.message_S, costs.max_piece)
    options = (homes.homes_EH, homes.standby_EH, is_excluded_S)
    if not choose(expert_P, *options, costs.busy_S, by_shard, home_P):
        raise no_live_home(expert_P, *options)
    return home_P
