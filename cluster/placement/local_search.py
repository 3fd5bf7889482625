"""The steps that make a layer's slowest shard faster: copies of experts, in place of others or not, moves and swaps.

Compiled, because a decision looks at tens of thousands of them: the promise of every step is estimated, and the most
promising are tried in full. Legend as in `cluster.placement.balance`; K = 5 numbers of a step, X steps.

A step is (expert, to, out, back, other): `expert` gets a home at shard `to`. Where `out` is an expert, it loses its
home there; where `back` is a shard, `out` gets one there, and `other` (if not -1) loses it. In a swap `other` is
`expert`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.placement.balance import SWEEPS, TOLERANCE, fall_back, fill, ideal_level, is_home, join, rate, settle

TRIAL_SWEEPS = 12  # of a fill that only compares steps
FEW_TRIALS, MANY_TRIALS = 8, 20  # of the most promising steps are tried in full: many where none of a few helps
EVENNESS = (
    1e-3  # what a µs of the root mean square counts beside one of the maximum: of several slowest, one goes first
)
PATIENCE = 8  # steps in a row that only relieve one of several slowest shards
GOOD_TRIAL = 0.7  # the part of the next step's promise at which no further one is tried


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _add(expert: int, shard: int, homes_EH: Any, num_E: Any, share_EH: Any, slots_S: Any) -> None:
    homes_EH[expert, num_E[expert]] = shard
    share_EH[expert, num_E[expert]] = 0.0
    num_E[expert] += 1
    slots_S[shard] -= 1


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _drop(
    expert: int, shard: int, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any,
    slots_S: Any,
) -> None:  # fmt: skip
    """Takes a home away and gives its rows to the others."""
    num, position = num_E[expert], 0
    while homes_EH[expert, position] != shard:
        position += 1
    dropped = share_EH[expert, position]
    busy_S[shard] -= dropped * rate(cost_EC, pace_SP, expert, shard)
    for i in range(position, num - 1):
        homes_EH[expert, i], share_EH[expert, i] = homes_EH[expert, i + 1], share_EH[expert, i + 1]
    homes_EH[expert, num - 1], share_EH[expert, num - 1] = -1, 0.0
    num_E[expert] = num - 1
    slots_S[shard] += 1
    for i in range(num - 1):
        share_EH[expert, i] += dropped / (num - 1)
        busy_S[homes_EH[expert, i]] += dropped / (num - 1) * rate(cost_EC, pace_SP, expert, homes_EH[expert, i])


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _apply(
    step: Any, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any
) -> None:
    expert, to, out, back, other = step
    _add(expert, to, homes_EH, num_E, share_EH, slots_S)
    if back >= 0:
        _add(out, back, homes_EH, num_E, share_EH, slots_S)
        if other >= 0:
            _drop(other, back, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
    if out >= 0:
        _drop(out, to, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _undo(
    step: Any, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any
) -> None:
    expert, to, out, back, other = step
    if out >= 0:
        _add(out, to, homes_EH, num_E, share_EH, slots_S)
    if back >= 0:
        if other >= 0:
            _add(other, back, homes_EH, num_E, share_EH, slots_S)
        _drop(out, back, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
    _drop(expert, to, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _keep_best(worth: float, step: Any, steps_XK: Any, worth_X: Any) -> None:
    """Puts a step among the best so far, in order of their worth."""
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


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _spare_homes(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, is_cold_E: Any, shards: int
) -> Any:
    """For each shard the expert whose home there is missed least (-1: none may go), and the µs it carries there."""
    out_S, load_S = np.full(shards, -1, np.int64), np.full(shards, np.inf)
    for expert in range(len(num_E)):
        if num_E[expert] > 1 or (is_cold_E[expert] and num_E[expert] == 1):
            for i in range(num_E[expert]):
                home = homes_EH[expert, i]
                carried = share_EH[expert, i] * rate(cost_EC, pace_SP, expert, home)
                if carried < load_S[home]:
                    out_S[home], load_S[home] = expert, carried
    return out_S, load_S


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _groups(cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any) -> Any:
    """Which shards share rows of some expert, directly or through others, and so rise and fall together; how many."""
    group_S = np.arange(len(busy_S))
    for expert in range(len(num_E)):
        first = -1
        for i in range(num_E[expert] if num_E[expert] > 1 else 0):
            if share_EH[expert, i] > TOLERANCE:
                if first >= 0:
                    join(group_S, first, homes_EH[expert, i])
                else:
                    first = homes_EH[expert, i]
    return group_S, np.bincount(group_S, minlength=len(group_S))[group_S]


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _promising(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any, is_cold_E: Any,
    can_swap: bool, num_trials: int,
) -> Any:  # fmt: skip
    """The steps that should relieve the slowest shards most per expert moved, best first, with that estimate."""
    level = busy_S.max()
    is_slow_S = busy_S >= level * (1 - 10 * TOLERANCE)
    num_slow = is_slow_S.sum()
    _, size_S = _groups(cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S)
    out_S, out_load_S = _spare_homes(cost_EC, pace_SP, homes_EH, num_E, share_EH, is_cold_E, len(busy_S))
    steps_XK, worth_X = np.full((num_trials, 5), -1, np.int64), np.zeros(num_trials)
    max_homes = homes_EH.shape[1]
    for expert in range(len(num_E)):
        carried, slow_home = 0.0, -1
        for i in range(num_E[expert]):
            home = homes_EH[expert, i]
            if is_slow_S[home]:
                slow_home = home
                carried += share_EH[expert, i] * rate(cost_EC, pace_SP, expert, home)
        if carried <= 0 or num_E[expert] >= max_homes:
            continue
        for to in range(len(busy_S)):
            if is_slow_S[to] or is_home(homes_EH, num_E, expert, to):
                continue
            ratio = rate(cost_EC, pace_SP, expert, to) / rate(cost_EC, pace_SP, expert, slow_home)
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
        _promise_detours(
            cost_EC,
            pace_SP,
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
                    _promise_swaps(
                        expert, i, level, num_slow, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, is_slow_S,
                        steps_XK, worth_X,
                    )  # fmt: skip
    return steps_XK, worth_X


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _promise_detours(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any, is_slow_S: Any,
    out_S: Any, out_load_S: Any, steps_XK: Any, worth_X: Any,
) -> None:  # fmt: skip
    """Copies in place of a shard's lightest expert, which moves on to a free slot or where a home is missed least."""
    level, num_slow, max_homes = busy_S.max(), is_slow_S.sum(), homes_EH.shape[1]
    light_S, light_load_S = np.full(len(busy_S), -1, np.int64), np.full(len(busy_S), np.inf)
    for expert in range(len(num_E)):
        for i in range(num_E[expert]):
            home = homes_EH[expert, i]
            load = share_EH[expert, i] * rate(cost_EC, pace_SP, expert, home)
            if load < light_load_S[home] and num_E[expert] < max_homes:
                light_S[home], light_load_S[home] = expert, load
    for to in range(len(busy_S)):
        light = light_S[to]
        if is_slow_S[to] or slots_S[to] > 0 or light < 0:
            continue
        back, least = -1, np.inf
        for shard in range(len(busy_S)):
            left = busy_S[shard] - (0.0 if slots_S[shard] > 0 else out_load_S[shard])
            has_room = slots_S[shard] > 0 or (out_S[shard] >= 0 and out_S[shard] != light)
            if has_room and left < least and not is_home(homes_EH, num_E, light, shard):
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
                    carried += share_EH[expert, i] * rate(cost_EC, pace_SP, expert, homes_EH[expert, i])
            fall = min(carried / num_slow, (level - busy_S[to] + light_load_S[to]) / (num_slow + 1.0)) / 2
            if carried > 0:
                _keep_best(fall, (expert, to, light, back, other), steps_XK, worth_X)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _promise_swaps(
    expert: int, position: int, level: float, num_slow: int, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any,
    share_EH: Any, busy_S: Any, is_slow_S: Any, steps_XK: Any, worth_X: Any,
) -> None:  # fmt: skip
    """The swaps of one expert on a slow shard with a lighter one on another; both have to move, so they count half."""
    slow = homes_EH[expert, position]
    share = share_EH[expert, position]
    carried = share * rate(cost_EC, pace_SP, expert, slow)
    max_homes = homes_EH.shape[1]
    for other in range(len(num_E)):
        if other == expert or num_E[other] >= max_homes or num_E[expert] >= max_homes:
            continue
        for i in range(num_E[other]):
            to = homes_EH[other, i]
            if is_slow_S[to]:
                continue
            other_share = share_EH[other, i]
            falls = carried - other_share * rate(cost_EC, pace_SP, other, slow)
            rises = share * rate(cost_EC, pace_SP, expert, to) - other_share * rate(cost_EC, pace_SP, other, to)
            fall = min(falls / num_slow, level - busy_S[to] - rises) / 2
            if fall <= worth_X[-1] or is_home(homes_EH, num_E, expert, to) or is_home(homes_EH, num_E, other, slow):
                continue
            _keep_best(fall, (expert, to, other, slow, expert), steps_XK, worth_X)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def improve(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, fallback_E: Any, is_cold_E: Any,
    wake_us: float, enough: float, aim: float, price: float, max_steps: int,
) -> Any:  # fmt: skip
    """Takes the step that shortens the slowest shard's time most per expert moved, again and again, in place.

    Looks further than the most promising steps only above the level `enough` (µs). Ends at `aim` or where no step
    helps, then goes back to the point at which time saved less `price` (µs) per expert moved was highest. Returns the
    level before and after, in µs.
    """
    share_EH, busy_S = np.empty(homes_EH.shape), np.empty(len(pace_SP))
    settle(cost_EC, pace_SP, homes_EH, num_E, fallback_E, wake_us, share_EH, busy_S)
    first = level = busy_S.max()
    taken_XK = np.empty((max_steps, 5), np.int64)
    best_worth, num_best, num_taken, num_moved, best_level = 0.0, 0, 0, 0, first
    num_idle = 0
    while num_taken < max_steps and level > aim:
        chosen = _best_step(
            cost_EC,
            pace_SP,
            homes_EH,
            num_E,
            share_EH,
            busy_S,
            slots_S,
            is_cold_E,
            fallback_E,
            wake_us,
            level > enough,
        )
        if chosen[0] < 0:
            break
        for i in range(5):
            taken_XK[num_taken, i] = chosen[i]
        num_taken += 1
        num_moved += 2 if chosen[3] >= 0 else 1
        _apply(chosen, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
        if chosen[2] >= 0 and num_E[chosen[2]] == 0:
            fallback_E[chosen[2]] = chosen[1]
            fall_back(chosen[2], chosen[1], cost_EC, pace_SP, busy_S, wake_us)
        before = level
        level = fill(cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, SWEEPS, TOLERANCE)
        if first - level - price * num_moved > best_worth:
            best_worth, num_best, best_level = first - level - price * num_moved, num_taken, level
        num_idle = 0 if level < (1 - TOLERANCE) * before else num_idle + 1
        if num_idle == PATIENCE:
            break
    for i in range(num_taken - 1, num_best - 1, -1):
        step = (taken_XK[i, 0], taken_XK[i, 1], taken_XK[i, 2], taken_XK[i, 3], taken_XK[i, 4])
        _undo(step, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
    return first, best_level


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _best_step(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any, is_cold_E: Any,
    fallback_E: Any, wake_us: float, is_thorough: bool,
) -> Any:  # fmt: skip
    """Tries the most promising steps and returns the one that shortens the time most per expert moved.

    Its first number is -1 where none shortens it. Swaps are looked at only where nothing cheaper helps and
    `is_thorough`.
    """
    level, evenness = busy_S.max(), np.sqrt((busy_S**2).mean())
    chosen, best = (-1, -1, -1, -1, -1), 1e-6 * level
    for can_swap in (False, True):
        num_trials = MANY_TRIALS if can_swap else FEW_TRIALS
        steps_XK, worth_X = _promising(
            cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S, is_cold_E, can_swap, num_trials
        )
        for i in range(num_trials):
            if worth_X[i] <= 0:
                break
            step = (steps_XK[i, 0], steps_XK[i, 1], steps_XK[i, 2], steps_XK[i, 3], steps_XK[i, 4])
            moved = 2 if step[3] >= 0 else 1
            if worth_X[i] * GOOD_TRIAL < best:
                break
            trial_level, trial_evenness = _try(
                step, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S, fallback_E, wake_us
            )
            gain = level - trial_level + EVENNESS * (evenness - trial_evenness)
            if trial_level <= level and gain / moved > best:
                chosen, best = step, gain / moved
        if chosen[0] >= 0 or not is_thorough:
            break
    return chosen


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _try(
    step: Any, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any,
    fallback_E: Any, wake_us: float,
) -> tuple[float, float]:  # fmt: skip
    """The time of the slowest shard, and the root mean square, after a step, which is not taken."""
    expert, _, out, _, other = step
    trial_share_EH, trial_busy_S = share_EH.copy(), busy_S.copy()
    homes_H, num = homes_EH[expert].copy(), num_E[expert]
    out_homes_H, out_num = homes_EH[out].copy(), num_E[out]
    other_homes_H, other_num = homes_EH[other].copy(), num_E[other]
    slots_before_S = slots_S.copy()
    _apply(step, cost_EC, pace_SP, homes_EH, num_E, trial_share_EH, trial_busy_S, slots_S)
    if out >= 0 and num_E[out] == 0:
        fall_back(out, step[1], cost_EC, pace_SP, trial_busy_S, wake_us)
    level = fill(cost_EC, pace_SP, homes_EH, num_E, trial_share_EH, trial_busy_S, TRIAL_SWEEPS, 10 * TOLERANCE)
    if other >= 0:
        homes_EH[other], num_E[other] = other_homes_H, other_num
    homes_EH[expert], num_E[expert] = homes_H, num
    if out >= 0:
        homes_EH[out], num_E[out] = out_homes_H, out_num
    slots_S[:] = slots_before_S
    return float(level), float(np.sqrt((trial_busy_S**2).mean()))


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def occupy(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, fallback_E: Any, wake_us: float
) -> None:
    """Fills `slots_S` with homes of experts that burden slower shards, in place, those first that relieve most."""
    share_EH, busy_S = np.empty(homes_EH.shape), np.empty(len(pace_SP))
    settle(cost_EC, pace_SP, homes_EH, num_E, fallback_E, wake_us, share_EH, busy_S)
    enough = 0.02 * ideal_level(cost_EC, pace_SP)
    while True:
        most, chosen, to = enough, -1, -1
        for shard in range(len(slots_S)):
            if slots_S[shard] <= 0:
                continue
            for expert in range(len(num_E)):
                if num_E[expert] >= homes_EH.shape[1] or is_home(homes_EH, num_E, expert, shard):
                    continue
                carried, slowest = 0.0, busy_S[shard]
                for i in range(num_E[expert]):
                    carried += share_EH[expert, i] * rate(cost_EC, pace_SP, expert, homes_EH[expert, i])
                    slowest = max(slowest, busy_S[homes_EH[expert, i]])
                relief = min(carried, (slowest - busy_S[shard]) / 2)
                if relief > most:
                    most, chosen, to = relief, expert, shard
        if chosen < 0:
            return
        _add(chosen, to, homes_EH, num_E, share_EH, slots_S)
        fill(cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, TRIAL_SWEEPS, 10 * TOLERANCE)
