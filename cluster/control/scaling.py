"""These functions decide how many shards a pool should have, from the predicted busy share of the slowest shard.

The number of open requests plays no part. All functions are pure: the same fleet, load, orders and last decision give
the same decision. If there are several pools, the caller decides on their sizes one after another; each decision uses
the busy shares of the pool's own shards.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from cluster.load import ExpectedLoad
from cluster.placement.capacity import memory_shares
from cluster.placement.fleet_budget import FleetBudget, PlannedLayer
from cluster.placement.plan import PlanPolicy
from cluster.topology import LayerSpec, Placement, Shard

MIN_SHARDS_IN_ALL = 2  # The smallest size of a fleet: an expert's two homes are on different shards.


@dataclass(frozen=True)
class PoolPolicy:
    """A `PoolPolicy` says how large one pool may be, and when its size changes.

    - `min_shards`, `max_shards`: the bounds of the pool's size.
    - `target_busy`: the largest share of time during which the pool's slowest shard should compute.
    - `slack`: a pool loses a shard only if the slowest remaining shard is then predicted to be busy for a share of at
      most `(1 - slack) * target_busy`. Without this margin, a steady load could make the pool grow and shrink by turns.
    - `upscale_delay_s`, `downscale_delay_s`: the seconds for which the load must require a larger or smaller pool
      before the pool's size is changed.
    """

    min_shards: int
    max_shards: int
    target_busy: float = 0.6
    slack: float = 0.2
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 120.0

    def __post_init__(self) -> None:
        assert 1 <= self.min_shards <= self.max_shards
        assert self.target_busy > 0
        assert 0 < self.slack < 1
        assert min(self.upscale_delay_s, self.downscale_delay_s) >= 0


@dataclass(frozen=True)
class BusyShare:
    """A `BusyShare` predicts the share of time during which a shard computes, as the sum of two parts.

    - `calls`: the share for the fixed cost of the calls to the shard. More shards in the pool do not reduce this part.
    - `work`: the share for the experts and rows that the shard computes. More shards in the pool reduce this part.
    """

    calls: float = 0.0
    work: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of `calls` and `work`."""
        return self.calls + self.work


def rows_per_step(shards: Sequence[Shard]) -> float:
    """Estimate the rows of a step as the largest `rows_per_call` that any shard reports, but at least 1.

    The shard with the largest `rows_per_call` sees most of a step's rows.
    """
    return max([1.0, *(shard.rows_per_call for shard in shards)])


def busy_shares(
    layers: Sequence[LayerSpec],
    shards: Sequence[Shard],
    placement: Placement,
    load: Mapping[int, ExpectedLoad],
    policy: PlanPolicy,
) -> dict[str, BusyShare]:
    """Predict the busy share of every shard that does not drain, by shard id, with the planner's cost model.

    A busy share is the computing time per step, summed over all layers, times the number of steps per second. Layers
    without expected load add nothing. Raises ValueError if every shard drains.
    """
    policy = replace(policy, rows_per_step=rows_per_step(shards))
    fleet = FleetBudget(shards, layers, policy)
    calls_S, work_S = np.zeros(fleet.num_shards), np.zeros(fleet.num_shards)
    for spec in layers:
        expected = load.get(spec.layer)
        if expected is None or not expected.short_E.any():
            continue
        steps_per_s = float(expected.short_E.sum()) / spec.top_k / policy.rows_per_step
        layer = PlannedLayer(spec, fleet, placement, expected, policy)
        call_us_S = fleet.cost_SP[:, 0]
        is_called_S = layer.matrix.held_S(fleet.num_shards) > 0
        calls_S += steps_per_s * 1e-6 * call_us_S * is_called_S
        work_S += steps_per_s * 1e-6 * (layer.busy_S(fleet) - call_us_S)
    parts = zip(calls_S.tolist(), work_S.tolist(), strict=True)
    return {id: BusyShare(calls, max(0.0, work)) for id, (calls, work) in zip(fleet.ids, parts, strict=False)}


def predicted_share(shares: Collection[BusyShare], num_shards: int) -> float:
    """Predict the busy share of the slowest shard in a pool of `num_shards` shards, from the present `shares`.

    The function assumes that the ratio of the largest `work` to the mean `work` stays the same. The mean leaves out
    shards without work. A new, empty shard would otherwise make the pool look less even than it is.
    """
    works = [share.work for share in shares if share.work > 0]
    if not works:
        return max((share.calls for share in shares), default=0.0)
    unevenness = max(works) * len(works) / sum(works)
    return max(share.calls for share in shares) + unevenness * sum(works) / num_shards


def min_shards_for_cover(layers: Sequence[LayerSpec], pool: Sequence[Shard], others: Sequence[Shard]) -> int:
    """Return the smallest size of a pool for full cover, where every expert also needs a home in device memory.

    - `pool`: the shards of the pool. A new shard is assumed to be as large as the smallest shard in `pool`.
    - `others`: the shards of the other pools, which hold experts, too.

    Memory for one expert stays free on every shard, so that experts can move.
    """

    def shares(shard: Shard) -> tuple[Fraction, Fraction]:
        largest = max((spec.on_device(shard.device) for spec in layers), default=0)
        return memory_shares(layers, replace(shard, memory_budget=max(0, shard.memory_budget - largest)))

    in_pool, in_others = [*map(shares, pool)], [*map(shares, others)]
    device = min((device for device, _ in in_pool), default=Fraction(0))
    device_and_host = device + min((host for _, host in in_pool), default=Fraction(0))
    if device <= 0 or not layers:
        return 1  # Shards without memory for an expert do not add to the cover.
    others_device = sum(device for device, _ in in_others)
    others_device_and_host = others_device + sum(host for _, host in in_others)
    for_homes = math.ceil((1 - others_device) / device)
    for_cover = math.ceil((2 - others_device_and_host) / device_and_host)
    return max(1, MIN_SHARDS_IN_ALL - len(others), for_homes, for_cover)


@dataclass(frozen=True)
class PoolState:
    """A `PoolState` holds all facts about a pool that a decision depends on.

    - `size`: the number of shards in the last decision.
    - `shares`: the busy share of each shard that does not drain, by the shard's id.
    - `min_for_cover`: the smallest size of the pool for full cover.
    - `is_settled`: True if all moves of experts are done and the pool has `size` shards.
    - `ordered`: the number of shards that an operator has ordered, or None.
    """

    size: int
    shares: Mapping[str, BusyShare]
    min_for_cover: int
    is_settled: bool = True
    ordered: int | None = None


@dataclass(frozen=True)
class PoolDecision:
    """A `PoolDecision` says how many shards a pool should have, and why.

    `is_ordered` is True if the number comes from an operator's order, and False if it comes from the load.
    """

    shards: int
    why: str
    is_ordered: bool = False


def desired_shards(pool: PoolState, policy: PoolPolicy) -> PoolDecision:
    """Decide how many shards the pool should have; if there is an operator's order, the load does not matter.

    A pool grows by several shards at a time. A pool shrinks by one shard at a time, and only when all moves are done.
    The goal stays within the bounds of `policy`. The goal is at least `pool.min_for_cover` if `policy.max_shards`
    allows it.
    """
    most = policy.max_shards
    least = min(max(policy.min_shards, pool.min_for_cover), most)
    if pool.ordered is not None:
        goal = min(max(pool.ordered, least), most)
        within = "" if goal == pool.ordered else f"; from {least} to {most} are possible"
        why = f"an operator ordered {pool.ordered}{within}"
    else:
        goal, why = _goal_by_load(pool, policy, least)
    if goal < pool.size:
        if not pool.is_settled:
            return PoolDecision(pool.size, f"{why}, once the moves under way are done", pool.ordered is not None)
        goal = pool.size - 1
    return PoolDecision(goal, why, pool.ordered is not None)


def _goal_by_load(pool: PoolState, policy: PoolPolicy, least: int) -> tuple[int, str]:
    """Return a pair: the number of shards that the load requires, and the reason.

    The number is at least `least`.
    """
    shares, target = pool.shares.values(), policy.target_busy
    base = min(max(pool.size, least), policy.max_shards)
    now = predicted_share(shares, base)
    if now > target and base < policy.max_shards:
        counts = range(base + 1, policy.max_shards + 1)
        goal = next((count for count in counts if predicted_share(shares, count) <= target), policy.max_shards)
        return (
            goal,
            f"at a size of {base} the slowest is predicted to be busy for {now:.0%} of the time; the goal is "
            f"{target:.0%}",
        )
    if base != pool.size:
        return base, f"from {least} to {policy.max_shards} are possible"
    after = predicted_share(shares, base - 1) if base > least else math.inf
    if after <= (1 - policy.slack) * target:
        return base - 1, f"with one shard less the slowest is predicted to be busy for {after:.0%} of the time"
    return base, f"the slowest is predicted to be busy for {now:.0%} of the time"


@dataclass(frozen=True)
class PendingChange:
    """A `PendingChange` says whether the load requires a pool to shrink (-1), stay (0) or grow (1), and since when.

    `since` is in seconds since 1970.
    """

    direction: int = 0
    since: float = 0.0

    def updated(self, direction: int, now: float) -> PendingChange:
        """Return the change that is pending at `now`; a new `direction` restarts the delay."""
        return self if direction == self.direction else PendingChange(direction, now)

    def is_due(self, now: float, policy: PoolPolicy) -> bool:
        """Return True if the load has required the change for the delay that `policy` gives."""
        delay_s = policy.upscale_delay_s if self.direction > 0 else policy.downscale_delay_s
        return self.direction != 0 and now - self.since >= delay_s
