"""The plan report turns planned layers into a `Plan` with homes by shard id, moves, gains and reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.placement.balance import Array
from cluster.placement.fleet_budget import FleetBudget, PlannedLayer
from cluster.placement.home_matrix import HomeMatrix
from cluster.placement.plan import MIB, Move, Plan, PlanPolicy, Tier
from cluster.topology import Homes

STAYS = "the shard keeps the expert as a standby"


@dataclass(frozen=True)
class RebalanceEstimate:
    """A `RebalanceEstimate` compares gain and cost of the moves that only save time; moves that add cover do not count.

    `before_us` and `after_us` are the predicted times per step without and with the moves that only save time, summed
    over layers.
    """

    before_us: float
    after_us: float
    num_added: int
    num_bytes: int
    policy: PlanPolicy

    @property
    def summary(self) -> str:
        """Return the number and the size of the new homes as text, for a plan's reasons."""
        return f"{self.num_added} new homes ({self.num_bytes / MIB:,.1f} MiB)"

    @property
    def gain(self) -> float:
        """Return the share of the step time that the moves save."""
        return 1 - self.after_us / self.before_us if self.before_us else 0.0

    @property
    def refusal(self) -> str:
        """Return a sentence that says why the moves are refused; empty if the moves are made or there are no moves."""
        if not self.num_added:
            return ""
        gain_s = self.policy.share_of_time * self.gain * self.policy.stay_s
        cost_s = self.num_bytes / self.policy.bytes_per_s
        what = f"Refused: {self.summary} would shorten a step by {self.gain:.2%}"
        if self.gain < self.policy.min_gain:
            return f"{what}, and less than {self.policy.min_gain:.2%} is not worth moving for."
        if gain_s < cost_s:
            return f"{what}: {gain_s:.2f} s saved while the load stays, for {cost_s:.2f} s of moving."
        return ""


@dataclass(frozen=True)
class GroupEstimate:
    """A `GroupEstimate` says how many shards a token goes to before and after experts move for the sake of groups.

    `before` and `after` are expected numbers, averaged over the layers with groups.
    """

    before: float
    after: float
    num_moved: int
    policy: PlanPolicy

    @property
    def refusal(self) -> str:
        """Return a sentence that says why the moves are refused; empty if the moves are made or there are no moves."""
        saved = 1 - self.after / self.before
        if not self.num_moved or saved >= self.policy.min_gain:
            return ""
        return (
            f"Refused: {self.num_moved} moves for groups of experts would save {saved:.2%} of the shards per token, "
            f"and less than {self.policy.min_gain:.2%} is not worth moving for."
        )

    @property
    def summary(self) -> str:
        """Return a sentence about the groups, for a plan's reasons."""
        if self.num_moved:
            moved = f"{self.num_moved} moves bring the experts of groups together"
            return f"Groups: {moved}; a token goes to {self.after:.2f} shards instead of {self.before:.2f}."
        return f"Groups: a token goes to {self.after:.2f} shards."


def report(
    planned: Sequence[PlannedLayer],
    fleet: FleetBudget,
    rebalance: RebalanceEstimate,
    groups: GroupEstimate | None,
    policy: PlanPolicy,
) -> Plan:
    """Return the plan that leads from the running homes of all layers to the planned homes."""
    homes = {layer.spec.layer: _named(layer, fleet, layer.matrix, layer.before, layer.homes) for layer in planned}
    standby = {
        layer.spec.layer: _named(layer, fleet, layer.standby, layer.standby_before, layer.standby_homes)
        for layer in planned
    }
    moves = _moves(planned, fleet)
    num_bytes = sum(move.bytes for move in moves)
    before_us = sum(layer.level_before(fleet) for layer in planned)
    after_us = sum(float(layer.busy_S(fleet).max()) for layer in planned)
    cover_before = [layer.before.num_E + layer.standby_before.num_E for layer in planned]
    cover_after = [layer.matrix.num_E + layer.standby.num_E + _is_kept_E(layer, fleet) for layer in planned]
    return Plan(
        homes=homes,
        standby={layer: of for layer, of in standby.items() if any(of)},
        moves=moves,
        num_bytes=num_bytes,
        predicted_s_before=before_us * 1e-6,
        predicted_s_after=after_us * 1e-6,
        gain_s=policy.share_of_time * (1 - after_us / before_us) if before_us else 0.0,
        cost_s=num_bytes / policy.bytes_per_s,
        cover_before=min((int(cover_E.min()) for cover_E in cover_before), default=0),
        cover_after=min((int(cover_E.min()) for cover_E in cover_after), default=0),
        blast_radius_before=_blast_radius(planned, fleet, [(la.before, la.standby_before) for la in planned]),
        blast_radius_after=_blast_radius(planned, fleet, [(la.matrix, la.standby) for la in planned]),
        reasons=_reasons(planned, fleet, rebalance, groups, cover_before),
        is_worth_it=not rebalance.refusal,
    )


def kept_homes(layer: PlannedLayer, fleet: FleetBudget) -> dict[int, int]:
    """Return the draining shard of each expert that stays there because no other shard has memory for it."""
    if fleet.num_shards == len(fleet.ids):
        return {}
    return {
        expert: home
        for expert in np.flatnonzero(layer.matrix.num_E == 0).tolist()
        if (home := layer.draining_home(expert, fleet.num_shards)) >= 0
    }


def _is_kept_E(layer: PlannedLayer, fleet: FleetBudget) -> Array:
    """Return 1 for each expert that stays on a draining shard and 0 for all other experts, [E]."""
    is_kept_E = np.zeros(layer.spec.num_experts, np.int64)
    is_kept_E[list(kept_homes(layer, fleet))] = 1
    return is_kept_E


def _named(layer: PlannedLayer, fleet: FleetBudget, matrix: HomeMatrix, before: HomeMatrix, homes: Homes) -> Homes:
    """Return the homes as shard ids; unchanged experts keep their old tuples, because new tuples are slow to build."""
    kept = kept_homes(layer, fleet) if matrix is layer.matrix else {}
    if not kept and homes and layer.is_complete and matrix.is_same(before):
        return homes
    named = list(homes or ((),) * layer.spec.num_experts)
    is_changed_E = before.num_E != np.fromiter(map(len, named), np.int64, len(named))
    is_changed_E[matrix.changed(before)] = True
    for expert in np.flatnonzero(is_changed_E).tolist():
        named[expert] = matrix.ids_of(expert, fleet.ids)
    for expert, home in kept.items():
        named[expert] = (fleet.ids[home],)
    return tuple(named)


def _moves(planned: Sequence[PlannedLayer], fleet: FleetBudget) -> tuple[Move, ...]:
    """Return the moves from the running to the planned homes: first all moves that add, then all moves that drop.

    Moves that add are in three groups: moves for experts without a live home, then moves that repair cover, then all
    other moves. Within each group, experts with more work come first.
    """
    adds: list[tuple[tuple[float, ...], Move]] = []
    drops: list[Move] = []
    for layer in planned:
        kept = kept_homes(layer, fleet)
        work_E = layer.work_EC.sum(axis=1)
        changed = set(layer.matrix.changed(layer.before).tolist())
        changed |= set(layer.standby.changed(layer.standby_before).tolist())
        for expert in sorted(changed):
            device_before, standby_before = layer.before.of_expert(expert), layer.standby_before.of_expert(expert)
            device = [*layer.matrix.of_expert(expert), *([kept[expert]] if expert in kept else [])]
            tiers: tuple[tuple[Tier, list[int], list[int]], ...]
            tiers = ("device", device_before, device), ("standby", standby_before, layer.standby.of_expert(expert))
            for tier, before, after in tiers:
                for shard in sorted(set(after) - set(before)):
                    size = 0 if shard in device_before or shard in standby_before else layer.spec.expert_bytes
                    stays = tier == "standby" and shard in device_before
                    reason, urgency = (STAYS, 2) if stays else _why_added(layer, expert, tier)
                    move = Move(layer.spec.layer, expert, fleet.ids[shard], "add", tier, size, reason)
                    adds.append(((urgency, -work_E[expert], layer.spec.layer, expert, shard), move))
                for shard in sorted(set(before) - set(after)):
                    reason = _why_dropped(layer, fleet, expert, shard, tier)
                    drops.append(Move(layer.spec.layer, expert, fleet.ids[shard], "drop", tier, 0, reason))
    return (*(move for _, move in sorted(adds, key=lambda pair: pair[0])), *drops)


def _why_added(layer: PlannedLayer, expert: int, tier: Tier) -> tuple[str, int]:
    """Return the reason why an expert is added to a tier, and the urgency of the move: 0 is the most urgent."""
    cover = layer.before.num_E[expert] + layer.standby_before.num_E[expert]
    if cover == 0:
        return "the expert has no live home or standby", 0
    if tier == "standby":
        return ("the expert has cover 1" if cover == 1 else "the expert's other homes are dropped or on one node"), 1
    if layer.matrix.num_E[expert] <= 1:
        return "the expert's former home is dropped", 1
    return "the new home shortens the slowest shard's time", 2


def _why_dropped(layer: PlannedLayer, fleet: FleetBudget, expert: int, shard: int, tier: Tier) -> str:
    """Return the reason why a shard drops an expert from a tier."""
    if shard >= fleet.num_shards:
        return "the shard drains"
    if tier == "device":
        stays = (layer.standby.homes_EH[expert] == shard).any()
        return STAYS if stays else "other homes take over the expert's rows"
    is_home = (layer.matrix.homes_EH[expert] == shard).any()
    return "the shard becomes a home of the expert" if is_home else "the expert needs no standby here"


def _blast_radius(
    planned: Sequence[PlannedLayer], fleet: FleetBudget, matrices: Sequence[tuple[HomeMatrix, HomeMatrix]]
) -> dict[str, float]:
    """Return the blast radius of each shard, by shard id.

    The blast radius of a shard is the share of all picks that go to experts without a home or standby on another shard.
    """
    total = sum(float(layer.pick_E.sum()) for layer in planned)
    radius_S = np.zeros(len(fleet.ids))
    for layer, (matrix, standby) in zip(planned, matrices, strict=True):
        kept = kept_homes(layer, fleet) if matrix is layer.matrix else {}
        alone_E: Array = np.flatnonzero(matrix.num_E + standby.num_E == 1)
        alone_E = alone_E[~np.isin(alone_E, list(kept))] if kept else alone_E
        home_E = np.where(matrix.num_E[alone_E] > 0, matrix.homes_EH[alone_E, 0], standby.homes_EH[alone_E, 0])
        np.add.at(radius_S, home_E, layer.pick_E[alone_E])
        for expert, home in kept.items():
            if standby.num_E[expert] == 0:
                radius_S[home] += layer.pick_E[expert]
    return dict(zip(fleet.ids, (radius_S / total).tolist() if total else radius_S.tolist(), strict=True))


def _reasons(
    planned: Sequence[PlannedLayer],
    fleet: FleetBudget,
    rebalance: RebalanceEstimate,
    groups: GroupEstimate | None,
    cover_before: Sequence[Array],
) -> tuple[str, ...]:
    """Return the sentences that explain a plan to an operator; `cover_before` holds each expert's cover by layer."""
    reasons = []
    num_experts = sum(layer.spec.num_experts for layer in planned)
    num_lost = sum(int((cover_E == 0).sum()) for cover_E in cover_before)
    num_single = sum(int((cover_E == 1).sum()) for cover_E in cover_before)
    if num_lost == num_experts:
        reasons.append(f"None of the {num_experts} experts has a live home: this is a first placement.")
    elif num_lost + num_single:
        reasons.append(f"Cover: {num_lost} of {num_experts} experts have no live home and {num_single} have one home.")
    num_kept = sum(len(kept_homes(layer, fleet)) for layer in planned)
    if num_kept:
        reasons.append(f"{num_kept} experts stay on draining shards, because no other shard has memory for them.")
    num_without_device = sum(int((layer.matrix.num_E == 0).sum()) for layer in planned) - num_kept
    if num_without_device:
        reasons.append(
            f"{num_without_device} experts, the coldest, have only standbys: "
            + ("their load is too low for device memory." if fleet.policy.cold_below else "no device has room.")
        )
    num_disk = sum(int(-(free // 1)) for free in np.minimum(fleet.host_budget_S - fleet.host_used_S, 0).tolist())
    if num_disk:
        reasons.append(
            f"{num_disk / MIB:,.1f} MiB of standbys do not fit into host memory, so these standbys are on disk."
        )
    if len(fleet.ids) < 2:
        reasons.append("One shard cannot give an expert two homes: start another shard.")
    if rebalance.refusal:
        reasons.append(rebalance.refusal)
    elif rebalance.num_added:
        reasons.append(f"Time: {rebalance.summary} shorten a step by {rebalance.gain:.2%}.")
    if groups:
        reasons.append(groups.refusal or groups.summary)
    return tuple(reasons)
