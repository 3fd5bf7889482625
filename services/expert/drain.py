"""When a shard that was told to stop may go: it serves on until its experts have moved, or until nobody moves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cluster.topology import Placement, Shard

LEAVE_TIMEOUT_S = 30.0  # for its experts to move; whoever kills what does not stop must wait longer than that
LEAVE_POLL_S = 0.2
QUIET_S = 1.0  # without a call: every backbone has seen the placement that no longer names it
ABANDONED_S = 15.0  # without a leader; another one starts in less than that
CUT_OFF_S = 2.0  # without a store: nobody will move anything


class DrainOutlook(Enum):
    """What a leaving shard may hope for."""

    NEVER_PLACED = "no placement was published"
    MOVED = "the placement does not name it any more"
    ALONE = "there is no other shard that stays"
    ABANDONED = "nobody is there who could move its experts"
    CUT_OFF = "the store does not answer"
    WAITING = "its experts are still to be moved"


def outlook(shard_id: str, placement: Placement | None, shards: Sequence[Shard], has_leader: bool) -> DrainOutlook:
    """Of a shard that has said that it drains; `shards` are those that are alive.

    Where the whole application stops, every shard drains at once, and so each of them is alone.
    """
    if placement is None:
        return DrainOutlook.NEVER_PLACED
    if shard_id not in placement.shard_ids:
        return DrainOutlook.MOVED
    if all(shard.draining or shard.id == shard_id for shard in shards):
        return DrainOutlook.ALONE
    return DrainOutlook.WAITING if has_leader else DrainOutlook.ABANDONED


@dataclass(frozen=True)
class DrainWait:
    """For how many seconds nobody has called, and for how many the outlook has been what it is."""

    quiet_s: float
    same_s: float


def may_go(now: DrainOutlook, waited: DrainWait) -> bool:
    if now is DrainOutlook.MOVED:
        return waited.quiet_s >= QUIET_S
    if now is DrainOutlook.ABANDONED:
        return waited.same_s >= ABANDONED_S
    if now is DrainOutlook.CUT_OFF:
        return waited.same_s >= CUT_OFF_S
    return now is not DrainOutlook.WAITING
