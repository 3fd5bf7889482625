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

from cluster.placement.balance import (
    SWEEPS,
    TOLERANCE,
    add_fallback_time,
    expert_time,
    ideal_level,
    is_home,
    split_rows,
    water_fill,
)
from cluster.placement.search_candidates import promising_steps
from cluster.placement.search_step import TRIAL_SWEEPS, add_home, apply_step, try_step, undo_step

FEW_TRIALS, MANY_TRIALS = 8, 20  # of the most promising steps are tried in full: many where none of a few helps
EVENNESS = (
    1e-3  # what a µs of the root mean square counts beside one of the maximum: of several slowest, one goes first
)
PATIENCE = 8  # steps in a row that only relieve one of several slowest shards
GOOD_TRIAL = 0.7  # the part of the next step's promise at which no further one is tried


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def improve(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, fallback_E: Any, is_cold_E: Any,
    wake_us: float, enough: float, aim: float, price: float, max_steps: int,
) -> Any:  # fmt: skip
    """Takes the step that shortens the slowest shard's time most per expert moved, again and again, in place.

    Looks further than the most promising steps only above the level `enough` (µs). Ends at `aim` or where no step
    helps, then goes back to the point at which time saved less `price` (µs) per expert moved was highest. Returns the
    level before and after, in µs.
    """
    share_EH, busy_S = np.empty(homes_EH.shape), np.empty(len(cost_SP))
    split_rows(work_EC, cost_SP, homes_EH, num_E, fallback_E, wake_us, share_EH, busy_S)
    first = level = busy_S.max()
    taken_XK = np.empty((max_steps, 5), np.int64)
    best_worth, num_best, num_taken, num_moved, best_level = 0.0, 0, 0, 0, first
    num_idle = 0
    while num_taken < max_steps and level > aim:
        chosen = _best_step(
            work_EC,
            cost_SP,
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
        apply_step(chosen, work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
        if chosen[2] >= 0 and num_E[chosen[2]] == 0:
            fallback_E[chosen[2]] = chosen[1]
            add_fallback_time(chosen[2], chosen[1], work_EC, cost_SP, busy_S, wake_us)
        before = level
        level = water_fill(work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, SWEEPS, TOLERANCE)
        if first - level - price * num_moved > best_worth:
            best_worth, num_best, best_level = first - level - price * num_moved, num_taken, level
        num_idle = 0 if level < (1 - TOLERANCE) * before else num_idle + 1
        if num_idle == PATIENCE:
            break
    for i in range(num_taken - 1, num_best - 1, -1):
        step = (taken_XK[i, 0], taken_XK[i, 1], taken_XK[i, 2], taken_XK[i, 3], taken_XK[i, 4])
        undo_step(step, work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
    return first, best_level


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _best_step(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any, is_cold_E: Any,
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
        steps_XK, worth_X = promising_steps(
            work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, slots_S, is_cold_E, can_swap, num_trials
        )
        for i in range(num_trials):
            if worth_X[i] <= 0:
                break
            step = (steps_XK[i, 0], steps_XK[i, 1], steps_XK[i, 2], steps_XK[i, 3], steps_XK[i, 4])
            moved = 2 if step[3] >= 0 else 1
            if worth_X[i] * GOOD_TRIAL < best:
                break
            trial_level, trial_evenness = try_step(
                step, work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, slots_S, fallback_E, wake_us
            )
            gain = level - trial_level + EVENNESS * (evenness - trial_evenness)
            if trial_level <= level and gain / moved > best:
                chosen, best = step, gain / moved
        if chosen[0] >= 0 or not is_thorough:
            break
    return chosen


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def fill_slots(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, fallback_E: Any, wake_us: float
) -> None:
    """Fills `slots_S` with homes of experts that burden slower shards, in place, those first that relieve most."""
    share_EH, busy_S = np.empty(homes_EH.shape), np.empty(len(cost_SP))
    split_rows(work_EC, cost_SP, homes_EH, num_E, fallback_E, wake_us, share_EH, busy_S)
    enough = 0.02 * ideal_level(work_EC, cost_SP)
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
                    carried += share_EH[expert, i] * expert_time(work_EC, cost_SP, expert, homes_EH[expert, i])
                    slowest = max(slowest, busy_S[homes_EH[expert, i]])
                relief = min(carried, (slowest - busy_S[shard]) / 2)
                if relief > most:
                    most, chosen, to = relief, expert, shard
        if chosen < 0:
            return
        add_home(chosen, to, homes_EH, num_E, share_EH, slots_S)
        water_fill(work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, TRIAL_SWEEPS, 10 * TOLERANCE)
