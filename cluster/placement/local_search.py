"""The local search makes the slowest shard of a layer faster, one step at a time.

A step (`cluster.placement.search_step`) copies an expert to another shard, or swaps two experts. If the other shard has
no free slot, the copy replaces an expert there; in a detour, the replaced expert moves on to a third shard. The search
estimates the gain of every possible step, and computes the exact gain only for the steps with the highest estimates.
The functions are compiled, because one decision looks at tens of thousands of steps.

Legend: as in `cluster.placement.balance`; also X: steps, and K = 5: the numbers that describe one step.
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

# The search first computes the gain of FEW_TRIALS steps that each move one expert. If none of these steps helps, the
# search computes the gain of MANY_TRIALS steps of all kinds.
FEW_TRIALS, MANY_TRIALS = 8, 20
# The weight of the root mean square of the shards' times, relative to their maximum. If several shards are equally
# slow, a step that relieves only one of them does not lower the maximum, but it lowers the root mean square.
EVENNESS = 1e-3
PATIENCE = 8  # The search ends after this many steps in a row that hardly lower the slowest shard's time.
GOOD_TRIAL = 0.7  # Trials of steps end when the best gain so far exceeds this fraction of the next step's estimate.


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def improve(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, fallback_E: Any, is_cold_E: Any,
    promotion_us: float, thorough_above: float, target_level: float, price_per_move: float, max_steps: int,
) -> Any:  # fmt: skip
    """Take the best step again and again, in place; return the slowest shard's time before and after, in µs.

    The best step saves the most time of the slowest shard per expert moved.

    - Detours and swaps are considered only while the slowest shard's time is above `thorough_above` (µs).
    - The search ends when the slowest shard's time is at most `target_level` (µs), when no step helps, or after
      `max_steps` steps.
    - The net gain at a point of the search is the time saved so far, minus `price_per_move` (µs) for each expert moved.
      After the search, all steps after the point with the highest net gain are undone.
    - An expert that is marked in `is_cold_E` may lose its last home. The shard of the lost home then becomes the
      expert's entry in `fallback_E`.
    """
    share_EH, busy_S = np.empty(homes_EH.shape), np.empty(len(cost_SP))
    split_rows(work_EC, cost_SP, homes_EH, num_E, fallback_E, promotion_us, share_EH, busy_S)
    first = level = busy_S.max()
    taken_XK = np.empty((max_steps, 5), np.int64)
    best_worth, num_best, num_taken, num_moved, best_level = 0.0, 0, 0, 0, first
    num_idle = 0
    while num_taken < max_steps and level > target_level:
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
            promotion_us,
            level > thorough_above,
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
            add_fallback_time(chosen[2], chosen[1], work_EC, cost_SP, busy_S, promotion_us)
        before = level
        level = water_fill(work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, SWEEPS, TOLERANCE)
        if first - level - price_per_move * num_moved > best_worth:
            best_worth, num_best, best_level = first - level - price_per_move * num_moved, num_taken, level
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
    fallback_E: Any, promotion_us: float, is_thorough: bool,
) -> Any:  # fmt: skip
    """Try the steps with the highest estimates and return the step that saves the most time per expert moved.

    If no step saves time, the first number of the returned step is -1. Detours and swaps, which move two experts, are
    considered only if no other step helps and `is_thorough` is True.
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
                step, work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, slots_S, fallback_E, promotion_us
            )
            gain = level - trial_level + EVENNESS * (evenness - trial_evenness)
            if trial_level <= level and gain / moved > best:
                chosen, best = step, gain / moved
        if chosen[0] >= 0 or not is_thorough:
            break
    return chosen


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def fill_slots(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, slots_S: Any, fallback_E: Any, promotion_us: float
) -> None:
    """Add homes on shards with free `slots_S`, in place; begin with the homes that relieve the slower shards most.

    The function ends when no further home would relieve a slower shard by more than 2 % of the ideal level.
    """
    share_EH, busy_S = np.empty(homes_EH.shape), np.empty(len(cost_SP))
    split_rows(work_EC, cost_SP, homes_EH, num_E, fallback_E, promotion_us, share_EH, busy_S)
    min_relief = 0.02 * ideal_level(work_EC, cost_SP)
    while True:
        most, chosen, to = min_relief, -1, -1
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
