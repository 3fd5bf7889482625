"""`choose_homes` chooses homes for a batch of picks and sends no messages; benchmarks and routing tests use it.

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
    """A `CallCost` is the cost model that all shards of a benchmark share; all times are in microseconds."""

    queued: float = 200.0  # time for each call that waits in the shard's queue
    expert: float = 20.0  # time to read the weights of one expert
    row: float = 1.0  # time to compute one row
    message: float = 200.0  # time for one message to the shard

    @property
    def max_piece(self) -> int:
        """Return how many rows a shard can compute in the time in which it reads the weights of one expert."""
        return max(1, int(self.expert / self.row))


@dataclass(frozen=True, slots=True)
class ShardCosts:
    """`ShardCosts` has the cost model of each shard of a `HomeTable`; all times are in microseconds."""

    busy_S: NDArray[np.float64]  # time until the shard is free; `assign_homes` adds the time of the new call
    expert_S: NDArray[np.float64]  # time to read the weights of one expert
    row_S: NDArray[np.float64]  # time to compute one row
    message_S: NDArray[np.float64]  # time for one message to the shard
    max_piece: int  # up to this number, the rows of one expert all go to the same home


def choose_homes(
    expert_P: NDArray[np.integer],
    homes: HomeTable,
    queue_depth: Mapping[str, int],
    excluded: Collection[str] = (),
    cost: CallCost = CallCost(),
) -> NDArray[np.int64]:
    """Return the home of each pick (P) as an index into `homes.shard_ids`; raise NoLiveHome if an expert has no home.

    - `expert_P`: the expert of each pick
    - `queue_depth`: the number of calls in the queue of each shard, by shard id; a missing id means 0
    - `excluded`: the ids of shards that may not be chosen
    """
    busy_S = np.array([queue_depth.get(id, 0) * cost.queued for id in homes.shard_ids], dtype=np.float64)
    is_excluded_S = np.array([id in excluded for id in homes.shard_ids], dtype=np.bool_)
    expert_S, row_S, message_S = (np.full(len(busy_S), float(us)) for us in (cost.expert, cost.row, cost.message))
    return assign_homes(expert_P, homes, ShardCosts(busy_S, expert_S, row_S, message_S, cost.max_piece), is_excluded_S)


def assign_homes(
    expert_P: NDArray[np.integer], homes: HomeTable, costs: ShardCosts, is_excluded_S: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the home of each pick (P) as an index into `homes.shard_ids`; raise NoLiveHome if an expert has no home.

    `is_excluded_S` is True for shards that may not be chosen. The function adds the time of the new call to `costs`.
    """
    home_P = np.empty(len(expert_P), dtype=np.int64)
    by_shard = (costs.expert_S, costs.row_S, costs.message_S, costs.max_piece)
    options = (homes.homes_EH, homes.standby_EH, is_excluded_S)
    if not choose(expert_P, *options, costs.busy_S, by_shard, home_P):
        raise no_live_home(expert_P, *options)
    return home_P
