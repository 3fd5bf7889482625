"""A step of the local search adds and drops homes of a few experts; the functions apply, undo or try such a step.

A step consists of five numbers (expert, to, out, back, other), where -1 stands for "none":

- `expert` gets a home on shard `to`.
- `out` is an expert that loses its home on `to`, so that `expert` has a slot there.
- `back` is the shard on which `out` gets a home instead.
- `other` is an expert that loses its home on `back`, so that `out` has a slot there.

In a swap, `other` is `expert`, and `back` is the shard that `expert` leaves. The legend of the arrays stands in
`cluster.placement.balance`; `slots_S` is the number of further experts that each shard may hold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.placement.balance import TOLERANCE, add_fallback_time, expert_time, water_fill

# Maximum number of passes of water-filling when a step is tried; trying a step only compares it with other steps.
TRIAL_SWEEPS = 12


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def add_home(expert: int, shard: int, homes_EH: Any, num_E: Any, share_EH: Any, slots_S: Any) -> None:
    """Append `shard` to the homes of `expert`; the new home computes no rows at first."""
    homes_EH[expert, num_E[expert]] = shard
    share_EH[expert, num_E[expert]] = 0.0
    num_E[expert] += 1
    slots_S[shard] -= 1


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def drop_home(
    expert: int, shard: int, work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any,
    slots_S: Any,
) -> None:  # fmt: skip
    """Remove `shard` from the homes of `expert` and split the rows of this home evenly over the other homes."""
    num, position = num_E[expert], 0
    while homes_EH[expert, position] != shard:
        position += 1
    dropped = share_EH[expert, position]
    busy_S[shard] -= dropped * expert_time(work_EC, cost_SP, expert, shard)
    for i in range(position, num - 1):
        homes_EH[expert, i], share_EH[expert, i] = homes_EH[expert, i + 1], share_EH[expert, i + 1]
    homes_EH[expert, num - 1], share_EH[expert, num - 1] = -1, 0.0
    num_E[expert] = num - 1
    slots_S[shard] += 1
    for i in range(num - 1):
        share_EH[expert, i] += dropped / (num - 1)
        busy_S[homes_EH[expert, i]] += dropped / (num - 1) * expert_time(work_EC, cost_SP, expert, homes_EH[expert, i])


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def apply_step(
    step: Any, work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any
) -> None:
    """Add and drop the homes of a step; a water-filling must follow, because new homes have no rows yet."""
    expert, to, out, back, other = step
    add_home(expert, to, homes_EH, num_E, share_EH, slots_S)
    if back >= 0:
        add_home(out, back, homes_EH, num_E, share_EH, slots_S)
        if other >= 0:
            drop_home(other, back, work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
    if out >= 0:
        drop_home(out, to, work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, slots_S)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def undo_step(
    step: Any, work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any
) -> None:
    """Add and drop homes so that every expert has the homes that it had before the step."""
    expert, to, out, back, other = step
    if out >= 0:
        add_home(out, to, homes_EH, num_E, share_EH, slots_S)
    if back >= 0:
        if other >= 0:
            add_home(other, back, homes_EH, num_E, share_EH, slots_S)
        drop_home(out, back, work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, slots_S)
    drop_home(expert, to, work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, slots_S)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def try_step(
    step: Any, work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, slots_S: Any,
    fallback_E: Any, promotion_us: float,
) -> tuple[float, float]:  # fmt: skip
    """Return the time of the slowest shard after a step and the root mean square of all shards' times, both in µs.

    The function leaves the homes, shares, times and slots as they were before the call.
    """
    expert, _, out, _, other = step
    trial_share_EH, trial_busy_S = share_EH.copy(), busy_S.copy()
    homes_H, num = homes_EH[expert].copy(), num_E[expert]
    out_homes_H, out_num = homes_EH[out].copy(), num_E[out]
    other_homes_H, other_num = homes_EH[other].copy(), num_E[other]
    slots_before_S = slots_S.copy()
    apply_step(step, work_EC, cost_SP, homes_EH, num_E, trial_share_EH, trial_busy_S, slots_S)
    if out >= 0 and num_E[out] == 0:
        add_fallback_time(out, step[1], work_EC, cost_SP, trial_busy_S, promotion_us)
    level = water_fill(work_EC, cost_SP, homes_EH, num_E, trial_share_EH, trial_busy_S, TRIAL_SWEEPS, 10 * TOLERANCE)
    if other >= 0:
        homes_EH[other], num_E[other] = other_homes_H, other_num
    homes_EH[expert], num_E[expert] = homes_H, num
    if out >= 0:
        homes_EH[out], num_E[out] = out_homes_H, out_num
    slots_S[:] = slots_before_S
    return float(level), float(np.sqrt((trial_busy_S**2).mean()))
