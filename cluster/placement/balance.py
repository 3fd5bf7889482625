"""The balance functions split the rows of a layer's experts over homes, and compute the time that each shard needs.

The best split has the lowest level, which is the time of the slowest shard. Water-filling finds the best split: for one
expert after another, it moves rows between the expert's homes until these homes finish together. The time that a shard
needs for an expert is proportional to the share of the expert's rows that the shard computes. If all shards have the
same cost model, `water_fill` finds the same level as a linear programme.

Legend, also for the other compiled files of this folder:

- E: the experts of one layer. S: the shards.
- H: the largest number of homes of an expert. Unused entries of `homes_EH` are -1.
- C = 2: the components of an expert's work in one step, which are the MiB of weights read, and the product of the MiB
  of weights and the rows computed.
- P = 3: the parameters of a shard's cost model, which are µs per call, µs per MiB read, µs per MiB and row.
- `num_E`: the number of homes of each expert. `share_EH`: the share of the expert's rows that each home computes.
- `busy_S`: the time of each shard for one step, in µs.

The functions are compiled, because one decision compares thousands of placements. A function that Python calls writes
its results to arrays that the caller passes, and returns only numbers. Functions that returned new arrays sometimes
failed inside numba; the cause was not found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.int64]
Floats = NDArray[np.float64]

SWEEPS = 200  # Maximum number of passes over all experts; water-filling usually ends earlier, when nothing changes.
TOLERANCE = 1e-4  # A change below this fraction of the slowest shard's time counts as no change.


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def expert_time(work_EC: Any, cost_SP: Any, expert: int, shard: int) -> float:
    """Return the time in µs that `shard` needs for all rows of `expert`, without the fixed time of the call."""
    return float(cost_SP[shard, 1] * work_EC[expert, 0] + cost_SP[shard, 2] * work_EC[expert, 1])


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _water_fill_pair(expert: int, work_EC: Any, cost_SP: Any, homes_EH: Any, share_EH: Any, busy_S: Any) -> float:
    """Split the rows of an expert so that its two homes finish together; return the larger time change, in µs.

    Most experts have two homes. For two homes no loop is necessary, unlike in `_water_fill_expert`.
    """
    first, second = homes_EH[expert, 0], homes_EH[expert, 1]
    first_us = expert_time(work_EC, cost_SP, expert, first)
    second_us = expert_time(work_EC, cost_SP, expert, second)
    step: float = (busy_S[second] - busy_S[first]) / (first_us + second_us)
    step = min(max(step, -share_EH[expert, 0]), share_EH[expert, 1])
    share_EH[expert, 0] += step
    share_EH[expert, 1] -= step
    busy_S[first] += step * first_us
    busy_S[second] -= step * second_us
    return float(abs(step) * max(first_us, second_us))


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _water_fill_expert(
    expert: int, work_EC: Any, cost_SP: Any, homes_EH: Any, num_homes: int, share_EH: Any, busy_S: Any
) -> float:
    """Split the rows of one expert so that its homes finish together; return the largest change of a home's time in µs.

    A home gets no rows of the expert if other experts keep the home busy until after the remaining homes finish.
    """
    if num_homes == 2:
        return float(_water_fill_pair(expert, work_EC, cost_SP, homes_EH, share_EH, busy_S))
    level = float("inf")
    # Each pass except the last excludes homes that other experts keep busy for longer than `level`.
    for _ in range(num_homes):
        before, above, slope = level, 1.0, 0.0
        for i in range(num_homes):
            home = homes_EH[expert, i]
            one = expert_time(work_EC, cost_SP, expert, home)
            base = busy_S[home] - share_EH[expert, i] * one
            if base < before:
                above += base / one
                slope += 1.0 / one
        level = float(above / slope)
        if level >= before:
            break
    largest = 0.0
    for i in range(num_homes):
        home = homes_EH[expert, i]
        one = expert_time(work_EC, cost_SP, expert, home)
        base = busy_S[home] - share_EH[expert, i] * one
        share = max(0.0, level - base) / one
        largest = max(largest, abs(share - share_EH[expert, i]) * one)
        share_EH[expert, i] = share
        busy_S[home] = base + share * one
    return largest


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def water_fill(
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, share_EH: Any, busy_S: Any, max_sweeps: int, tolerance: float
) -> float:
    """Water-fill one expert after another until nothing changes; return the time of the slowest shard in µs.

    Water-filling an expert means splitting its rows so that its homes finish together. The function updates `share_EH`
    and `busy_S`, and ends after `max_sweeps` passes over all experts, or earlier when no home's time changed by more
    than `tolerance` times the slowest shard's time.
    """
    shared = np.flatnonzero((num_E > 1) & (work_EC.sum(axis=1) > 0))
    for _ in range(max_sweeps):
        largest = 0.0
        for expert in shared:
            largest = max(
                largest, _water_fill_expert(expert, work_EC, cost_SP, homes_EH, num_E[expert], share_EH, busy_S)
            )
        if largest <= tolerance * busy_S.max():
            break
    return float(busy_S.max())


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def split_rows(
    work_EC: Any,
    cost_SP: Any,
    homes_EH: Any,
    num_E: Any,
    fallback_E: Any,
    promotion_us: float,
    share_EH: Any,
    busy_S: Any,
) -> None:
    """Write the best split of all rows to `share_EH`, and the resulting time of each shard to `busy_S`.

    An expert without a home is computed by the shard `fallback_E[expert]`, which must first promote the expert; the
    promotion takes `promotion_us` per MiB. If `fallback_E[expert]` is -1, no shard computes the expert.
    """
    busy_S[:] = cost_SP[:, 0]
    share_EH[:] = 0.0
    for expert in range(len(num_E)):
        num = num_E[expert]
        for i in range(num):
            share_EH[expert, i] = 1.0 / num
            busy_S[homes_EH[expert, i]] += expert_time(work_EC, cost_SP, expert, homes_EH[expert, i]) / num
        if num == 0 and fallback_E[expert] >= 0:
            add_fallback_time(expert, fallback_E[expert], work_EC, cost_SP, busy_S, promotion_us)
    water_fill(work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, SWEEPS, TOLERANCE)


def busy_times(
    work_EC: Floats, cost_SP: Floats, homes_EH: Array, num_E: Array, fallback_E: Array, promotion_us: float = 0.0
) -> Floats:
    """Split all rows with `split_rows` and return the resulting time of each shard in µs, [S]."""
    busy_S = np.empty(len(cost_SP))
    split_rows(work_EC, cost_SP, homes_EH, num_E, fallback_E, promotion_us, np.empty(homes_EH.shape), busy_S)
    return busy_S


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def add_fallback_time(expert: int, shard: int, work_EC: Any, cost_SP: Any, busy_S: Any, promotion_us: float) -> None:
    """Add to `busy_S` the time that `shard` needs to promote `expert` and to compute all rows of the expert.

    The promotion takes `promotion_us` (µs) per MiB.
    """
    busy_S[shard] += expert_time(work_EC, cost_SP, expert, shard) + promotion_us * work_EC[expert, 0]


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def ideal_level(work_EC: Any, cost_SP: Any) -> float:
    """Return the slowest shard's time in µs if every expert had a home on every shard: a lower bound."""
    above, slope = 1.0, 0.0
    weights, rows = work_EC[:, 0].sum(), work_EC[:, 1].sum()
    for shard in range(len(cost_SP)):
        one = max(cost_SP[shard, 1] * weights + cost_SP[shard, 2] * rows, 1e-12)
        above += cost_SP[shard, 0] / one
        slope += 1.0 / one
    return above / slope


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def is_home(homes_EH: Any, num_E: Any, expert: int, shard: int) -> bool:
    """Return True if `shard` is a home of `expert`."""
    for i in range(num_E[expert]):  # noqa: SIM110 (numba cannot compile any() of a generator)
        if homes_EH[expert, i] == shard:
            return True
    return False


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def merge_groups(group_S: Any, one: int, other: int) -> None:
    """Merge the group of shard `other` into the group of shard `one`; `group_S` holds each shard's group number."""
    old, new = group_S[other], group_S[one]
    for shard in range(len(group_S)):
        if group_S[shard] == old:
            group_S[shard] = new
