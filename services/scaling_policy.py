"""Serve's view of how many shards a pool should have: what the controller decided, as the pool's own shards report it.

Serve's controller calls this at every turn of its loop, and gets this file by value: it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

DESIRED, DECIDED_AT = "desired_shards", "decided_at"


class Context(Protocol):
    """What is used of Serve's AutoscalingContext: series of points by the name of a metric and by replica."""

    target_num_replicas: int

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[Any]]] | None: ...


def report(shards: int, decided_at: float) -> dict[str, float]:
    """What a shard tells Serve."""
    return {DESIRED: float(shards), DECIDED_AT: decided_at}


def follow_the_controller(ctx: Context) -> tuple[int, dict[str, Any]]:
    """The newest decision that any shard has heard of; while nobody has heard of one, the pool stays as it is."""
    reports = ctx.raw_metrics or {}
    desired, decided_at = reports.get(DESIRED, {}), reports.get(DECIDED_AT, {})
    both = [replica for replica in desired if desired[replica] and decided_at.get(replica)]
    heard = [(decided_at[replica][-1].value, int(desired[replica][-1].value)) for replica in both]
    return (max(heard)[1] if heard else ctx.target_num_replicas), {}
