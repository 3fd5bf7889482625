"""A probe is a request to a shard whose circuit is open; the reply to a probe shows whether the shard works again.

No call waits for the reply of a probe, because another home computes the same picks.
"""

from __future__ import annotations

import numpy as np

from cluster.dispatch.fleet_view import ShardFleet
from cluster.dispatch.routing import group
from cluster.dispatch.shard_request import PickIds, ShardRequest

MAX_PROBE_PICKS = 8  # enough picks to show that a shard works, at little cost for the shard


def make_probes(
    fleet: ShardFleet, layer: int, expert_P: PickIds, top_k: int, max_rows: int, now: float
) -> list[ShardRequest]:
    """Return a list with the request that probes a shard, or an empty list if no probe is due.

    The probe carries picks of one row for which the shard is a home. If the call has no picks for the shard, the probe
    is postponed.
    """
    health = fleet.due_probe(now)
    if health is None:
        return []
    assert fleet.view is not None
    table = fleet.view.tables[layer]
    picks = (table.homes_EH[expert_P] == health.shard_index).any(1).nonzero()[0]
    if not len(picks):
        fleet.postpone_probe(health, now)
        return []
    picks = picks[picks // top_k == picks[0] // top_k][:MAX_PROBE_PICKS]
    sizes = (top_k, len(table.shard_ids), len(table.homes), max_rows)
    grouped = group(picks, np.full(len(picks), health.shard_index), expert_P, *sizes)
    requests = fleet.make_requests(layer, expert_P, grouped, now)
    for request in requests:
        fleet.note_probe(request)
    fleet.traffic.num_probes += len(requests)
    return requests
