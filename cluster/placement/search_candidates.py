"""Search candidates are the steps that the local search considers, each with an estimate of the time that it saves.

Legend: as in `cluster.placement.balance`; also X: candidates, and K = 5: the numbers that describe a step
(`cluster.placement.search_step`). `steps_XK` holds the best candidates so far, the best first. `worth_X` holds the
estimates of these candidates in µs per expert moved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.placement.balance import TOLERANCE, expert_time, is_home, merge_groups


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def promising_steps(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any, is_cold_E: Any,
    can_swap: bool, num_trials: int,
) -> Any:  # fmt: skip
    """Return the `num_trials` steps with the highest estimates, best first, and the estimates in µs per expert moved.

    The estimate of a step says how much less time the slowest shards would need. Copies to a free slot, or in place of
    a spare home (`_spare_homes`), are always considered. Detours and swaps are considered only if `can_swap` is True.
    An estimate of 0 marks an unused entry.
    """
    level = busy_S.max()
    is_slow_S = busy_S >= level * (1 - 10 * TOLERANCE)
    num_slow = is_slow_S.sum()
    _, size_S = _sharing_groups(work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S)
    out_S, out_load_S = _spare_homes(work_EC, cost_SP, homes_EH, num_E, share_EH, is_cold_E, len(busy_S))
    steps_XK, worth_X = np.full((num_trials, 5), -1, np.int64), np.zeros(num_trials)
    max_homes = homes_EH.shape[1]
    for expert in range(len(num_E)):
        carried, slow_home = 0.0, -1
        for i in range(num_E[expert]):
            home = homes_EH[expert, i]
            if is_slow_S[home]:
                slow_home = home
                carried += share_EH[expert, i] * expert_time(work_EC, cost_SP, expert, home)
        if carried <= 0 or num_E[expert] >= max_homes:
            continue
        for to in range(len(busy_S)):
            if is_slow_S[to] or is_home(homes_EH, num_E, expert, to):
                continue
            ratio = expert_time(work_EC, cost_SP, expert, to) / expert_time(work_EC, cost_SP, expert, slow_home)
            base, out = busy_S[to], -1
            if slots_S[to] <= 0:
                out = out_S[to]
                if out >= 0 and out != expert:
                    base -= out_load_S[to]
            if slots_S[to] > 0 or (out >= 0 and out != expert):
                together = size_S[to] / (num_slow * ratio + size_S[to])
                fall = min(carried / num_slow, (level - busy_S[to] + (busy_S[to] - base) / size_S[to]) * together)
                _keep_best(fall, (expert, to, out, -1, -1), steps_XK, worth_X)
    if can_swap:
        _score_detours(
            work_EC,
            cost_SP,
            homes_EH,
            num_E,
            share_EH,
            busy_S,
            slots_S,
            is_slow_S,
            out_S,
            out_load_S,
            steps_XK,
            worth_X,
        )
        for expert in range(len(num_E)):
            for i in range(num_E[expert]):
                if is_slow_S[homes_EH[expert, i]]:
                    _score_swaps(
                        expert, i, level, num_slow, work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, is_slow_S,
                        steps_XK, worth_X,
                    )  # fmt: skip
    return steps_XK, worth_X


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _score_detours(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any, is_slow_S: Any,
    out_S: Any, out_load_S: Any, steps_XK: Any, worth_X: Any,
) -> None:  # fmt: skip
    """Estimate the detours: copies of an expert to a full shard, whose lightest expert moves on to another shard.

    The lightest expert moves to the shard that would be the least busy, either to a free slot or in place of the spare
    home there. A detour moves two experts, so its estimate per expert moved is half the time saved.
    """
    level, num_slow, max_homes = busy_S.max(), is_slow_S.sum(), homes_EH.shape[1]
    light_S, light_load_S = np.full(len(busy_S), -1, np.int64), np.full(len(busy_S), np.inf)
    for expert in range(len(num_E)):
        for i in range(num_E[expert]):
            home = homes_EH[expert, i]
            load = share_EH[expert, i] * expert_time(work_EC, cost_SP, expert, home)
            if load < light_load_S[home] and num_E[expert] < max_homes:
                light_S[home], light_load_S[home] = expert, load
    for to in range(len(busy_S)):
        light = light_S[to]
        if is_slow_S[to] or slots_S[to] > 0 or light < 0:
            continue
        back, least = -1, np.inf
        for shard in range(len(busy_S)):
            left = busy_S[shard] - (0.0 if slots_S[shard] > 0 else out_load_S[shard])
            has_slot = slots_S[shard] > 0 or (out_S[shard] >= 0 and out_S[shard] != light)
            if has_slot and left < least and not is_home(homes_EH, num_E, light, shard):
                back, least = shard, left
        if back < 0:
            continue
        other = -1 if slots_S[back] > 0 else out_S[back]
        for expert in range(len(num_E)):
            if expert in (light, other) or num_E[expert] >= max_homes or is_home(homes_EH, num_E, expert, to):
                continue
            carried = 0.0
            for i in range(num_E[expert]):
                if is_slow_S[homes_EH[expert, i]]:
                    carried += share_EH[expert, i] * expert_time(work_EC, cost_SP, expert, homes_EH[expert, i])
            fall = min(carried / num_slow, (level - busy_S[to] + light_load_S[to]) / (num_slow + 1.0)) / 2
            if carried > 0:
                _keep_best(fall, (expert, to, light, back, other), steps_XK, worth_X)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _score_swaps(
    expert: int, position: int, level: float, num_slow: int, work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any,
    share_EH: Any, busy_S: Any, is_slow_S: Any, steps_XK: Any, worth_X: Any,
) -> None:  # fmt: skip
    """Estimate the swaps of an expert on a slow shard with a lighter expert on another shard.

    `position` is the position of the slow shard among the homes of `expert`. A swap moves two experts, so its estimate
    per expert moved is half the time saved.
    """
    slow = homes_EH[expert, position]
    share = share_EH[expert, position]
    carried = share * expert_time(work_EC, cost_SP, expert, slow)
    max_homes = homes_EH.shape[1]
    for other in range(len(num_E)):
        if other == expert or num_E[other] >= max_homes or num_E[expert] >= max_homes:
            continue
        for i in range(num_E[other]):
            to = homes_EH[other, i]
            if is_slow_S[to]:
                continue
            other_share = share_EH[other, i]
            falls = carried - other_share * expert_time(work_EC, cost_SP, other, slow)
            rises = share * expert_time(work_EC, cost_SP, expert, to) - other_share * expert_time(
                work_EC, cost_SP, other, to
            )
            fall = min(falls / num_slow, level - busy_S[to] - rises) / 2
            if fall <= worth_X[-1] or is_home(homes_EH, num_E, expert, to) or is_home(homes_EH, num_E, other, slow):
                continue
            _keep_best(fall, (expert, to, other, slow, expert), steps_XK, worth_X)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _spare_homes(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, is_cold_E: Any, shards: int
) -> Any:
    """Return, for each shard, the expert of the shard's spare home, and the time of the spare home's rows in µs.

    A home is spare if its expert has another home or is cold. If a shard has several spare homes, the spare home with
    the least time is returned; if a shard has no spare home, -1 and infinity are returned.
    """
    out_S, load_S = np.full(shards, -1, np.int64), np.full(shards, np.inf)
    for expert in range(len(num_E)):
        if num_E[expert] > 1 or (is_cold_E[expert] and num_E[expert] == 1):
            for i in range(num_E[expert]):
                home = homes_EH[expert, i]
                carried = share_EH[expert, i] * expert_time(work_EC, cost_SP, expert, home)
                if carried < load_S[home]:
                    out_S[home], load_S[home] = expert, carried
    return out_S, load_S


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _sharing_groups(work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any) -> Any:
    """Return the group number of each shard, and the size of each shard's group.

    Two shards are in one group if they share the rows of an expert, directly or through other shards. Water-filling
    lets all shards of a group finish together.
    """
    group_S = np.arange(len(busy_S))
    for expert in range(len(num_E)):
        first = -1
        for i in range(num_E[expert] if num_E[expert] > 1 else 0):
            if share_EH[expert, i] > TOLERANCE:
                if first >= 0:
                    merge_groups(group_S, first, homes_EH[expert, i])
                else:
                    first = homes_EH[expert, i]
    return group_S, np.bincount(group_S, minlength=len(group_S))[group_S]


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _keep_best(worth: float, step: Any, steps_XK: Any, worth_X: Any) -> None:
    """Insert a step into the sorted list of the best candidates if its estimate `worth` is high enough."""
    last = len(worth_X) - 1
    if worth <= worth_X[last]:
        return
    while last > 0 and worth_X[last - 1] < worth:
        worth_X[last] = worth_X[last - 1]
        steps_XK[last] = steps_XK[last - 1]
        last -= 1
    worth_X[last] = worth
    for i in range(5):
        steps_XK[last, i] = step[i]
