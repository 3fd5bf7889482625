"""The policy in this file tells Ray Serve the size of a pool, from the newest decision of the controller.

The pool's shards report the controller's decisions to Serve. Serve's own controller calls the policy at every turn of
its loop. Serve receives the code of this file in pickled form, so the file imports nothing from Expertmesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

DESIRED, DECIDED_AT, HEARD_AT = "desired_shards", "decided_at", "heard_at"
# Seconds for which the policy remembers the newest decision. Afterwards an older decision counts, because the
# controller's clock may have been set back.
MEMORY_S = 15.0


class AutoscalingContext(Protocol):
    """An `AutoscalingContext` declares the attributes of Serve's class `AutoscalingContext` that the policy reads.

    - `target_num_replicas`: the number of shards that Serve now gives the pool.
    - `policy_state`: the state that the policy returned from the last call.
    - `current_time`: the time in seconds; the policy uses only differences of times.
    - `raw_metrics`: for each metric's name and each replica, the series of values that the replica reported.
    """

    target_num_replicas: int

    @property
    def policy_state(self) -> Mapping[str, Any]: ...

    @property
    def current_time(self) -> float | None: ...

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[Any]]] | None: ...


def report(shards: int, decided_at: float) -> dict[str, float]:
    """Return the metrics with which a shard reports its pool's size to Serve."""
    return {DESIRED: float(shards), DECIDED_AT: decided_at}


def follow_the_controller(ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Return a pair: the newest pool size that any shard has reported, and the policy's state for the next call.

    While no shard has reported a decision, the pool keeps its size. The state remembers the newest decision for
    `MEMORY_S` seconds. Serve discards the reports of a shard that it stops, and the other shards of the pool may not
    have read the newest decision yet.
    """
    reports = ctx.raw_metrics or {}
    desired, decided_at = reports.get(DESIRED, {}), reports.get(DECIDED_AT, {})
    replicas = [replica for replica in desired if desired[replica] and decided_at.get(replica)]
    heard = [(decided_at[replica][-1].value, int(desired[replica][-1].value)) for replica in replicas]
    now, before = ctx.current_time or 0.0, ctx.policy_state
    if DECIDED_AT in before and now - before[HEARD_AT] < MEMORY_S:
        known = before[DECIDED_AT], before[DESIRED]
        if not heard or max(heard) < known:
            return known[1], dict(before)
    if not heard:
        return ctx.target_num_replicas, {}
    at, shards = max(heard)
    return shards, {DECIDED_AT: at, DESIRED: shards, HEARD_AT: now}
