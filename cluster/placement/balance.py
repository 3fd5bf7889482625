"""How long a layer's shards take when the client shares out every expert's rows best over its homes.

Compiled, because one decision compares thousands of placements. An expert's cost on a shard is linear in the share of
its rows that the shard gets. With equal paces the levels that `fill` finds are those of the linear programme.

Legend: E experts of one layer, S shards, H most homes of an expert (-1: no more), C = 2 parts of a cost: MiB of weights
that a step reads, MiB · rows that it computes; P = 3 parts of a pace: µs per call, per MiB read, per MiB · row.

What Python calls, here and in the files that use it, writes to arrays that it is given and returns at most numbers: one
run in many failed inside numba as an array was handed back, for a cause that was not found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.int64]
Floats = NDArray[np.float64]

SWEEPS = 200  # of a fill at most; it ends once nothing changes
TOLERANCE = 1e-4  # of the highest level


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def expert_time(work_EC: Any, cost_SP: Any, expert: int, shard: int) -> float:
    """The µs that all of an expert's rows take on a shard."""
    return float(cost_SP[shard, 1] * work_EC[expert, 0] + cost_SP[shard, 2] * work_EC[expert, 1])


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _water_fill_pair(expert: int, work_EC: Any, cost_SP: Any, homes_EH: Any, share_EH: Any, busy_S: Any) -> float:
    """`_water_fill_expert` for two homes, which most experts with several have."""
    first, second = homes_EH[expert, 0], homes_EH[expert, 1]
    first_rate, second_rate = (
        expert_time(work_EC, cost_SP, expert, first),
        expert_time(work_EC, cost_SP, expert, second),
    )
    step: float = (busy_S[second] - busy_S[first]) / (first_rate + second_rate)
    step = min(max(step, -share_EH[expert, 0]), share_EH[expert, 1])
    share_EH[expert, 0] += step
    share_EH[expert, 1] -= step
    busy_S[first] += step * first_rate
    busy_S[second] -= step * second_rate
    return float(abs(step) * max(first_rate, second_rate))


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _water_fill_expert(
    expert: int, work_EC: Any, cost_SP: Any, homes_EH: Any, num_homes: int, share_EH: Any, busy_S: Any
) -> float:
    """Shares one expert's rows out so that its homes end together; returns the largest change in µs."""
    if num_homes == 2:
        return float(_water_fill_pair(expert, work_EC, cost_SP, homes_EH, share_EH, busy_S))
    level = float("inf")
    for _ in range(num_homes):  # each turn but the last leaves out a home that is above the level as it is
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
    """Levels the homes of one expert after another until nothing changes; returns the time of the slowest shard."""
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
    work_EC: Any, cost_SP: Any, homes_EH: Any, num_E: Any, fallback_E: Any, wake_us: float, share_EH: Any, busy_S: Any
) -> None:
    """Writes the shares and the µs of each shard of a placement whose rows are shared out best.

    An expert without a home is computed at its `fallback_E` (-1: by nobody), which first brings its weights to the
    device at `wake_us` per MiB.
    """
    busy_S[:] = cost_SP[:, 0]
    share_EH[:] = 0.0
    for expert in range(len(num_E)):
        num = num_E[expert]
        for i in range(num):
            share_EH[expert, i] = 1.0 / num
            busy_S[homes_EH[expert, i]] += expert_time(work_EC, cost_SP, expert, homes_EH[expert, i]) / num
        if num == 0 and fallback_E[expert] >= 0:
            add_fallback_time(expert, fallback_E[expert], work_EC, cost_SP, busy_S, wake_us)
    water_fill(work_EC, cost_SP, homes_EH, num_E, share_EH, busy_S, SWEEPS, TOLERANCE)


def busy_times(
    work_EC: Floats, cost_SP: Floats, homes_EH: Array, num_E: Array, fallback_E: Array, wake_us: float = 0.0
) -> Floats:
    """The µs of each shard that `split_rows` writes."""
    busy_S = np.empty(len(cost_SP))
    split_rows(work_EC, cost_SP, homes_EH, num_E, fallback_E, wake_us, np.empty(homes_EH.shape), busy_S)
    return busy_S


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def add_fallback_time(expert: int, shard: int, work_EC: Any, cost_SP: Any, busy_S: Any, wake_us: float) -> None:
    busy_S[shard] += expert_time(work_EC, cost_SP, expert, shard) + wake_us * work_EC[expert, 0]


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def ideal_level(work_EC: Any, cost_SP: Any) -> float:
    """The lower bound: what every shard would take if every expert could be shared out over all of them."""
    above, slope = 1.0, 0.0
    weights, rows = work_EC[:, 0].sum(), work_EC[:, 1].sum()
    for shard in range(len(cost_SP)):
        one = max(cost_SP[shard, 1] * weights + cost_SP[shard, 2] * rows, 1e-12)
        above += cost_SP[shard, 0] / one
        slope += 1.0 / one
    return above / slope


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def is_home(homes_EH: Any, num_E: Any, expert: int, shard: int) -> bool:
    for i in range(num_E[expert]):  # noqa: SIM110 (compiled, and any() of a generator is not)
        if homes_EH[expert, i] == shard:
            return True
    return False


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def merge_groups(group_S: Any, one: int, other: int) -> None:
    old, new = group_S[other], group_S[one]
    for shard in range(len(group_S)):
        if group_S[shard] == old:
            group_S[shard] = new
