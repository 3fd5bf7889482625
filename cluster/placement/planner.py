"""The planner makes a better placement from the running placement, with few moves.

The planner's steps are, in this order:

1. Every expert gets a home.
2. Shards that hold no expert of a layer get copies of the layer's experts.
3. The slowest shard of each layer is made faster, where the gain is worth the bytes that are moved.
4. If `PlanPolicy.keep_groups` is True, the experts of groups are brought together, where the gain is worth the bytes.
5. Experts without full cover get a second home or a standby.

Steps 1, 2 and 5 are always done. Steps 3 and 4 are each refused as a whole if their moves gain too little.

The planner is a pure function: the same fleet, load and placement give the same plan, and the order of the shards does
not matter.

Legend: as in `cluster.placement.balance`; S counts only the shards that may hold experts, not draining shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cluster.load import ExpectedLoad
from cluster.placement import balance, expert_groups, first_homes, local_search, second_homes
from cluster.placement.balance import Array, Floats
from cluster.placement.fleet_budget import FleetBudget, PlannedLayer
from cluster.placement.home_matrix import HomeMatrix
from cluster.placement.plan import Plan, PlanPolicy
from cluster.placement.plan_report import GroupEstimate, RebalanceEstimate, report
from cluster.topology import LayerSpec, Placement, Shard

MAX_STEPS = 400  # Maximum number of steps of the local search for one layer in one plan.
MANY_LAYERS = 16  # Minimum number of layers for which threads save more time than their start costs.
MIN_SAVED = 2e-4  # Minimum number of shards per token that a move for the sake of groups saves.
DEFAULT_POLICY = PlanPolicy()


def plan(
    layers: Sequence[LayerSpec],
    shards: Sequence[Shard],
    placement: Placement | None,
    load: Mapping[int, ExpectedLoad],
    policy: PlanPolicy = DEFAULT_POLICY,
) -> Plan:
    """Plan where experts should be, starting from the running `placement` (None before the first placement).

    `shards` are the live shards: homes on other shards count as lost, and homes on draining shards are replaced. If
    `load` has no entry for a layer, all experts of the layer count as equally loaded.

    Raises ValueError if there is no shard that may hold experts, or if the load or the placement has the wrong number
    of experts.
    """
    fleet = FleetBudget(shards, layers, policy)
    planned = [PlannedLayer(spec, fleet, placement, load.get(spec.layer), policy) for spec in layers]
    for layer in planned:
        fleet.update_usage(layer)
    fleet.evict_over_budget(planned)
    for number, layer in enumerate(planned):
        _assign_first_homes(number, layer, fleet, policy)
    for layer in planned:
        _place_experts_without_homes(layer, planned, fleet)
    for number, layer in enumerate(planned):
        _fill_empty_shards(number, layer, fleet, policy)
    rebalance = _rebalance(planned, fleet, policy)
    groups = _gather_groups(planned, fleet, policy)
    for number, layer in enumerate(planned):
        _repair_cover(number, layer, fleet, policy)
    return report(planned, fleet, rebalance, groups, policy)


def _assign_first_homes(number: int, layer: PlannedLayer, fleet: FleetBudget, policy: PlanPolicy) -> None:
    """Assign homes to all experts if the layer has no home yet, as far as the layer's quota of memory allows."""
    if not layer.is_new:
        return
    slots_S = fleet.slots_S(number, layer)
    level = balance.ideal_level(layer.work_EC, fleet.cost_SP)
    most = min(policy.max_homes, fleet.num_shards) if policy.is_device_cover else 1
    num_slots = int(np.minimum(slots_S, layer.spec.num_experts).sum())
    target_E = np.ones(layer.spec.num_experts, np.int64)
    first_homes.count_homes(layer.work_EC, num_slots, level, most, target_E)
    matrix = layer.matrix.resized(max(int(target_E.max()), 1))
    first_homes.assign(
        layer.work_EC, fleet.cost_SP, matrix.homes_EH, matrix.num_E, slots_S, fleet.node_S, target_E,
        fleet.cost_SP[:, 0].copy(),
    )  # fmt: skip
    _improve_new(number, layer, matrix, fleet, level)
    if layer.has_groups:
        _assign_by_group(number, layer, fleet, target_E, level)


def _improve_new(number: int, layer: PlannedLayer, matrix: HomeMatrix, fleet: FleetBudget, level: float) -> None:
    """Make `matrix` the homes of a new layer, and make the slowest shard faster until its time is `level` (µs)."""
    layer.matrix = matrix.resized(min(fleet.num_shards, int(matrix.num_E.max()) + 4))
    fleet.update_usage(layer)
    _run_local_search(layer, fleet, fleet.slots_S(number, layer), level, level, 0.0)
    fleet.update_usage(layer)


def _assign_by_group(number: int, layer: PlannedLayer, fleet: FleetBudget, target_E: Array, level: float) -> None:
    """Assign the homes of a new layer again, group by group, but keep the present homes if the balance would suffer.

    No shard may need longer than the slowest shard needs with the present homes, divided by `good_enough`.
    """
    plain = layer.matrix
    max_level = float(layer.busy_S(fleet).max()) / fleet.policy.good_enough
    layer.matrix = HomeMatrix.empty(len(target_E), int(target_E.max()))
    fleet.update_usage(layer)
    matrix = layer.matrix.copy()
    expert_groups.assign(
        layer.work_EC, fleet.cost_SP, matrix.homes_EH, matrix.num_E, fleet.slots_S(number, layer), fleet.node_S,
        target_E, layer.spec.group_size,
    )  # fmt: skip
    _improve_new(number, layer, matrix, fleet, level)
    if layer.busy_S(fleet).max() > max_level or (layer.matrix.num_E == 0).sum() > (plain.num_E == 0).sum():
        layer.matrix = plain
        fleet.update_usage(layer)
    _gather(number, layer, fleet, max_level, MIN_SAVED, layer.spec.num_experts)


def _run_local_search(
    layer: PlannedLayer,
    fleet: FleetBudget,
    slots_S: Array,
    thorough_above: float,
    target_level: float,
    price_per_move: float,
) -> tuple[float, float]:
    """Run `local_search.improve` on a layer, in place; return the slowest shard's time in µs before and after."""
    before, after = local_search.improve(
        layer.work_EC, fleet.cost_SP, layer.matrix.homes_EH, layer.matrix.num_E, slots_S, layer.fallback_E,
        layer.is_cold_E, fleet.policy.promotion_us_per_mib, thorough_above, target_level, price_per_move, MAX_STEPS,
    )  # fmt: skip
    return float(before), float(after)


def _place_experts_without_homes(layer: PlannedLayer, planned: Sequence[PlannedLayer], fleet: FleetBudget) -> None:
    """Give a home to every expert that has none, the experts with the most work first.

    If no shard is found, an expert with a home on a draining shard stays there, and any other expert has only standbys.
    """
    unplaced = np.flatnonzero(layer.matrix.num_E == 0)
    if not len(unplaced):
        return
    busy_S = layer.busy_S(fleet)
    work_E = layer.work_EC.sum(axis=1)
    for expert in unplaced[np.argsort(-work_E[unplaced], kind="stable")].tolist():
        to = _choose_shard(layer, expert, planned, fleet, busy_S)
        if to >= 0:
            layer.add(expert, to)
            fleet.update_usage(layer)
            busy_S[to] += balance.expert_time(layer.work_EC, fleet.cost_SP, expert, to)


def _choose_shard(
    layer: PlannedLayer, expert: int, planned: Sequence[PlannedLayer], fleet: FleetBudget, busy_S: Floats
) -> int:
    """Return the shard that should become the home of `expert` (-1 if none); evict another home there if necessary.

    The choices are, in this order:

    1. A standby of the expert, if this shard has a free slot.
    2. A standby of the expert, if another expert on this shard has several homes and can lose its home there.
    3. The least busy shard that has a free slot.
    4. The shard of the home that `_home_to_evict` returns.
    """
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
    """Return the layer, the expert and the shard of the home to evict in favour of `expert`.

    The expert and the shard are -1 if no home may be evicted.

    The first choice is the expert with the least work per home among the experts with several homes, in the same layer
    or else in another layer. The second choice is the expert of the same layer with the least work per home. The second
    choice is allowed only if this expert has less work than `expert`, and `expert` cannot stay on a draining shard.
    """
    needed_S, bytes_S = fleet.device_bytes_S[layer.spec.layer], fleet.device_bytes_S
    others = [other for other in planned if other is not layer and (bytes_S[other.spec.layer] >= needed_S).all()]
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
    """Copy experts from slower shards to the shards that hold no expert of the layer yet."""
    if layer.is_new or layer.matrix.held_S(fleet.num_shards).all():
        return
    slots_S = fleet.slots_S(number, layer)
    slots_S[layer.matrix.held_S(fleet.num_shards) > 0] = 0
    if not (slots_S > 0).any():
        return
    layer.matrix = layer.matrix.resized(min(fleet.num_shards, layer.matrix.homes_EH.shape[1] + 4))
    local_search.fill_slots(
        layer.work_EC, fleet.cost_SP, layer.matrix.homes_EH, layer.matrix.num_E, slots_S, layer.fallback_E,
        policy.promotion_us_per_mib,
    )  # fmt: skip
    fleet.update_usage(layer)


def _rebalance(planned: Sequence[PlannedLayer], fleet: FleetBudget, policy: PlanPolicy) -> RebalanceEstimate:
    """Make the slowest shard of each running layer faster, but undo all changes if the total gain is too small."""
    levels = [float(layer.busy_S(fleet).max()) for layer in planned]
    for layer, level in zip(planned, levels, strict=True):
        if layer.matrix.is_same(layer.before):
            layer.level_at_rest = level
    before_us = sum(levels)
    saved_per_us = policy.share_of_time / before_us if before_us else 0.0
    matrices = [layer.matrix for layer in planned]

    def improve(number: int) -> float:
        """Improve one layer and return its slowest shard's new time in µs; no layer depends on another layer here."""
        layer, level = planned[number], levels[number]
        ideal = balance.ideal_level(layer.work_EC, fleet.cost_SP)
        if layer.is_new or ideal >= policy.good_enough * level or saved_per_us * policy.stay_s == 0:
            return level
        layer.matrix = layer.matrix.resized(min(fleet.num_shards, layer.matrix.homes_EH.shape[1] + 4))
        price_per_move = layer.spec.expert_bytes / policy.bytes_per_s / (saved_per_us * policy.stay_s)
        slots_S = fleet.slots_S(number, layer)
        return _run_local_search(layer, fleet, slots_S, ideal / policy.good_enough, ideal / policy.aim, price_per_move)[
            1
        ]

    after_us, num_bytes, num_added = before_us, 0, 0
    for layer, matrix, level, after in zip(planned, matrices, levels, _map_layers(improve, len(planned)), strict=True):
        if after < level:
            after_us += after - level
            added = layer.matrix.num_added(matrix)
            num_added, num_bytes = num_added + added, num_bytes + added * layer.spec.expert_bytes
        else:
            layer.matrix = matrix
    rebalance = RebalanceEstimate(before_us, after_us, num_added, num_bytes, policy)
    if rebalance.refusal:
        for layer, matrix in zip(planned, matrices, strict=True):
            layer.matrix = matrix
    for layer in planned:
        fleet.update_usage(layer)
    return rebalance


def _gather_groups(planned: Sequence[PlannedLayer], fleet: FleetBudget, policy: PlanPolicy) -> GroupEstimate | None:
    """Bring the experts of groups together in each running layer, but undo all changes if the total gain is too small.

    No shard becomes slower than the ideal level divided by `good_enough`, or than the slowest shard was.
    """
    grouped = [(number, layer) for number, layer in enumerate(planned) if layer.has_groups]
    if not grouped:
        return None
    before_L = [layer.shards_per_token(fleet.num_shards) for _, layer in grouped]
    matrices = [layer.matrix for _, layer in grouped]
    saved_s = policy.share_of_time * policy.share_of_wire * policy.group_stay_s / sum(before_L)

    def improve(place: int) -> int:
        """Improve one layer and return how many homes were moved."""
        number, layer = grouped[place]
        if layer.is_new or saved_s == 0:
            return 0
        max_level = balance.ideal_level(layer.work_EC, fleet.cost_SP) / policy.good_enough
        min_gain = max(MIN_SAVED, layer.spec.expert_bytes / policy.bytes_per_s / saved_s)
        return _gather(number, layer, fleet, max_level, min_gain, int(policy.max_regrouped * layer.spec.num_experts))

    num_moved = int(sum(_map_layers(improve, len(grouped))))
    after = sum(layer.shards_per_token(fleet.num_shards) for _, layer in grouped)
    estimate = GroupEstimate(sum(before_L) / len(grouped), after / len(grouped), num_moved, policy)
    if estimate.refusal:
        for (_, layer), matrix in zip(grouped, matrices, strict=True):
            layer.matrix = matrix
    for _, layer in grouped:
        fleet.update_usage(layer)
    return estimate


def _gather(
    number: int, layer: PlannedLayer, fleet: FleetBudget, max_level: float, min_gain: float, max_moves: int
) -> int:
    """Run `expert_groups.gather` on a copy of the homes of a layer; return how many homes were moved."""
    layer.matrix = layer.matrix.copy()
    num_moved: int = expert_groups.gather(
        layer.work_EC, fleet.cost_SP, layer.matrix.homes_EH, layer.matrix.num_E, layer.standby.homes_EH,
        layer.standby.num_E, fleet.slots_S(number, layer), layer.fallback_E, fleet.policy.promotion_us_per_mib,
        fleet.node_S, layer.routing, max_level, min_gain, max_moves,
    )  # fmt: skip
    return num_moved


def _map_layers(work: Callable[[int], float], num_layers: int) -> list[float]:
    """Return the results of `work` for all layer numbers, computed by several threads if there are many layers.

    Threads help because the compiled search releases Python's global interpreter lock.
    """
    if num_layers < MANY_LAYERS:
        return [work(number) for number in range(num_layers)]
    with ThreadPoolExecutor(min(num_layers, os.cpu_count() or 1)) as threads:
        return list(threads.map(work, range(num_layers)))


def _repair_cover(number: int, layer: PlannedLayer, fleet: FleetBudget, policy: PlanPolicy) -> None:
    """Give the experts of a layer the homes or standbys that they lack for full cover and for shards on two nodes."""
    standby = layer.standby
    slots_S = fleet.slots_S(number, layer) if policy.is_device_cover else np.zeros(fleet.num_shards, np.int64)
    layer.matrix = matrix = layer.matrix.resized(max(layer.matrix.homes_EH.shape[1], min(2, fleet.num_shards)))
    busy_S = layer.busy_S(fleet)
    second_homes.repair(
        layer.work_EC, fleet.cost_SP, matrix.homes_EH, matrix.num_E, standby.homes_EH, standby.num_E,
        layer.before.homes_EH, slots_S, fleet.host_slots_S(number, layer), fleet.node_S, busy_S,
    )  # fmt: skip
    fleet.update_usage(layer)
