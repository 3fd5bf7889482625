"""A second home is a home or standby that keeps an expert available when the shard or node of its first home is lost.

If the shards run on several nodes, a second home is on another node than the first home.

Legend: as in `cluster.placement.balance`; also J: the largest number of standbys of an expert. Unused entries of
`standby_EJ` are -1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.placement.balance import expert_time, is_home


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def repair(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, standby_EJ: Any, num_standby_E: Any, former_EH: Any,
    slots_S: Any, host_slots_S: Any, node_S: Any, busy_S: Any,
) -> None:  # fmt: skip
    """Drop unneeded standbys, then add the homes or standbys that experts lack for full cover and two nodes, in place.

    The shard of a new home or standby is chosen by these criteria, in this order:

    1. Tier and node, the best first: a device slot on another node, host memory on another node, a device slot on the
       same node, host memory on the same node, disk on another node, disk on the same node. Free device slots
       (`slots_S`) are only for experts with one home and no standby. `host_slots_S` counts the free slots in host
       memory.
    2. A shard in `former_EH` (the running homes). Such a shard already has the weights, so no shard must load them.
    3. The shard with the fewest standbys on disk.
    4. The shard that would finish first if the expert's first home died. The time of a shard includes the rows that the
       shard would compute instead of the dead home.
    """
    num_shards, num_nodes = len(slots_S), len(np.unique(node_S))
    failover_SS = np.zeros((num_shards, num_shards))
    for expert in range(len(num_E)):
        _drop_surplus(expert, homes_EH, num_E, standby_EJ, num_standby_E, host_slots_S, node_S, num_nodes)
        if num_E[expert] > 0:
            home = homes_EH[expert, 0]
            for j in range(num_standby_E[expert]):
                shard = standby_EJ[expert, j]
                failover_SS[home, shard] += expert_time(work_EC, cost_SP, expert, shard)
    for expert in np.argsort(-work_EC.sum(axis=1), kind="mergesort"):
        while num_E[expert] + num_standby_E[expert] < min(2, num_shards) or (
            num_nodes > 1 and not _is_on_two_nodes(expert, homes_EH, num_E, standby_EJ, num_standby_E, node_S)
        ):
            num = num_E[expert] + num_standby_E[expert]
            home = homes_EH[expert, 0] if num_E[expert] > 0 else standby_EJ[expert, 0]
            best, to, is_device = np.inf, -1, False
            can_use_device = num == 1 and num_E[expert] == 1
            for shard in range(num_shards):
                if is_home(homes_EH, num_E, expert, shard) or is_home(standby_EJ, num_standby_E, expert, shard):
                    continue
                is_apart = num == 0 or node_S[shard] != node_S[home]
                is_free = can_use_device and slots_S[shard] > 0
                if num >= 2 and not (is_apart and (is_free or host_slots_S[shard] > 0)):
                    continue
                kind = _preference(is_apart, is_free, host_slots_S[shard] > 0)
                is_former = not is_free and _is_in(former_EH, expert, shard)
                last = busy_S[shard] + (failover_SS[home, shard] if num > 0 else 0.0)
                num_on_disk = max(0, -host_slots_S[shard])
                worth = kind * 1e12 - is_former * 1e11 + num_on_disk * 1e7 + last
                if worth < best:
                    best, to, is_device = worth, shard, is_free
            if to < 0:
                break
            if num > 0:
                failover_SS[home, to] += expert_time(work_EC, cost_SP, expert, to)
            if is_device:
                homes_EH[expert, num_E[expert]] = to
                num_E[expert] += 1
                slots_S[to] -= 1
            else:
                standby_EJ[expert, num_standby_E[expert]] = to
                num_standby_E[expert] += 1
                host_slots_S[to] -= 1


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _preference(is_apart: bool, is_free: bool, fits_in_host: bool) -> int:
    """Return the rank of a shard for a new home or standby; 0 is the best rank.

    - `is_apart`: the shard is on another node than the expert's first home.
    - `is_free`: the expert may use a free slot on the shard's device.
    - `fits_in_host`: the shard's host memory has a free slot.
    """
    if is_free:
        return 0 if is_apart else 2  # A device on the same node ranks below host memory on another node.
    if fits_in_host:
        return 1 if is_apart else 3
    return 4 if is_apart else 5


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _is_in(former_EH: Any, expert: int, shard: int) -> bool:
    return bool((former_EH[expert] == shard).any())


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _is_on_two_nodes(expert: int, homes_EH: Any, num_E: Any, standby_EJ: Any, num_standby_E: Any, node_S: Any) -> bool:
    """Return True if the homes and standbys of an expert are on at least two nodes."""
    node = -1
    for i in range(num_E[expert] + num_standby_E[expert]):
        shard = homes_EH[expert, i] if i < num_E[expert] else standby_EJ[expert, i - num_E[expert]]
        if node >= 0 and node_S[shard] != node:
            return True
        node = node_S[shard]
    return False


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _drop_surplus(
    expert: int, homes_EH: Any, num_E: Any, standby_EJ: Any, num_standby_E: Any, host_slots_S: Any, node_S: Any,
    num_nodes: int,
) -> None:  # fmt: skip
    """Drop the standbys of `expert` that are not needed.

    Without these standbys the expert still has a cover of two and, if there are several nodes, shards on two nodes. A
    standby on a shard that is also a home of the expert is always dropped. Each dropped standby adds a slot to
    `host_slots_S`.
    """
    former_J, num_former = standby_EJ[expert].copy(), num_standby_E[expert]
    standby_EJ[expert] = -1
    num_standby_E[expert] = 0
    # Standbys on another node come first, because keeping them may make the standbys on the same node unneeded.
    for only_other_nodes in (True, False):
        for j in range(num_former):
            shard = former_J[j]
            if shard < 0:
                continue
            total = num_E[expert] + num_standby_E[expert]
            first = homes_EH[expert, 0] if num_E[expert] > 0 else standby_EJ[expert, 0]
            is_apart = total == 0 or node_S[shard] != node_S[first]
            if only_other_nodes and not is_apart:
                continue
            is_needed = total < 2 or (
                num_nodes > 1
                and is_apart
                and not _is_on_two_nodes(expert, homes_EH, num_E, standby_EJ, num_standby_E, node_S)
            )
            former_J[j] = -1
            if is_needed and not is_home(homes_EH, num_E, expert, shard):
                standby_EJ[expert, num_standby_E[expert]] = shard
                num_standby_E[expert] += 1
            else:
                host_slots_S[shard] += 1
