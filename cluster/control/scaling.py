"""These functions decide how many shards a pool should have, by how busy its slowest shard is predicted to be.

The number of open requests plays no part. All functions are pure: the same fleet, load, orders and last decision give
the same decision. Where there are several pools, they decide one after another, each by its own shards.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.load import ExpectedLoad
from cluster.placement.fleet_budget import FleetBudget, PlannedLayer
from cluster.placement.plan import PlanPolicy
from cluster.topology import LayerSpec, Placement, Shard

MIN_SHARDS_IN_ALL = 2  # The two homes of an expert are on different shards.


@dataclass(frozen=True)
class PoolPolicy:
    """A `PoolPolicy` says how large one pool may be, and when its size changes.

    - `min_shards`, `max_shards`: the bounds of the pool's size.
    - `target_busy`: the share of its time that the pool's slowest shard may compute.
    - `slack`: a pool shrinks only if the slowest shard is predicted to stay below `(1 - slack) * target_busy` with one
      shard less. So a load at either boundary makes the pool change its size once, not back and forth.
    - `upscale_delay_s`, `downscale_delay_s`: the seconds for which the load must ask for a change before it is made.
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
    """A `BusyShare` is the share of its time that a shard is predicted to compute, in two parts.

    - `calls`: what being called costs, whatever is computed. More shards in the pool do not reduce it.
    - `work`: what is computed for experts and rows. More shards in the pool share this work.
    """

    calls: float = 0.0
    work: float = 0.0

    @property
    def total(self) -> float:
        """Return the whole share."""
        return self.calls + self.work


def rows_per_step(shards: Sequence[Shard]) -> float:
    """Return the largest `rows_per_call` that any shard reports: that shard sees most of a step's rows."""
    return max([1.0, *(shard.rows_per_call for shard in shards)])


def busy_shares(
    layers: Sequence[LayerSpec],
    shards: Sequence[Shard],
    placement: Placement,
    load: Mapping[int, ExpectedLoad],
    policy: PlanPolicy,
) -> dict[str, BusyShare]:
    """Predict the busy share of every shard that does not drain, with the planner's own cost model.

    A share is the sum over layers of µs per step, times the steps per second. A layer without a load costs nothing.
    Raises ValueError if every shard drains.
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
    """Predict the busy share of the slowest shard if the pool had `num_shards`; the work stays as unevenly divided.

    Shards without work are left out of that unevenness, so that a new, empty shard does not look like less load.
    """
    works = [share.work for share in shares if share.work > 0]
    if not works:
        return max((share.calls for share in shares), default=0.0)
    unevenness = max(works) * len(works) / sum(works)
    return max(share.calls for share in shares) + unevenness * sum(works) / num_shards


def min_shards_for_cover(layers: Sequence[LayerSpec], pool: Sequence[Shard], others: Sequence[Shard]) -> int:
    """Return the fewest shards of this pool that, with the `others`, hold every expert twice, once in device memory.

    A new shard is taken to be as large as the smallest of `pool`. Memory for one expert stays free on every shard, so
    that experts can move.
    """
    all_bytes = sum(spec.num_experts * spec.expert_bytes for spec in layers)
    largest = max((spec.expert_bytes for spec in layers), default=0)
    device = min((shard.memory_budget - largest for shard in pool), default=0)
    device_and_host = device + min((shard.host_budget for shard in pool), default=0)
    if device <= 0:
        return 1  # Shards that hold nothing lose nothing.
    others_device = sum(max(0, shard.memory_budget - largest) for shard in others)
    others_device_and_host = others_device + sum(shard.host_budget for shard in others)
    for_homes = math.ceil((all_bytes - others_device) / device)
    for_cover = math.ceil((2 * all_bytes - others_device_and_host) / device_and_host)
    return max(1, MIN_SHARDS_IN_ALL - len(others), for_homes, for_cover)


@dataclass(frozen=True)
class PoolState:
    """A `PoolState` holds all facts about a pool that a decision depends on.

    - `size`: the number of shards that was decided last.
    - `shares`: the busy share of each shard that stays, by its id.
    - `min_for_cover`: the fewest shards that hold every expert twice.
    - `is_settled`: True if all moves are done and the pool has the size that was decided last.
    - `ordered`: the number of shards that an operator has ordered, or None.
    """

    size: int
    shares: Mapping[str, BusyShare]
    min_for_cover: int
    is_settled: bool = True
    ordered: int | None = None


@dataclass(frozen=True)
class PoolDecision:
    """A `PoolDecision` is the number of shards that a pool should have, and why.

    `is_ordered` is True if an operator's order decided, not the load.
    """

    shards: int
    why: str
    is_ordered: bool = False


def desired_shards(pool: PoolState, policy: PoolPolicy) -> PoolDecision:
    """Decide how many shards the pool should have; an operator's order wins over the load.

    A pool grows by several shards at a time. A pool shrinks by one shard at a time, and only when all moves are done.
    The number stays within the pool's bounds, and never falls below the number of shards that hold every expert twice.
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
    """Return the number of shards that the load asks for, which is at least `least`, and why."""
    shares, target = pool.shares.values(), policy.target_busy
    base = min(max(pool.size, least), policy.max_shards)
    now = predicted_share(shares, base)
    if now > target and base < policy.max_shards:
        counts = range(base + 1, policy.max_shards + 1)
        goal = next((count for count in counts if predicted_share(shares, count) <= target), policy.max_shards)
        return (
            goal,
            f"with {base} the slowest is predicted to be busy for {now:.0%} of the time; {target:.0%} is aimed at",
        )
    if base != pool.size:
        return base, f"from {least} to {policy.max_shards} are possible"
    after = predicted_share(shares, base - 1) if base > least else math.inf
    if after <= (1 - policy.slack) * target:
        return base - 1, f"with one less the slowest is predicted to be busy for {after:.0%} of the time"
    return base, f"the slowest is predicted to be busy for {now:.0%} of the time"


@dataclass(frozen=True)
class PendingChange:
    """A `PendingChange` says in which direction (-1, 0 or 1) the load asks a pool to change, and since when.

    `since` is in seconds since 1970.
    """

    direction: int = 0
    since: float = 0.0

    def updated(self, direction: int, now: float) -> PendingChange:
        """Return the change pending at `now`; a new direction restarts the delay."""
        return self if direction == self.direction else PendingChange(direction, now)

    def is_due(self, now: float, policy: PoolPolicy) -> bool:
        """Return True if the change has been pending for the policy's delay."""
        delay_s = policy.upscale_delay_s if self.direction > 0 else policy.downscale_delay_s
        return self.direction != 0 and now - self.since >= delay_s
