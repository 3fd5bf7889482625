"""First homes are assigned to experts that have no home, at the first placement or after a loss.

Legend: as in `cluster.placement.balance`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.placement.balance import expert_time, ideal_level, is_home, merge_groups


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def count_homes(work_EC: Any, num_slots: int, level: float, most: int, target_E: Any) -> None:
    """Write to `target_E` how many homes each expert should get if there are `num_slots` slots on devices.

    Every expert gets one home. Then, again and again, another home goes to the expert that has the most work per home
    and fewer than `most` homes. The repetition ends when no slot is left, when all experts have `most` homes, or when
    the work per home of this expert is at most half of `level`. Then experts that still have one home get a
    second home while slots remain, the experts with the most work first.
    """
    target_E[:] = 1
    cost_E = work_EC.sum(axis=1)
    left = num_slots - target_E.sum()
    while left > 0:
        expert = np.argmax(np.where(target_E < most, cost_E / target_E, -1.0))
        if target_E[expert] >= most or cost_E[expert] / target_E[expert] <= 0.5 * level:
            break
        target_E[expert] += 1
        left -= 1
    if most > 1:
        for expert in np.argsort(-cost_E, kind="mergesort"):
            if left > 0 and target_E[expert] == 1:
                target_E[expert] = 2
                left -= 1


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def assign(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, node_S: Any, target_E: Any, busy_S: Any
) -> int:
    """Assign homes until each expert has the number of homes in `target_E`; return how many homes found no slot.

    Experts with the most work per home come first. Shards that share an expert, directly or through other shards, form
    a group. If several shards would finish at about the same time, the function prefers a shard outside of the group of
    the expert's first home. This choice makes the groups larger. When the load changes later, rows can be shifted
    between all shards of a group without moving an expert.
    """
    num_experts, num_shards = len(num_E), len(slots_S)
    order = np.argsort(-work_EC.sum(axis=1) / np.maximum(target_E, 1), kind="mergesort")
    group_S = np.arange(num_shards)
    for expert in range(num_experts):
        for i in range(1, num_E[expert]):
            merge_groups(group_S, homes_EH[expert, 0], homes_EH[expert, i])
    slack = 0.25 * ideal_level(work_EC, cost_SP)
    num_left = 0
    for expert in order:
        for _ in range(target_E[expert] - num_E[expert]):
            share = 1.0 / target_E[expert]
            to = _choose_shard(
                expert, share, slack, work_EC, cost_SP, homes_EH, num_E, slots_S, node_S, group_S, busy_S
            )
            if to < 0:
                num_left += 1
                continue
            if num_E[expert] > 0:
                merge_groups(group_S, homes_EH[expert, 0], to)
            homes_EH[expert, num_E[expert]] = to
            num_E[expert] += 1
            slots_S[to] -= 1
            busy_S[to] += share * expert_time(work_EC, cost_SP, expert, to)
    return num_left


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _choose_shard(
    expert: int, share: float, slack: float, work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any,
    node_S: Any, group_S: Any, busy_S: Any,
) -> int:  # fmt: skip
    """Return the shard that should become the next home of `expert`, or -1 if no shard has a free slot.

    The first choice is the shard that would finish first with the fraction `share` of the expert's rows. A second home
    goes to another node than the first home if possible. If the expert already has a home, the function prefers a shard
    outside of the first home's group. Such a shard is preferred only if it would finish at most `slack` µs later than
    the first choice.
    """
    first = homes_EH[expert, 0]
    least, to, is_apart = np.inf, -1, False
    for shard in range(len(slots_S)):
        if slots_S[shard] <= 0 or is_home(homes_EH, num_E, expert, shard):
            continue
        apart = num_E[expert] != 1 or node_S[shard] != node_S[first]
        done = busy_S[shard] + share * expert_time(work_EC, cost_SP, expert, shard)
        if (apart and not is_apart) or (apart == is_apart and done < least):
            least, to, is_apart = done, shard, apart
    if num_E[expert] == 0 or to < 0:
        return to
    linked, linked_done = to, np.inf
    for shard in range(len(slots_S)):
        if slots_S[shard] <= 0 or group_S[shard] == group_S[first]:
            continue
        if is_apart and num_E[expert] == 1 and node_S[shard] == node_S[first]:
            continue
        done = busy_S[shard] + share * expert_time(work_EC, cost_SP, expert, shard)
        if done <= least + slack and done < linked_done:
            linked, linked_done = shard, done
    return linked
