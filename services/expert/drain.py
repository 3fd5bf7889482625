"""A draining shard may stop when its experts have moved, or when no controller will move the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cluster.topology import Placement, Shard

# Maximum seconds that a draining shard waits for its experts to move. A supervisor must wait longer than
# MOVE_TIMEOUT_S before it kills a shard that does not stop.
MOVE_TIMEOUT_S = 30.0
DRAIN_POLL_S = 0.2  # seconds between two reads of the registry
# Seconds without a request after which a shard stops once its experts have moved. By then every backbone uses a
# placement that no longer names the shard.
QUIET_S = 1.0
ABANDONED_S = 15.0  # seconds without a leader after which a shard stops; a new leader takes over sooner
# Seconds without an answer from Redis after which a shard stops: without Redis, no controller can move experts.
CUT_OFF_S = 2.0


class DrainState(Enum):
    """A `DrainState` says how far a shard's drain has come; the value of a state is a clause for the log."""

    NEVER_PLACED = "no placement was published"
    MOVED = "the placement does not name it any more"
    ALONE = "there is no other shard that stays"
    ABANDONED = "there is no leader that could move its experts"
    CUT_OFF = "the store does not answer"
    WAITING = "its experts are still to be moved"


def drain_state(shard_id: str, placement: Placement | None, shards: Sequence[Shard], has_leader: bool) -> DrainState:
    """Return how far the drain of the shard `shard_id` has come; `shards` are all live shards.

    When the whole application stops, all shards drain at the same time, so the state of each shard is ALONE.
    """
    if placement is None:
        return DrainState.NEVER_PLACED
    if shard_id not in placement.shard_ids:
        return DrainState.MOVED
    if all(shard.draining or shard.id == shard_id for shard in shards):
        return DrainState.ALONE
    return DrainState.WAITING if has_leader else DrainState.ABANDONED


@dataclass(frozen=True)
class DrainTimes:
    """`DrainTimes` say how long a draining shard has had no request and has been in its drain state."""

    since_request_s: float  # seconds since the last compute request
    in_state_s: float  # seconds since the drain state last changed


def may_stop(state: DrainState, times: DrainTimes) -> bool:
    """Return True if a draining shard in `state` no longer needs to serve requests."""
    if state is DrainState.MOVED:
        return times.since_request_s >= QUIET_S
    if state is DrainState.ABANDONED:
        return times.in_state_s >= ABANDONED_S
    if state is DrainState.CUT_OFF:
        return times.in_state_s >= CUT_OFF_S
    return state is not DrainState.WAITING
