"""Expert groups are kept together on few shards, so that a token goes to fewer shards.

Some routers divide the experts of a layer into groups, and take a token's experts only from a few of the groups
(DeepSeek-V3, arXiv 2412.19437, section 2.1.2). A token's row is sent to every shard that computes one of the token's
experts. If the experts of a group are together, the experts of a token are on fewer shards.

`assign` places the experts of a new layer group by group. `gather` improves a placement by moves and swaps.

The expected number of shards per token is an estimate: each token uses the same number of groups, picks the same number
of experts in each of these groups, and picks all experts equally often. The estimate ignores the load on purpose, so
that experts move for the sake of groups only once, and not again when the load changes.

Legend: as in `cluster.placement.balance`; also G: the groups of the layer, and N: all homes of all experts. Group g has
the experts `group_size * g` to `group_size * (g + 1) - 1`. `cell_SG`: how many experts of a group a shard holds; an
expert with c homes counts as 1 / c on each of its shards. `miss_SG`: the probability that a token picks none of these
experts. `routing` has three numbers: `group_size`, the share of the groups that a token uses, and the number of experts
that a token picks in a group that it uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.placement.balance import (
    SWEEPS,
    TOLERANCE,
    expert_time,
    ideal_level,
    is_home,
    merge_groups,
    split_rows,
    water_fill,
)

SMALLEST_MISS = 1e-9  # Lower bound of `miss_SG`, because the estimate of a step divides by it.


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def shards_per_token(homes_EH: Any, num_E: Any, routing: Any, num_shards: int) -> float:
    """Return the expected number of shards that compute the experts of a token."""
    _, miss_SG = _cells(homes_EH, num_E, routing, num_shards)
    return float(num_shards - _products(miss_SG).sum())


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _cells(homes_EH: Any, num_E: Any, routing: Any, num_shards: int) -> Any:
    """Return `cell_SG` and `miss_SG`."""
    size = routing[0]
    cell_SG, miss_SG = np.zeros((num_shards, len(num_E) // size)), np.ones((num_shards, len(num_E) // size))
    for expert in range(len(num_E)):
        for i in range(num_E[expert]):
            cell_SG[homes_EH[expert, i], expert // size] += 1.0 / num_E[expert]
    for shard in range(num_shards):
        for group in range(cell_SG.shape[1]):
            miss_SG[shard, group] = _miss(cell_SG[shard, group], routing)
    return cell_SG, miss_SG


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _miss(num_experts: float, routing: Any) -> float:
    """Return the probability that a token picks none of `num_experts` experts of a group."""
    size, used, picks = routing
    return float(max(SMALLEST_MISS, 1.0 - used * (1.0 - max(0.0, 1.0 - num_experts / size) ** picks)))


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _products(miss_SG: Any) -> Any:
    """Return the probability that a token picks no expert on each shard, [S]."""
    miss_S = np.ones(len(miss_SG))
    for shard in range(len(miss_SG)):
        miss_S[shard] = miss_SG[shard].prod()
    return miss_S


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def assign(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, node_S: Any, target_E: Any, group_size: int
) -> None:
    """Assign homes to a layer without homes, until each expert has the number of homes in `target_E`, if slots suffice.

    First, every expert gets one home. The shards are filled one after the other with one group after the other, so
    that most shards hold experts of one or two groups. Each shard gets its part of all homes and of all work. Shards
    that follow each other are on different nodes if possible, so that other homes can be near the experts of the group
    and still on another node.
    """
    work_E = cost_SP[:, 1].mean() * work_EC[:, 0] + cost_SP[:, 2].mean() * work_EC[:, 1]
    speed_S = 1.0 / np.maximum(cost_SP[:, 1] * work_EC[:, 0].sum() + cost_SP[:, 2] * work_EC[:, 1].sum(), 1e-12)
    left_slots, left_speed, left_work = slots_S.sum(), speed_S.sum(), work_E.sum()
    queue, start = np.arange(len(num_E)), 0
    for shard in _node_by_node(node_S):
        num = min(slots_S[shard], -((start - len(queue)) * slots_S[shard] // max(left_slots, 1)))
        work = left_work * speed_S[shard] / left_speed
        left_slots -= slots_S[shard]
        left_speed -= speed_S[shard]
        while num > 0 and start < len(queue):
            end = min(len(queue), (start // group_size + 1) * group_size)
            taken = min(num, end - start)
            if taken < end - start:
                _bring_forward(queue[start:end], taken, work, work_E)
            for expert in queue[start : start + taken]:
                homes_EH[expert, 0] = shard
                num_E[expert] = 1
                work -= work_E[expert]
                left_work -= work_E[expert]
            slots_S[shard] -= taken
            num -= taken
            start += taken
    _assign_copies(work_EC, cost_SP, homes_EH, num_E, slots_S, node_S, target_E, group_size)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _node_by_node(node_S: Any) -> Any:
    """Return the shards in an order in which shards that follow each other are on different nodes, if possible."""
    rank_S = np.zeros(len(node_S), np.int64)
    for shard in range(len(node_S)):
        rank_S[shard] = (node_S[:shard] == node_S[shard]).sum()
    return np.argsort(rank_S * len(node_S) + node_S, kind="mergesort")


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _bring_forward(queue: Any, num: int, work: float, work_E: Any) -> None:
    """Reorder `queue` so that the work of its first `num` experts is close to `work` (µs)."""
    queue[:] = queue[np.argsort(-work_E[queue], kind="mergesort")]
    is_first = np.zeros(len(queue), np.bool_)
    for i in range(num):  # Experts of all sizes come first, so that experts of all sizes are left for other shards.
        is_first[(2 * i + 1) * len(queue) // (2 * num)] = True
    queue[:] = np.concatenate((queue[is_first], queue[~is_first]))
    for _ in range(num):
        excess = work_E[queue[:num]].sum() - work
        least, first, later = 0.99 * abs(excess), -1, -1
        for i in range(num):
            for j in range(num, len(queue)):
                left = abs(excess - work_E[queue[i]] + work_E[queue[j]])
                if left < least:
                    least, first, later = left, i, j
        if first < 0:
            return
        queue[first], queue[later] = queue[later], queue[first]


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _assign_copies(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, node_S: Any, target_E: Any, group_size: int
) -> None:
    """Assign more homes to experts with one home, the experts with the most work per home first.

    The preferred shards would finish at most a quarter of the ideal level after the shard that would finish first. Of
    these shards, the function prefers shards on another node than the first home (for second homes), then shards that
    do not yet share rows with the first home, directly or through other shards (`cluster.placement.first_homes`), and
    then the shard with the most experts of the group.
    """
    num_shards, slack = len(slots_S), 0.25 * ideal_level(work_EC, cost_SP)
    linked_S, busy_S = np.arange(num_shards), cost_SP[:, 0].copy()
    held_SG = np.zeros((num_shards, len(num_E) // group_size))
    for expert in range(len(num_E)):
        for i in range(num_E[expert]):
            held_SG[homes_EH[expert, i], expert // group_size] += 1
            busy_S[homes_EH[expert, i]] += expert_time(work_EC, cost_SP, expert, homes_EH[expert, i]) / target_E[expert]
    for expert in np.argsort(-work_EC.sum(axis=1) / target_E, kind="mergesort"):
        first = homes_EH[expert, 0]
        for _ in range(target_E[expert] - num_E[expert] if num_E[expert] > 0 else 0):
            least = np.inf
            for shard in range(num_shards):
                if slots_S[shard] > 0 and not is_home(homes_EH, num_E, expert, shard):
                    least = min(least, busy_S[shard] + expert_time(work_EC, cost_SP, expert, shard) / target_E[expert])
            to, best = -1, -np.inf
            for shard in range(num_shards):
                if slots_S[shard] <= 0 or is_home(homes_EH, num_E, expert, shard):
                    continue
                done = busy_S[shard] + expert_time(work_EC, cost_SP, expert, shard) / target_E[expert]
                worth = held_SG[shard, expert // group_size] - done / (least + slack)
                worth += 1e4 * (done <= least + slack) + 1e3 * (linked_S[shard] != linked_S[first])
                worth += 1e5 * (num_E[expert] == 1 and node_S[shard] != node_S[first])
                if worth > best:
                    to, best = shard, worth
            if to < 0:
                break
            merge_groups(linked_S, first, to)
            homes_EH[expert, num_E[expert]] = to
            num_E[expert] += 1
            slots_S[to] -= 1
            held_SG[to, expert // group_size] += 1
            busy_S[to] += expert_time(work_EC, cost_SP, expert, to) / target_E[expert]


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def gather(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, standby_EJ: Any, num_standby_E: Any, slots_S: Any,
    fallback_E: Any, promotion_us: float, node_S: Any, routing: Any, max_level: float, min_gain: float, max_moves: int,
) -> int:  # fmt: skip
    """Move homes to shards with more experts of their groups, in place; return how many homes were moved.

    A step moves a home to a free slot, or swaps two homes. The function takes the step that saves the most shards per
    token again and again, until no step saves `min_gain` for each moved home, or until `max_moves` homes are moved.

    - No step makes a shard slower than `max_level` (µs), or than the slowest shard at the start.
    - An expert whose homes and standbys are on two nodes keeps them on two nodes.
    """
    share_EH, busy_S = np.empty(homes_EH.shape), np.empty(len(cost_SP))
    split_rows(work_EC, cost_SP, homes_EH, num_E, fallback_E, promotion_us, share_EH, busy_S)
    level, num_moved = max(max_level, busy_S.max()), 0
    while num_moved < max_moves:
        expert, i, other, j, to = _best_step(
            work_EC, cost_SP, homes_EH, num_E, standby_EJ, num_standby_E, share_EH, busy_S, slots_S, node_S, routing,
            level, min_gain, max_moves - num_moved > 1,
        )  # fmt: skip
        if expert < 0:
            break
        shard = homes_EH[expert, i]
        _move(expert, i, to, work_EC, cost_SP, homes_EH, share_EH, busy_S, slots_S)
        if other >= 0:
            _move(other, j, shard, work_EC, cost_SP, homes_EH, share_EH, busy_S, slots_S)
        num_moved += 1 if other < 0 else 2
        water_fill(work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, SWEEPS, TOLERANCE)
    return num_moved


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _move(
    expert: int, i: int, to: int, work_EC: Any, cost_SP: Any, homes_EH: Any, share_EH: Any, busy_S: Any, slots_S: Any
) -> None:
    """Replace home `i` of `expert` by the shard `to`, which then computes the same share of the expert's rows."""
    shard = homes_EH[expert, i]
    busy_S[shard] -= share_EH[expert, i] * expert_time(work_EC, cost_SP, expert, shard)
    busy_S[to] += share_EH[expert, i] * expert_time(work_EC, cost_SP, expert, to)
    homes_EH[expert, i] = to
    slots_S[shard] += 1
    slots_S[to] -= 1


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _best_step(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, standby_EJ: Any, num_standby_E: Any, share_EH: Any,
    busy_S: Any, slots_S: Any, node_S: Any, routing: Any, level: float, min_gain: float, can_swap: bool,
) -> tuple[int, int, int, int, int]:  # fmt: skip
    """Return the step that saves the most shards per token and moved home, as (expert, i, other, j, to).

    Home `i` of `expert` moves to the shard `to`. In a swap, home `j` of `other` is on `to` and moves to the former
    shard of `expert`. In a move to a free slot, `other` and `j` are -1. If no step saves `min_gain` for each moved
    home, `expert` is -1.
    """
    size, num_shards = routing[0], len(busy_S)
    cell_SG, miss_SG = _cells(homes_EH, num_E, routing, num_shards)
    miss_S = _products(miss_SG)
    home_N, leave_N, arrive_NS = _factors(homes_EH, num_E, routing, cell_SG, miss_SG)
    best, chosen = min_gain, (-1, -1, -1, -1, -1)
    for n in range(len(home_N)):
        expert, i, shard = home_N[n]
        for to in range(num_shards):
            gain = miss_S[shard] * (leave_N[n] - 1) + miss_S[to] * (arrive_NS[n, to] - 1)
            if gain <= best or slots_S[to] <= 0:
                continue
            done = busy_S[to] + share_EH[expert, i] * expert_time(work_EC, cost_SP, expert, to)
            if done <= level and _may_move(expert, i, to, homes_EH, num_E, standby_EJ, num_standby_E, node_S):
                best, chosen = gain, (expert, i, -1, -1, to)
        for m in range(n + 1, len(home_N) if can_swap else 0):
            other, j, to = home_N[m]
            gain = miss_S[shard] * (leave_N[n] * arrive_NS[m, shard] - 1)
            gain = (gain + miss_S[to] * (leave_N[m] * arrive_NS[n, to] - 1)) / 2
            if gain <= best or to == shard or other // size == expert // size:
                continue
            share, other_share = share_EH[expert, i], share_EH[other, j]
            rise = other_share * expert_time(work_EC, cost_SP, other, shard)
            rise -= share * expert_time(work_EC, cost_SP, expert, shard)
            rise_there = share * expert_time(work_EC, cost_SP, expert, to)
            rise_there -= other_share * expert_time(work_EC, cost_SP, other, to)
            if max(rise, 0.0) + busy_S[shard] > level or max(rise_there, 0.0) + busy_S[to] > level:
                continue
            if not _may_move(expert, i, to, homes_EH, num_E, standby_EJ, num_standby_E, node_S):
                continue
            if _may_move(other, j, shard, homes_EH, num_E, standby_EJ, num_standby_E, node_S):
                best, chosen = gain, (expert, i, other, j, to)
    return chosen


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _factors(homes_EH: Any, num_E: Any, routing: Any, cell_SG: Any, miss_SG: Any) -> Any:
    """Return all homes, and by which factors the shards' probabilities of no pick change when a home moves.

    - `home_N`: the expert, the position among the expert's homes, and the shard of each home.
    - `leave_N`: the factor for the home's shard. `arrive_NS`: the factor for each shard to which the home may move.
    """
    num_shards, num_homes, n = len(miss_SG), num_E.sum(), 0
    home_N, leave_N, arrive_NS = (
        np.empty((num_homes, 3), np.int64),
        np.empty(num_homes),
        np.empty((num_homes, num_shards)),
    )
    for expert in range(len(num_E)):
        group = expert // routing[0]
        for i in range(num_E[expert]):
            shard = homes_EH[expert, i]
            home_N[n, 0], home_N[n, 1], home_N[n, 2] = expert, i, shard
            leave_N[n] = _miss(cell_SG[shard, group] - 1.0 / num_E[expert], routing) / miss_SG[shard, group]
            for to in range(num_shards):
                more = _miss(cell_SG[to, group] + 1.0 / num_E[expert], routing) if i == 0 else 0.0
                arrive_NS[n, to] = more / miss_SG[to, group] if i == 0 else arrive_NS[n - 1, to]
            n += 1
    return home_N, leave_N, arrive_NS


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _may_move(
    expert: int, i: int, to: int, homes_EH: Any, num_E: Any, standby_EJ: Any, num_standby_E: Any, node_S: Any
) -> bool:
    """Return True if home `i` of `expert` may move to the shard `to`.

    The shard must not be another home of the expert. If the expert's homes and standbys are on two nodes, they must
    still be on two nodes.
    """
    if is_home(homes_EH, num_E, expert, to):
        return False
    node, node_before, is_apart, was_apart = -1, -1, False, False
    for k in range(num_E[expert] + num_standby_E[expert]):
        shard = homes_EH[expert, k] if k < num_E[expert] else standby_EJ[expert, k - num_E[expert]]
        now = node_S[to] if k == i else node_S[shard]
        was_apart |= node_before >= 0 and node_S[shard] != node_before
        is_apart |= node >= 0 and now != node
        node, node_before = now, node_S[shard]
    return is_apart or not was_apart
