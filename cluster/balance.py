"""How long a layer's shards take when the client shares out rows best, and the steps that make the slowest one faster.

Compiled, because one decision looks at tens of thousands of steps. An expert's cost on a shard is linear in the share
of its rows that the shard gets. With equal paces the levels that `fill` finds are those of the linear programme.

Legend: E experts of one layer, S shards, H most homes of an expert (-1: no more), C = 2 parts of a cost: MiB of weights
that a step reads, MiB · rows that it computes; P = 3 parts of a pace: µs per call, per MiB read, per MiB · row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

SWEEPS = 200  # of a final fill; they end early once nothing changes
TRIAL_SWEEPS = 12  # of a fill that only compares steps
TOLERANCE = 1e-4  # of the highest level
FEW_TRIALS, MANY_TRIALS = 8, 40  # of the most promising steps are tried in full: many where none of a few helps


@njit(cache=True)  # type: ignore[untyped-decorator]
def rate(cost_EC: Any, pace_SP: Any, expert: int, shard: int) -> float:
    """The µs that all of an expert's rows take on a shard."""
    return pace_SP[shard, 1] * cost_EC[expert, 0] + pace_SP[shard, 2] * cost_EC[expert, 1]  # type: ignore[no-any-return]


@njit(cache=True)  # type: ignore[untyped-decorator]
def _level(expert: int, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_homes: int, share_EH: Any, busy_S: Any) -> float:
    """Shares one expert's rows out so that its homes end together; returns the largest change in µs."""
    level = np.inf
    for _ in range(num_homes):  # each turn but the last leaves out a home that is above the level as it is
        before, above, slope = level, 1.0, 0.0
        for i in range(num_homes):
            home = homes_EH[expert, i]
            one = rate(cost_EC, pace_SP, expert, home)
            base = busy_S[home] - share_EH[expert, i] * one
            if base < before:
                above += base / one
                slope += 1.0 / one
        level = above / slope
        if level >= before:
            break
    largest = 0.0
    for i in range(num_homes):
        home = homes_EH[expert, i]
        one = rate(cost_EC, pace_SP, expert, home)
        base = busy_S[home] - share_EH[expert, i] * one
        share = max(0.0, level - base) / one
        largest = max(largest, abs(share - share_EH[expert, i]) * one)
        share_EH[expert, i] = share
        busy_S[home] = base + share * one
    return largest


@njit(cache=True)  # type: ignore[untyped-decorator]
def fill(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, max_sweeps: int, tolerance: float
) -> float:
    """Levels the homes of one expert after another until nothing changes; returns the time of the slowest shard."""
    shared = np.flatnonzero((num_E > 1) & (cost_EC.sum(axis=1) > 0))
    for _ in range(max_sweeps):
        largest = 0.0
        for expert in shared:
            largest = max(largest, _level(expert, cost_EC, pace_SP, homes_EH, num_E[expert], share_EH, busy_S))
        if largest <= tolerance * busy_S.max():
            break
    return float(busy_S.max())


@njit(cache=True)  # type: ignore[untyped-decorator]
def settle(cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, fallback_E: Any, wake_us: float) -> Any:
    """Shares [E, H] and µs per shard [S] of a placement whose rows are shared out best.

    An expert without a home is computed at its `fallback_E` (-1: by nobody), which first brings its weights to the
    device at `wake_us` per MiB.
    """
    busy_S = pace_SP[:, 0].copy()
    share_EH = np.zeros(homes_EH.shape)
    for expert in range(len(num_E)):
        num = num_E[expert]
        for i in range(num):
            share_EH[expert, i] = 1.0 / num
            busy_S[homes_EH[expert, i]] += rate(cost_EC, pace_SP, expert, homes_EH[expert, i]) / num
        if num == 0 and fallback_E[expert] >= 0:
            _fall_back(expert, fallback_E[expert], cost_EC, pace_SP, busy_S, wake_us)
    fill(cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, SWEEPS, TOLERANCE)
    return share_EH, busy_S


@njit(cache=True)  # type: ignore[untyped-decorator]
def _fall_back(expert: int, shard: int, cost_EC: Any, pace_SP: Any, busy_S: Any, wake_us: float) -> None:
    busy_S[shard] += rate(cost_EC, pace_SP, expert, shard) + wake_us * cost_EC[expert, 0]


@njit(cache=True)  # type: ignore[untyped-decorator]
def ideal_level(cost_EC: Any, pace_SP: Any) -> float:
    """The lower bound: what every shard would take if every expert could be shared out over all of them."""
    above, slope = 1.0, 0.0
    weights, rows = cost_EC[:, 0].sum(), cost_EC[:, 1].sum()
    for shard in range(len(pace_SP)):
        one = max(pace_SP[shard, 1] * weights + pace_SP[shard, 2] * rows, 1e-12)
        above += pace_SP[shard, 0] / one
        slope += 1.0 / one
    return above / slope


@njit(cache=True)  # type: ignore[untyped-decorator]
def is_home(homes_EH: Any, num_E: Any, expert: int, shard: int) -> bool:
    for i in range(num_E[expert]):  # noqa: SIM110 (compiled, and any() of a generator is not)
        if homes_EH[expert, i] == shard:
            return True
    return False


@njit(cache=True)  # type: ignore[untyped-decorator]
def _add(expert: int, shard: int, homes_EH: Any, num_E: Any, share_EH: Any, slots_S: Any) -> None:
    homes_EH[expert, num_E[expert]] = shard
    share_EH[expert, num_E[expert]] = 0.0
    num_E[expert] += 1
    slots_S[shard] -= 1


@njit(cache=True)  # type: ignore[untyped-decorator]
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


# A step is (expert, to, out, back): `expert` gets a home at shard `to`. Where `out` is an expert, it loses its home
# there; where `back` is a shard, `out` gets one there and `expert` loses it.


@njit(cache=True)  # type: ignore[untyped-decorator]
def _apply(
    step: Any, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any
) -> None:
    expert, to, out, back = step
    _add(expert, to, homes_EH, num_E, share_EH, slots_S)
    if back >= 0:
        _add(out, back, homes_EH, num_E, share_EH, slots_S)
        _drop(expert, back, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
    if out >= 0:
        _drop(out, to, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _undo(
    step: Any, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any
) -> None:
    expert, to, out, back = step
    if out >= 0:
        _add(out, to, homes_EH, num_E, share_EH, slots_S)
    if back >= 0:
        _add(expert, back, homes_EH, num_E, share_EH, slots_S)
        _drop(out, back, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
    _drop(expert, to, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)


@njit(cache=True)  # type: ignore[untyped-decorator]
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
    for i in range(4):
        steps_XK[last, i] = step[i]


@njit(cache=True)  # type: ignore[untyped-decorator]
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


@njit(cache=True)  # type: ignore[untyped-decorator]
def _groups(cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any) -> Any:
    """Which shards share rows of some expert, directly or through others, and so rise and fall together; how many."""
    group_S = np.arange(len(busy_S))
    for expert in range(len(num_E)):
        first = -1
        for i in range(num_E[expert] if num_E[expert] > 1 else 0):
            if share_EH[expert, i] > TOLERANCE:
                if first >= 0:
                    _join(group_S, first, homes_EH[expert, i])
                else:
                    first = homes_EH[expert, i]
    return group_S, np.bincount(group_S, minlength=len(group_S))[group_S]


@njit(cache=True)  # type: ignore[untyped-decorator]
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
    steps_XK, worth_X = np.full((num_trials, 4), -1, np.int64), np.zeros(num_trials)
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
                _keep_best(fall, (expert, to, out, -1), steps_XK, worth_X)
    if can_swap:
        for expert in range(len(num_E)):
            for i in range(num_E[expert]):
                if is_slow_S[homes_EH[expert, i]]:
                    _promise_swaps(
                        expert, i, level, num_slow, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, is_slow_S,
                        steps_XK, worth_X,
                    )  # fmt: skip
    return steps_XK, worth_X


@njit(cache=True)  # type: ignore[untyped-decorator]
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
            _keep_best(fall, (expert, to, other, slow), steps_XK, worth_X)


@njit(cache=True)  # type: ignore[untyped-decorator]
def improve(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, fallback_E: Any, is_cold_E: Any,
    wake_us: float, aim: float, price: float, max_steps: int,
) -> Any:  # fmt: skip
    """Takes the step that shortens the slowest shard's time most per expert moved, again and again, in place.

    Ends at the level `aim` (µs) or where no step helps, then goes back to the point at which time saved less `price`
    (µs) per expert moved was highest. Returns the steps taken [X, 4], the level before and after, in µs.
    """
    share_EH, busy_S = settle(cost_EC, pace_SP, homes_EH, num_E, fallback_E, wake_us)
    first = level = busy_S.max()
    taken_XK = np.empty((max_steps, 4), np.int64)
    best_worth, num_best, num_taken, num_moved, best_level = 0.0, 0, 0, 0, first
    while num_taken < max_steps and level > aim:
        chosen = _best_step(
            cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S, is_cold_E, fallback_E, wake_us
        )
        if chosen[0] < 0:
            break
        taken_XK[num_taken, 0], taken_XK[num_taken, 1], taken_XK[num_taken, 2], taken_XK[num_taken, 3] = chosen
        num_taken += 1
        num_moved += 2 if chosen[3] >= 0 else 1
        _apply(chosen, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
        if chosen[2] >= 0 and num_E[chosen[2]] == 0:
            fallback_E[chosen[2]] = chosen[1]
            _fall_back(chosen[2], chosen[1], cost_EC, pace_SP, busy_S, wake_us)
        level = fill(cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, SWEEPS, TOLERANCE)
        if first - level - price * num_moved > best_worth:
            best_worth, num_best, best_level = first - level - price * num_moved, num_taken, level
    for i in range(num_taken - 1, num_best - 1, -1):
        step = (taken_XK[i, 0], taken_XK[i, 1], taken_XK[i, 2], taken_XK[i, 3])
        _undo(step, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
    return taken_XK[:num_best], first, best_level


@njit(cache=True)  # type: ignore[untyped-decorator]
def _best_step(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any, is_cold_E: Any,
    fallback_E: Any, wake_us: float,
) -> Any:  # fmt: skip
    """Tries the most promising steps and returns the one that shortens the time most per expert moved.

    Its first number is -1 where none shortens it. Swaps are looked at only where nothing cheaper helps.
    """
    level = busy_S.max()
    chosen, best = (-1, -1, -1, -1), 1e-6 * level
    for can_swap in (False, True):
        num_trials = MANY_TRIALS if can_swap else FEW_TRIALS
        steps_XK, worth_X = _promising(
            cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S, is_cold_E, can_swap, num_trials
        )
        for i in range(num_trials):
            if worth_X[i] <= 0:
                break
            step = (steps_XK[i, 0], steps_XK[i, 1], steps_XK[i, 2], steps_XK[i, 3])
            moved = 2 if step[3] >= 0 else 1
            if worth_X[i] * 4 < best:
                break
            trial_level = _try(step, cost_EC, pace_SP, homes_EH, num_E, share_EH, busy_S, slots_S, fallback_E, wake_us)
            if (level - trial_level) / moved > best:
                chosen, best = step, (level - trial_level) / moved
        if chosen[0] >= 0:
            break
    return chosen


@njit(cache=True)  # type: ignore[untyped-decorator]
def _try(
    step: Any, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any,
    fallback_E: Any, wake_us: float,
) -> float:  # fmt: skip
    """The time of the slowest shard after a step, which is not taken."""
    expert, _, out, _ = step
    trial_share_EH, trial_busy_S = share_EH.copy(), busy_S.copy()
    homes_H, num = homes_EH[expert].copy(), num_E[expert]
    out_homes_H, out_num = homes_EH[out].copy(), num_E[out]
    slots_before_S = slots_S.copy()
    _apply(step, cost_EC, pace_SP, homes_EH, num_E, trial_share_EH, trial_busy_S, slots_S)
    if out >= 0 and num_E[out] == 0:
        _fall_back(out, step[1], cost_EC, pace_SP, trial_busy_S, wake_us)
    level = fill(cost_EC, pace_SP, homes_EH, num_E, trial_share_EH, trial_busy_S, TRIAL_SWEEPS, 10 * TOLERANCE)
    homes_EH[expert], num_E[expert] = homes_H, num
    if out >= 0:
        homes_EH[out], num_E[out] = out_homes_H, out_num
    slots_S[:] = slots_before_S
    return float(level)


@njit(cache=True)  # type: ignore[untyped-decorator]
def deal(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, node_S: Any, num_wanted_E: Any, busy_S: Any
) -> int:
    """Gives experts homes until each has `num_wanted_E`, the costliest copies first; returns how many found no room.

    Of the shards that are about as free as the freest, a copy takes one that links two groups of shards which share no
    expert yet: rows can then flow from any shard to any other when the load drifts, without moving an expert.
    """
    num_experts, num_shards = len(num_E), len(slots_S)
    order = np.argsort(-cost_EC.sum(axis=1) / np.maximum(num_wanted_E, 1), kind="mergesort")
    group_S = np.arange(num_shards)
    for expert in range(num_experts):
        for i in range(1, num_E[expert]):
            _join(group_S, homes_EH[expert, 0], homes_EH[expert, i])
    slack = 0.25 * ideal_level(cost_EC, pace_SP)
    num_left = 0
    for expert in order:
        for _ in range(num_wanted_E[expert] - num_E[expert]):
            share = 1.0 / num_wanted_E[expert]
            to = _freest(expert, share, slack, cost_EC, pace_SP, homes_EH, num_E, slots_S, node_S, group_S, busy_S)
            if to < 0:
                num_left += 1
                continue
            if num_E[expert] > 0:
                _join(group_S, homes_EH[expert, 0], to)
            homes_EH[expert, num_E[expert]] = to
            num_E[expert] += 1
            slots_S[to] -= 1
            busy_S[to] += share * rate(cost_EC, pace_SP, expert, to)
    return num_left


@njit(cache=True)  # type: ignore[untyped-decorator]
def _freest(
    expert: int, share: float, slack: float, cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any,
    node_S: Any, group_S: Any, busy_S: Any,
) -> int:  # fmt: skip
    """The shard that would be done first with one more copy, on a node of its own if that can be; -1: no room."""
    first = homes_EH[expert, 0]
    least, to, is_apart = np.inf, -1, False
    for shard in range(len(slots_S)):
        if slots_S[shard] <= 0 or is_home(homes_EH, num_E, expert, shard):
            continue
        apart = num_E[expert] != 1 or node_S[shard] != node_S[first]
        done = busy_S[shard] + share * rate(cost_EC, pace_SP, expert, shard)
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
        done = busy_S[shard] + share * rate(cost_EC, pace_SP, expert, shard)
        if done <= least + slack and done < linked_done:
            linked, linked_done = shard, done
    return linked


@njit(cache=True)  # type: ignore[untyped-decorator]
def _join(group_S: Any, one: int, other: int) -> None:
    old, new = group_S[other], group_S[one]
    for shard in range(len(group_S)):
        if group_S[shard] == old:
            group_S[shard] = new


@njit(cache=True)  # type: ignore[untyped-decorator]
def wanted_homes(cost_EC: Any, num_E: Any, num_slots: int, num_shards: int, level: float, max_homes: int) -> Any:
    """How many homes each expert should have on a device: the costliest per home get more until half a shard's time
    bears each, then every expert gets a second one, the costliest first, as far as slots go."""
    wanted_E = np.maximum(num_E, 1)
    cost_E = cost_EC.sum(axis=1)
    most = min(num_shards, max_homes)
    left = num_slots - wanted_E.sum()
    while left > 0:
        expert = np.argmax(np.where(wanted_E < most, cost_E / wanted_E, -1.0))
        if wanted_E[expert] >= most or cost_E[expert] / wanted_E[expert] <= 0.5 * level:
            break
        wanted_E[expert] += 1
        left -= 1
    if most > 1:
        for expert in np.argsort(-cost_E, kind="mergesort"):
            if left > 0 and wanted_E[expert] == 1:
                wanted_E[expert] = 2
                left -= 1
    return wanted_E


@njit(cache=True)  # type: ignore[untyped-decorator]
def occupy(
    cost_EC: Any, pace_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, fallback_E: Any, wake_us: float
) -> None:
    """Fills `slots_S` with homes of experts that burden slower shards, in place, those first that relieve most."""
    share_EH, busy_S = settle(cost_EC, pace_SP, homes_EH, num_E, fallback_E, wake_us)
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
