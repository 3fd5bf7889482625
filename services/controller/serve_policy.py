"""Serve's view of how many shards a pool should have: what the controller decided, as the pool's own shards report it.

Serve's controller calls this at every turn of its loop, and gets this file by value: it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

DESIRED, DECIDED_AT, HEARD_AT = "desired_shards", "decided_at", "heard_at"
MEMORY_S = 15.0  # after which an older decision counts again: the controller's clock may have been set back


class AutoscalingContext(Protocol):
    """What is used of Serve's AutoscalingContext: series of points by the name of a metric and by replica."""

    target_num_replicas: int

    @property
    def policy_state(self) -> Mapping[str, Any]: ...

    @property
    def current_time(self) -> float | None: ...

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[Any]]] | None: ...


def report(shards: int, decided_at: float) -> dict[str, float]:
    """What a shard tells Serve."""
    return {DESIRED: float(shards), DECIDED_AT: decided_at}


def follow_the_controller(ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The newest decision that any shard has told of; while nobody has, the pool stays as it is.

    It is remembered: Serve forgets what a shard has told as soon as it stops it, and the others may not have heard yet
    of the decision that made it stop.
    """
    reports = ctx.raw_metrics or {}
    desired, decided_at = reports.get(DESIRED, {}), reports.get(DECIDED_AT, {})
    both = [replica for replica in desired if desired[replica] and decided_at.get(replica)]
    heard = [(decided_at[replica][-1].value, int(desired[replica][-1].value)) for replica in both]
    now, before = ctx.current_time or 0.0, ctx.policy_state
    if DECIDED_AT in before and now - before[HEARD_AT] < MEMORY_S:
        known = before[DECIDED_AT], before[DESIRED]
        if not heard or max(heard) < known:
            return known[1], dict(before)
    if not heard:
        return ctx.target_num_replicas, {}
    at, shards = max(heard)
    return shards, {DECIDED_AT: at, DESIRED: shards, HEARD_AT: now}
