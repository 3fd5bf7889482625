"""Second homes: every expert gets a home or a standby that dies neither with its shard nor, if there are two, its node.

Legend: E experts of one layer, S shards, H most homes of an expert, J most that stand by for it (-1: no more).
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
    """Drops the standbys that nobody needs, then gives every expert the homes that it lacks, in place.

    In this order: a device with one of `slots_S` (only for an expert with one home and none that stands by), host
    memory with one of `host_slots_S`, each on another node before the same; disk comes last. A shard in `former_EH`,
    which has the weights on its device now, keeps them in host memory rather than another fetching them. Of equal ones,
    the shard with the fewest on disk, then the one that would be done first if those that it stands by for died.
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
    if is_free:
        return 0 if is_apart else 2  # a device on the same node comes after another node's host memory
    if fits_in_host:
        return 1 if is_apart else 3
    return 4 if is_apart else 5


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _is_in(former_EH: Any, expert: int, shard: int) -> bool:
    return bool((former_EH[expert] == shard).any())


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _is_on_two_nodes(expert: int, homes_EH: Any, num_E: Any, standby_EJ: Any, num_standby_E: Any, node_S: Any) -> bool:
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
    """Keeps the standbys that make two homes of one, or two nodes of one; none on a shard that is a home anyway."""
    given, num_given = standby_EJ[expert].copy(), num_standby_E[expert]
    standby_EJ[expert] = -1
    num_standby_E[expert] = 0
    for needs_other_node in (True, False):  # those on another node first: they may make the rest needless
        for j in range(num_given):
            shard = given[j]
            if shard < 0:
                continue
            total = num_E[expert] + num_standby_E[expert]
            first = homes_EH[expert, 0] if num_E[expert] > 0 else standby_EJ[expert, 0]
            is_apart = total == 0 or node_S[shard] != node_S[first]
            if needs_other_node and not is_apart:
                continue
            is_needed = total < 2 or (
                num_nodes > 1
                and is_apart
                and not _is_on_two_nodes(expert, homes_EH, num_E, standby_EJ, num_standby_E, node_S)
            )
            given[j] = -1
            if is_needed and not is_home(homes_EH, num_E, expert, shard):
                standby_EJ[expert, num_standby_E[expert]] = shard
                num_standby_E[expert] += 1
            else:
                host_slots_S[shard] += 1
