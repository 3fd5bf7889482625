"""How many shards a pool should have: by how busy its slowest shard is predicted to be, never by open requests.

Pure: the same fleet, load, orders and last decision give the same decision. Several pools decide one after another,
each by its own shards.
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

MIN_SHARDS_IN_ALL = 2  # two homes of an expert are on different shards


@dataclass(frozen=True)
class PoolPolicy:
    """What one pool may be: `target_busy` is the share of time that its slowest shard may compute.

    A pool shrinks only where one shard less is predicted to stay below `(1 - slack) * target_busy`, so that a load at
    either boundary makes it change its size once. A wish to grow or shrink must last for the delays, in seconds.
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
    """The part of its time that a shard is predicted to compute: `calls`, what being called costs whatever is computed,
    and `work`, which more shards would share."""

    calls: float = 0.0
    work: float = 0.0

    @property
    def total(self) -> float:
        return self.calls + self.work


def rows_per_step(shards: Sequence[Shard]) -> float:
    """Rows that a step computes, as the shards see it: the one that most rows of a step come to tells it best."""
    return max([1.0, *(shard.rows_per_call for shard in shards)])


def busy_shares(
    layers: Sequence[LayerSpec],
    shards: Sequence[Shard],
    placement: Placement,
    load: Mapping[int, ExpectedLoad],
    policy: PlanPolicy,
) -> dict[str, BusyShare]:
    """Of every shard that does not drain, by the planner's own costs: Σ layers of µs per step · steps per second.

    A layer without a load costs nothing. Raises ValueError where every shard drains.
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


def predicted(shares: Collection[BusyShare], num_shards: int) -> float:
    """The busy share of a pool's slowest shard if it had so many: the work is shared out as unevenly as now.

    Shards that have nothing to do yet change nothing of it, so that a new one does not look like less load.
    """
    works = [share.work for share in shares if share.work > 0]
    if not works:
        return max((share.calls for share in shares), default=0.0)
    unevenness = max(works) * len(works) / sum(works)
    return max(share.calls for share in shares) + unevenness * sum(works) / num_shards


def fewest_for_cover(layers: Sequence[LayerSpec], own: Sequence[Shard], others: Sequence[Shard]) -> int:
    """The fewest shards of the size of `own` that, with `others`, hold every expert twice, one of them on a device.

    One expert's room stays free on each, so that experts can move.
    """
    whole = sum(spec.num_experts * spec.expert_bytes for spec in layers)
    largest = max((spec.expert_bytes for spec in layers), default=0)
    device = min((shard.memory_budget - largest for shard in own), default=0)
    both = device + min((shard.host_budget for shard in own), default=0)
    if device <= 0:
        return 1  # it holds nothing, and there is nothing to lose
    held = sum(max(0, shard.memory_budget - largest) for shard in others)
    held_in_all = held + sum(shard.host_budget for shard in others)
    for_homes = math.ceil((whole - held) / device)
    for_cover = math.ceil((2 * whole - held_in_all) / both)
    return max(1, MIN_SHARDS_IN_ALL - len(others), for_homes, for_cover)


@dataclass(frozen=True)
class Pool:
    """A pool as it is: what was decided last, the shards that are there, and whether all moves are done."""

    wanted: int
    shares: Mapping[str, BusyShare]
    fewest: int
    is_settled: bool = True
    ordered: int | None = None


@dataclass(frozen=True)
class Decision:
    """The number of shards that a pool should have, and why; `is_ordered` where an operator decided."""

    shards: int
    why: str
    is_ordered: bool = False


def desired_shards(pool: Pool, policy: PoolPolicy) -> Decision:
    """Several up at a time, one down, and down only when all moves are done; an order wins over the load.

    Neither goes below what holds every expert twice, nor out of the pool's bounds.
    """
    most = policy.max_shards
    least = min(max(policy.min_shards, pool.fewest), most)
    if pool.ordered is not None:
        goal = min(max(pool.ordered, least), most)
        within = "" if goal == pool.ordered else f"; from {least} to {most} are possible"
        why = f"an operator ordered {pool.ordered}{within}"
    else:
        goal, why = _goal(pool, policy, least)
    if goal < pool.wanted:
        if not pool.is_settled:
            return Decision(pool.wanted, f"{why}, once the moves under way are done", pool.ordered is not None)
        goal = pool.wanted - 1
    return Decision(goal, why, pool.ordered is not None)


def _goal(pool: Pool, policy: PoolPolicy, least: int) -> tuple[int, str]:
    shares, target = pool.shares.values(), policy.target_busy
    base = min(max(pool.wanted, least), policy.max_shards)
    now = predicted(shares, base)
    if now > target and base < policy.max_shards:
        counts = range(base + 1, policy.max_shards + 1)
        goal = next((count for count in counts if predicted(shares, count) <= target), policy.max_shards)
        return (
            goal,
            f"with {base} the slowest is predicted to be busy for {now:.0%} of the time; {target:.0%} is aimed at",
        )
    if base != pool.wanted:
        return base, f"from {least} to {policy.max_shards} are possible"
    after = predicted(shares, base - 1) if base > least else math.inf
    if after <= (1 - policy.slack) * target:
        return base - 1, f"with one less the slowest is predicted to be busy for {after:.0%} of the time"
    return base, f"the slowest is predicted to be busy for {now:.0%} of the time"


@dataclass(frozen=True)
class Wish:
    """In which direction (-1, 0, 1) a pool has been wished to change, and since when."""

    direction: int = 0
    since: float = 0.0

    def then(self, direction: int, now: float) -> Wish:
        return self if direction == self.direction else Wish(direction, now)

    def is_ripe(self, now: float, policy: PoolPolicy) -> bool:
        delay_s = policy.upscale_delay_s if self.direction > 0 else policy.downscale_delay_s
        return self.direction != 0 and now - self.since >= delay_s
