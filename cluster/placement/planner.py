"""The planner: from the placement that runs to a better one, with few moves.

In this order: every expert gets a home, shards without experts get some, the slowest shard of each layer gets faster
where that is worth the bytes, and every expert gets the second home that it lacks. What the first, second and last do
is always done; the third is rebalance, and refused as a whole where it gains too little.
Pure: the same fleet, load and placement give the same plan, in whatever order the shards come.

Legend: E experts of a layer, S shards that may hold experts (those that drain come after them).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cluster.load import ExpectedLoad
from cluster.placement import balance, first_homes, local_search, second_homes
from cluster.placement.balance import Array, Floats
from cluster.placement.fleet_budget import FleetBudget, PlannedLayer
from cluster.placement.plan import Plan, PlanPolicy
from cluster.placement.plan_report import RebalanceEstimate, report
from cluster.topology import LayerSpec, Placement, Shard

MAX_STEPS = 400  # of one layer in one plan
MANY_LAYERS = 16  # from which threads are worth starting
DEFAULT_POLICY = PlanPolicy()


def plan(
    layers: Sequence[LayerSpec],
    shards: Sequence[Shard],
    placement: Placement | None,
    load: Mapping[int, ExpectedLoad],
    policy: PlanPolicy = DEFAULT_POLICY,
) -> Plan:
    """Where experts should be, starting from where they are.

    `shards` are those alive; homes on others count as lost, and those on draining shards are replaced. A layer without
    a load counts as even. No shard to place on, or a load of the wrong length, is a ValueError.
    """
    fleet = FleetBudget(shards, layers, policy)
    planned = [PlannedLayer(spec, fleet, placement, load.get(spec.layer), policy) for spec in layers]
    fleet.count(planned)
    fleet.evict_over_budget(planned)
    for number, layer in enumerate(planned):
        _assign_first_homes(number, layer, fleet, policy)
    for layer in planned:
        _place_experts_without_homes(layer, planned, fleet)
    for number, layer in enumerate(planned):
        _fill_empty_shards(number, layer, fleet, policy)
    rebalance = _rebalance(planned, fleet, policy)
    for number, layer in enumerate(planned):
        _repair_cover(number, layer, fleet, policy)
    return report(planned, fleet, rebalance, policy)


def _assign_first_homes(number: int, layer: PlannedLayer, fleet: FleetBudget, policy: PlanPolicy) -> None:
    """Homes for the experts of a layer that has none at all, as far as the layer's part of the memory goes."""
    if not layer.is_new:
        return
    slots_S = fleet.slots_S(number, layer)
    level = balance.ideal_level(layer.work_EC, fleet.cost_SP)
    most = min(policy.max_homes, fleet.num_shards) if policy.is_device_cover else 1
    num_slots = int(np.minimum(slots_S, layer.spec.num_experts).sum())
    target_E = np.ones(layer.spec.num_experts, np.int64)
    first_homes.count_homes(layer.work_EC, num_slots, level, most, target_E)
    table = layer.table.resized(max(int(target_E.max()), 1))
    first_homes.assign(
        layer.work_EC, fleet.cost_SP, table.homes_EH, table.num_E, slots_S, fleet.node_S, target_E,
        fleet.cost_SP[:, 0].copy(),
    )  # fmt: skip
    layer.table = table.resized(min(fleet.num_shards, int(table.num_E.max()) + 4))
    fleet.update_usage(layer)
    _run_local_search(layer, fleet, fleet.slots_S(number, layer), level, level, 0.0)
    fleet.update_usage(layer)


def _run_local_search(
    layer: PlannedLayer, fleet: FleetBudget, slots_S: Array, enough: float, aim: float, price: float
) -> tuple[float, float]:
    before, after = local_search.improve(
        layer.work_EC, fleet.cost_SP, layer.table.homes_EH, layer.table.num_E, slots_S, layer.fallback_E,
        layer.is_cold_E, fleet.policy.wake_us_per_mib, enough, aim, price, MAX_STEPS,
    )  # fmt: skip
    return float(before), float(after)


def _place_experts_without_homes(layer: PlannedLayer, planned: Sequence[PlannedLayer], fleet: FleetBudget) -> None:
    """Homes for what is left, the hottest first: wherever there is memory, else in place of a home that others back up.

    What finds nothing stays on its draining shard if it has one, else it stands by, in place of the coldest.
    """
    unplaced = np.flatnonzero(layer.table.num_E == 0)
    if not len(unplaced):
        return
    busy_S = layer.busy_S(fleet)
    costs_E = layer.work_EC.sum(axis=1)
    for expert in unplaced[np.argsort(-costs_E[unplaced], kind="stable")].tolist():
        to = _choose_shard(layer, expert, planned, fleet, busy_S)
        if to >= 0:
            layer.add(expert, to)
            fleet.update_usage(layer)
            busy_S[to] += balance.expert_time(layer.work_EC, fleet.cost_SP, expert, to)


def _choose_shard(
    layer: PlannedLayer, expert: int, planned: Sequence[PlannedLayer], fleet: FleetBudget, busy_S: Floats
) -> int:
    """A shard with room for one more home, which is made if need be; best where it stands by. -1: there is none."""
    free = np.flatnonzero(fleet.free_slots_S(layer) > 0)
    standby = layer.standby.of_expert(expert)
    for shard in standby:
        if shard in free:
            return shard
    for shard in standby:
        out = layer.coldest_with_others(shard)
        if out >= 0:
            layer.drop(out, shard)
            return shard
    if len(free):
        return int(free[np.argmin(busy_S[free])])
    victim, out, shard = _home_to_evict(layer, expert, planned, fleet)
    if out >= 0:
        victim.drop(out, shard)
        fleet.update_usage(victim)
    return shard


def _home_to_evict(
    layer: PlannedLayer, expert: int, planned: Sequence[PlannedLayer], fleet: FleetBudget
) -> tuple[PlannedLayer, int, int]:
    """The layer, expert and shard of a home that may give way to `expert`; the expert is -1 if none may.

    That is the coldest with another home, of the same layer if it has one, else the coldest of the layer if it is
    colder, unless `expert` can stay on a shard that drains.
    """
    others = [other for other in planned if other.spec.expert_bytes >= layer.spec.expert_bytes and other is not layer]
    for victim in (layer, *others):
        out, shard = victim.coldest(2)
        if out >= 0:
            return victim, out, shard
    out, shard = layer.coldest(1)
    is_colder = layer.work_EC[out].sum() < layer.work_EC[expert].sum()
    if out < 0 or not is_colder or layer.draining_home(expert, fleet.num_shards) >= 0:
        return layer, -1, -1
    return layer, out, shard


def _fill_empty_shards(number: int, layer: PlannedLayer, fleet: FleetBudget, policy: PlanPolicy) -> None:
    """Copies of what burdens the slowest shards for shards that hold nothing of a layer yet."""
    if layer.is_new or layer.table.held_S(fleet.num_shards).all():
        return
    slots_S = fleet.slots_S(number, layer)
    slots_S[layer.table.held_S(fleet.num_shards) > 0] = 0
    if not (slots_S > 0).any():
        return
    layer.table = layer.table.resized(min(fleet.num_shards, layer.table.homes_EH.shape[1] + 4))
    local_search.fill_slots(
        layer.work_EC, fleet.cost_SP, layer.table.homes_EH, layer.table.num_E, slots_S, layer.fallback_E,
        policy.wake_us_per_mib,
    )  # fmt: skip
    fleet.update_usage(layer)


def _rebalance(planned: Sequence[PlannedLayer], fleet: FleetBudget, policy: PlanPolicy) -> RebalanceEstimate:
    """Makes the slowest shards of running layers faster, and takes all of it back where it gains too little."""
    levels = [float(layer.busy_S(fleet).max()) for layer in planned]
    for layer, level in zip(planned, levels, strict=True):
        if layer.table.is_same(layer.before):
            layer.level_at_rest = level
    before_us = sum(levels)
    saved_per_us = policy.share_of_time / before_us if before_us else 0.0
    tables = [layer.table for layer in planned]

    def improved(number: int) -> float:
        """The level that the layer comes to; layers have nothing to do with each other here."""
        layer, level = planned[number], levels[number]
        ideal = balance.ideal_level(layer.work_EC, fleet.cost_SP)
        if layer.is_new or ideal >= policy.good_enough * level or saved_per_us * policy.stay_s == 0:
            return level
        layer.table = layer.table.resized(min(fleet.num_shards, layer.table.homes_EH.shape[1] + 4))
        price = layer.spec.expert_bytes / policy.bytes_per_s / (saved_per_us * policy.stay_s)
        slots_S = fleet.slots_S(number, layer)
        return _run_local_search(layer, fleet, slots_S, ideal / policy.good_enough, ideal / policy.aim, price)[1]

    after_us, num_bytes, num_moved = before_us, 0, 0
    for layer, table, level, after in zip(planned, tables, levels, _map_layers(improved, len(planned)), strict=True):
        if after < level:
            after_us += after - level
            added = layer.table.num_added(table)
            num_moved, num_bytes = num_moved + added, num_bytes + added * layer.spec.expert_bytes
        else:
            layer.table = table
    rebalance = RebalanceEstimate(before_us, after_us, num_moved, num_bytes, policy)
    if rebalance.refusal:
        for layer, table in zip(planned, tables, strict=True):
            layer.table = table
    for layer in planned:
        fleet.update_usage(layer)
    return rebalance


def _map_layers(work: Callable[[int], float], num_layers: int) -> list[float]:
    """Of every layer; several at once where they are many, because the compiled search lets go of the interpreter."""
    if num_layers < MANY_LAYERS:
        return [work(number) for number in range(num_layers)]
    with ThreadPoolExecutor(min(num_layers, os.cpu_count() or 1)) as threads:
        return list(threads.map(work, range(num_layers)))


def _repair_cover(number: int, layer: PlannedLayer, fleet: FleetBudget, policy: PlanPolicy) -> None:
    table, standby = layer.table, layer.standby
    slots_S = fleet.slots_S(number, layer) if policy.is_device_cover else np.zeros(fleet.num_shards, np.int64)
    layer.table = table = table.resized(max(table.homes_EH.shape[1], min(2, fleet.num_shards)))
    busy_S = layer.busy_S(fleet)
    second_homes.repair(
        layer.work_EC, fleet.cost_SP, table.homes_EH, table.num_E, standby.homes_EH, standby.num_E,
        layer.before.homes_EH, slots_S, fleet.host_slots_S(number, layer), fleet.node_S, busy_S,
    )  # fmt: skip
    fleet.update_usage(layer)
