"""From planned layers to a Plan: homes by name, the moves between now and then, what they gain, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.placement.balance import Array
from cluster.placement.fleet_budget import FleetBudget, PlannedLayer
from cluster.placement.home_matrix import HomeMatrix
from cluster.placement.plan import MIB, Move, Plan, PlanPolicy, Tier
from cluster.topology import Homes


@dataclass(frozen=True)
class RebalanceEstimate:
    """What the moves that only save time would save: µs per step, and the bytes that they need."""

    before_us: float
    after_us: float
    num_moved: int
    num_bytes: int
    policy: PlanPolicy

    @property
    def what(self) -> str:
        return f"{self.num_moved} experts on other devices ({self.num_bytes / MIB:,.1f} MiB)"

    @property
    def gain(self) -> float:
        """The part of the time per step that is saved."""
        return 1 - self.after_us / self.before_us if self.before_us else 0.0

    @property
    def refusal(self) -> str:
        """Why the moves are not made; empty if they are, or if there are none."""
        if not self.num_moved:
            return ""
        gain_s = self.policy.share_of_time * self.gain * self.policy.stay_s
        cost_s = self.num_bytes / self.policy.bytes_per_s
        what = f"Refused: {self.what} would shorten a step by {self.gain:.2%}"
        if self.gain < self.policy.min_gain:
            return f"{what}, and less than {self.policy.min_gain:.2%} is not worth moving for."
        if gain_s < cost_s:
            return f"{what}: {gain_s:.2f} s saved while the load stays, for {cost_s:.2f} s of moving."
        return ""


def report(
    planned: Sequence[PlannedLayer], fleet: FleetBudget, rebalance: RebalanceEstimate, policy: PlanPolicy
) -> Plan:
    """The plan that leads from the layers as they run to the layers as planned."""
    homes = {layer.spec.layer: _named(layer, fleet, layer.table, layer.before, layer.homes) for layer in planned}
    standby = {
        layer.spec.layer: _named(layer, fleet, layer.standby, layer.standby_before, layer.standby_homes)
        for layer in planned
    }
    moves = _moves(planned, fleet)
    num_bytes = sum(move.bytes for move in moves)
    before_us = sum(layer.level_before(fleet) for layer in planned)
    after_us = sum(float(layer.busy_S(fleet).max()) for layer in planned)
    lives_before = [layer.before.num_E + layer.standby_before.num_E for layer in planned]
    lives_after = [layer.table.num_E + layer.standby.num_E + _is_kept_E(layer, fleet) for layer in planned]
    return Plan(
        homes=homes,
        standby={layer: of for layer, of in standby.items() if any(of)},
        moves=moves,
        num_bytes=num_bytes,
        predicted_s_before=before_us * 1e-6,
        predicted_s_after=after_us * 1e-6,
        gain_s=policy.share_of_time * (1 - after_us / before_us) if before_us else 0.0,
        cost_s=num_bytes / policy.bytes_per_s,
        cover_before=min((int(num_E.min()) for num_E in lives_before), default=0),
        cover_after=min((int(num_E.min()) for num_E in lives_after), default=0),
        blast_radius_before=_blast_radius(planned, fleet, [(la.before, la.standby_before) for la in planned]),
        blast_radius_after=_blast_radius(planned, fleet, [(la.table, la.standby) for la in planned]),
        reasons=_reasons(planned, fleet, rebalance, lives_before),
        is_worth_it=not rebalance.refusal,
    )


def kept_homes(layer: PlannedLayer, fleet: FleetBudget) -> dict[int, int]:
    """The shards that drain and keep an expert on their device all the same, because no other has room for it."""
    if fleet.num_shards == len(fleet.ids):
        return {}
    return {
        expert: home
        for expert in np.flatnonzero(layer.table.num_E == 0).tolist()
        if (home := layer.draining_home(expert, fleet.num_shards)) >= 0
    }


def _is_kept_E(layer: PlannedLayer, fleet: FleetBudget) -> Array:
    is_kept_E = np.zeros(layer.spec.num_experts, np.int64)
    is_kept_E[list(kept_homes(layer, fleet))] = 1
    return is_kept_E


def _named(layer: PlannedLayer, fleet: FleetBudget, table: HomeMatrix, before: HomeMatrix, homes: Homes) -> Homes:
    """Homes by name; those of an expert that doesn't change stay the same objects, which is quick."""
    kept = kept_homes(layer, fleet) if table is layer.table else {}
    if not kept and homes and layer.is_whole and table.is_same(before):
        return homes
    named = list(homes or ((),) * layer.spec.num_experts)
    is_changed_E = before.num_E != np.fromiter(map(len, named), np.int64, len(named))
    is_changed_E[table.changed(before)] = True
    for expert in np.flatnonzero(is_changed_E).tolist():
        named[expert] = table.ids_of(expert, fleet.ids)
    for expert, home in kept.items():
        named[expert] = (fleet.ids[home],)
    return tuple(named)


def _moves(planned: Sequence[PlannedLayer], fleet: FleetBudget) -> tuple[Move, ...]:
    """What differs: those who add before those who drop, and of these what nobody serves, then the hottest, first."""
    adds: list[tuple[tuple[float, ...], Move]] = []
    drops: list[Move] = []
    for layer in planned:
        kept = kept_homes(layer, fleet)
        costs_E = layer.work_EC.sum(axis=1)
        changed = set(layer.table.changed(layer.before).tolist())
        changed |= set(layer.standby.changed(layer.standby_before).tolist())
        for expert in sorted(changed):
            device_before, standby_before = layer.before.of_expert(expert), layer.standby_before.of_expert(expert)
            device = [*layer.table.of_expert(expert), *([kept[expert]] if expert in kept else [])]
            both: tuple[tuple[Tier, list[int], list[int]], ...]
            both = ("device", device_before, device), ("standby", standby_before, layer.standby.of_expert(expert))
            for tier, before, after in both:
                for shard in sorted(set(after) - set(before)):
                    size = 0 if shard in device_before or shard in standby_before else layer.spec.expert_bytes
                    stays = tier == "standby" and shard in device_before
                    reason, urgency = ("it gives way on the device", 2) if stays else _why_added(layer, expert, tier)
                    move = Move(layer.spec.layer, expert, fleet.ids[shard], "add", tier, size, reason)
                    adds.append(((urgency, -costs_E[expert], layer.spec.layer, expert, shard), move))
                for shard in sorted(set(before) - set(after)):
                    reason = _why_dropped(layer, fleet, expert, shard, tier)
                    drops.append(Move(layer.spec.layer, expert, fleet.ids[shard], "drop", tier, 0, reason))
    return (*(move for _, move in sorted(adds, key=lambda one: one[0])), *drops)


def _why_added(layer: PlannedLayer, expert: int, tier: Tier) -> tuple[str, int]:
    num_lives = layer.before.num_E[expert] + layer.standby_before.num_E[expert]
    if num_lives == 0:
        return "it has no live home", 0
    if tier == "standby":
        return ("it has one live home" if num_lives == 1 else "its other homes go, or are on one node"), 1
    if layer.table.num_E[expert] <= 1:
        return "its home goes", 1
    return "it shortens the slowest shard's time", 2


def _why_dropped(layer: PlannedLayer, fleet: FleetBudget, expert: int, shard: int, tier: Tier) -> str:
    if shard >= fleet.num_shards:
        return "the shard drains"
    if tier == "device":
        stays = (layer.standby.homes_EH[expert] == shard).any()
        return "it stands by here from now on" if stays else "other homes take its rows"
    is_home = (layer.table.homes_EH[expert] == shard).any()
    return "it is on the device from now on" if is_home else "other homes cover it"


def _blast_radius(
    planned: Sequence[PlannedLayer], fleet: FleetBudget, tables: Sequence[tuple[HomeMatrix, HomeMatrix]]
) -> dict[str, float]:
    """By shard the share of routed picks whose only live home is there."""
    total = sum(float(layer.picked_E.sum()) for layer in planned)
    radius_S = np.zeros(len(fleet.ids))
    for layer, (table, standby) in zip(planned, tables, strict=True):
        kept = kept_homes(layer, fleet) if table is layer.table else {}
        alone_E: Array = np.flatnonzero(table.num_E + standby.num_E == 1)
        alone_E = alone_E[~np.isin(alone_E, list(kept))] if kept else alone_E
        home_E = np.where(table.num_E[alone_E] > 0, table.homes_EH[alone_E, 0], standby.homes_EH[alone_E, 0])
        np.add.at(radius_S, home_E, layer.picked_E[alone_E])
        for expert, home in kept.items():
            if standby.num_E[expert] == 0:
                radius_S[home] += layer.picked_E[expert]
    return dict(zip(fleet.ids, (radius_S / total).tolist() if total else radius_S.tolist(), strict=True))


def _reasons(
    planned: Sequence[PlannedLayer], fleet: FleetBudget, rebalance: RebalanceEstimate, lives_before: Sequence[Array]
) -> tuple[str, ...]:
    reasons = []
    num_experts = sum(layer.spec.num_experts for layer in planned)
    num_lost = sum(int((num_E == 0).sum()) for num_E in lives_before)
    num_alone = sum(int((num_E == 1).sum()) for num_E in lives_before)
    if num_lost == num_experts:
        reasons.append(f"None of the {num_experts} experts has a live home: this is a first placement.")
    elif num_lost + num_alone:
        reasons.append(f"Cover: {num_lost} of {num_experts} experts have no live home and {num_alone} have one.")
    num_kept = sum(len(kept_homes(layer, fleet)) for layer in planned)
    if num_kept:
        reasons.append(f"{num_kept} experts stay on shards that drain, because no other shard has memory for them.")
    num_asleep = sum(int((layer.table.num_E == 0).sum()) for layer in planned) - num_kept
    if num_asleep:
        reasons.append(
            f"{num_asleep} experts, the coldest, have only homes that stand by: "
            + ("their load is below what a device is kept for." if fleet.policy.cold_below else "no device has room.")
        )
    num_disk = sum(int(-(free // 1)) for free in np.minimum(fleet.host_budget_S - fleet.host_used_S, 0).tolist())
    if num_disk:
        reasons.append(
            f"{num_disk / MIB:,.1f} MiB of experts that stand by do not fit into host memory: they are on disk."
        )
    if len(fleet.ids) < 2:
        reasons.append("One shard cannot give an expert two homes: start another.")
    if rebalance.refusal:
        reasons.append(rebalance.refusal)
    elif rebalance.num_moved:
        reasons.append(f"Time: {rebalance.what} shorten a step by {rebalance.gain:.2%}.")
    return tuple(reasons)
