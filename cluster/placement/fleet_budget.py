"""A fleet budget counts the free memory of each shard; a planned layer holds the running and planned homes of a layer.

Legend: as in `cluster.placement.balance`; S counts only the shards that may hold experts, not draining shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cluster.load import ExpectedLoad
from cluster.placement import balance, expert_groups
from cluster.placement.balance import Array, Floats
from cluster.placement.expert_work import expert_work, pick_probabilities
from cluster.placement.home_matrix import HomeMatrix, ShardNumbers
from cluster.placement.plan import PlanPolicy
from cluster.topology import LayerSpec, Placement, Shard


class FleetBudget:
    """A `FleetBudget` counts the bytes that each shard has used, and says how many more experts each shard may hold.

    `ids` are the ids of all shards: first the `num_shards` active shards, sorted by id, then the draining shards.
    Arrays with S in the suffix have entries for active shards only, except `all_costs_SP`, which has entries for all
    shards.
    """

    def __init__(self, shards: Sequence[Shard], layers: Sequence[LayerSpec], policy: PlanPolicy) -> None:
        ordered = sorted(shards, key=lambda shard: (shard.draining, shard.id))
        active = [shard for shard in ordered if not shard.draining]
        if not active:
            raise ValueError("There is no shard to place experts on: start at least one that is not draining.")
        self.policy = policy
        self.ids = tuple(shard.id for shard in ordered)
        self.num_shards = len(active)
        self.index = ShardNumbers((id, i) for i, id in enumerate(self.ids))
        costs = [
            (shard.cost_model.call_us, shard.cost_model.weight_us_per_mib, shard.cost_model.row_us_per_mib)
            for shard in ordered
        ]
        self.all_costs_SP = np.array(costs, np.float64)
        # The time of an expert must not be 0, because water-filling divides by the time.
        self.all_costs_SP[:, 2] = np.maximum(self.all_costs_SP[:, 2], 1e-9)
        self.cost_SP = self.all_costs_SP[: self.num_shards]
        self.node_S = np.unique([shard.node for shard in active], return_inverse=True)[1].astype(np.int64)
        self.budget_S = np.array([shard.memory_budget for shard in active], np.int64)
        self.host_budget_S = np.array([shard.host_budget for shard in active], np.int64)
        self.used_S = np.zeros(self.num_shards, np.int64)
        self.host_used_S = np.zeros(self.num_shards, np.int64)
        # The bytes of one expert on the device and in the host memory of each shard, by layer.
        self.device_bytes_S = {spec.layer: _per_shard(active, spec.on_device) for spec in layers}
        self.host_bytes_S = {spec.layer: _per_shard(active, spec.in_host_memory) for spec in layers}
        self._set_headroom(layers)
        self._set_quotas(layers)

    def _set_headroom(self, layers: Sequence[LayerSpec]) -> None:
        """Set how many bytes stay free on every shard: a shard loads a new expert before it drops an old one."""
        none_S = np.zeros(self.num_shards, np.int64)
        self.headroom_S = none_S + (self.policy.headroom or 0)
        if self.policy.headroom is None:
            largest_S = np.max([none_S, *self.device_bytes_S.values()], axis=0)
            whole_S = sum((spec.num_experts * self.device_bytes_S[spec.layer] for spec in layers), none_S)
            share = (np.maximum(self.budget_S - largest_S, 0) / np.maximum(whole_S, 1)).sum()
            self.headroom_S = largest_S if share >= 1 - 1e-12 else none_S

    def _set_quotas(self, layers: Sequence[LayerSpec]) -> None:
        """Set how many experts of each layer each shard may hold.

        Every layer gets a part of a shard's memory, in proportion to the bytes of the layer's experts. If a part is not
        a multiple of the expert's size, the remaining bytes go to the next layer.
        """
        usable_S = np.maximum(self.budget_S - self.headroom_S, 0)
        self.quota_LS = np.zeros((len(layers), self.num_shards), np.int64)
        self.host_quota_LS = np.zeros((len(layers), self.num_shards), np.int64)
        for quota_LS, budget_S, bytes_S in (
            (self.quota_LS, usable_S, self.device_bytes_S),
            (self.host_quota_LS, self.host_budget_S, self.host_bytes_S),
        ):
            done_S, assigned_S = np.zeros_like(usable_S), np.zeros_like(usable_S)
            total_S = sum((spec.num_experts * bytes_S[spec.layer] for spec in layers), np.zeros_like(usable_S))
            for number, spec in enumerate(layers):
                done_S += spec.num_experts * bytes_S[spec.layer]
                part_S = done_S / total_S + 1e-12
                quota_LS[number] = (np.floor(budget_S * part_S) - assigned_S) // bytes_S[spec.layer]
                assigned_S += quota_LS[number] * bytes_S[spec.layer]

    def update_usage(self, layer: PlannedLayer) -> None:
        """Update the used bytes of all shards after homes or standbys of `layer` have changed."""
        held_S, standby_S = layer.matrix.held_S(self.num_shards), layer.standby.held_S(self.num_shards)
        self.used_S += (held_S - layer.counted_S) * self.device_bytes_S[layer.spec.layer]
        self.host_used_S += (standby_S - layer.host_counted_S) * self.host_bytes_S[layer.spec.layer]
        layer.counted_S, layer.host_counted_S = held_S, standby_S

    def slots_S(self, number: int, layer: PlannedLayer) -> Array:
        """Return how many more experts of a layer each shard may get, [S], within the layer's quota and the headroom.

        `number` is the position of the layer in the `layers` that were passed to the constructor.
        """
        free_S = (self.budget_S - self.headroom_S - self.used_S) // self.device_bytes_S[layer.spec.layer]
        quota_left_S = self.quota_LS[number] - layer.matrix.held_S(self.num_shards)
        slots_S: Array = np.maximum(np.minimum(free_S, quota_left_S), 0)
        return slots_S

    def free_slots_S(self, layer: PlannedLayer) -> Array:
        """Return how many more experts of a layer fit on each shard, [S], without regard to quota and headroom."""
        slots_S: Array = np.maximum((self.budget_S - self.used_S) // self.device_bytes_S[layer.spec.layer], 0)
        return slots_S

    def host_slots_S(self, number: int, layer: PlannedLayer) -> Array:
        """Return how many more standbys a layer may put in each shard's host memory, [S].

        A negative number counts the standbys that do not fit into host memory and are therefore on disk.
        """
        free_S = (self.host_budget_S - self.host_used_S) // self.host_bytes_S[layer.spec.layer]
        slots_S: Array = np.minimum(free_S, self.host_quota_LS[number] - layer.standby.held_S(self.num_shards))
        return slots_S

    def evict_over_budget(self, planned: Sequence[PlannedLayer]) -> None:
        """Drop homes on shards that hold more bytes than their budget.

        Experts with several homes lose a home first, then experts with one home. Within each group, the experts with
        the least work come first.
        """
        for shard in np.flatnonzero(self.used_S > self.budget_S).tolist():
            held = [
                (int(layer.matrix.num_E[expert]) < 2, float(layer.work_EC[expert].sum()), number, expert)
                for number, layer in enumerate(planned)
                for expert in np.flatnonzero((layer.matrix.homes_EH == shard).any(axis=1)).tolist()
            ]
            for _, _, number, expert in sorted(held):
                if self.used_S[shard] <= self.budget_S[shard]:
                    break
                planned[number].drop(expert, shard)
                self.update_usage(planned[number])


def _per_shard(shards: Sequence[Shard], bytes_on: Callable[[str], int]) -> Array:
    return np.array([bytes_on(shard.device) for shard in shards], np.int64)


class PlannedLayer:
    """A `PlannedLayer` holds the running homes and the planned homes of one layer.

    - `before` and `standby_before`: the running homes and standbys, draining shards included.
    - `matrix` and `standby`: the planned homes and standbys. At first they are the running homes and standbys without
      those on draining shards.
    - `homes` and `standby_homes`: the running homes and standbys as shard ids, as listed in the placement.
    - `pick_E`: the probability that a row picks each expert.
    - `has_groups`: True if the policy keeps groups together and a token's experts come from only some of the groups.
    """

    def __init__(
        self,
        spec: LayerSpec,
        fleet: FleetBudget,
        placement: Placement | None,
        load: ExpectedLoad | None,
        policy: PlanPolicy,
    ) -> None:
        self.spec = spec
        self.homes = placement.homes.get(spec.layer, ()) if placement else ()
        self.standby_homes = placement.standby.get(spec.layer, ()) if placement else ()
        empty = ((),) * spec.num_experts
        if len(self.homes or empty) != spec.num_experts:
            raise ValueError(
                f"The placement has {len(self.homes)} experts in layer {spec.layer}, but the model has "
                f"{spec.num_experts}; a placement is made for one model."
            )
        self.before = HomeMatrix.of(self.homes or empty, fleet.index, 1)
        self.standby_before = HomeMatrix.of(self.standby_homes or empty, fleet.index, 3)
        num_named = sum(map(len, self.homes)) + sum(map(len, self.standby_homes))
        # The layer is complete if every shard that the placement names is in the fleet.
        self.is_complete = num_named == self.before.num_E.sum() + self.standby_before.num_E.sum()
        self.is_new = not self.before.num_E.any()
        has_draining = fleet.num_shards < len(fleet.ids)
        self.matrix = self.before.only_below(fleet.num_shards) if has_draining else self.before.copy()
        self.standby = self.standby_before.only_below(fleet.num_shards) if has_draining else self.standby_before.copy()
        self.has_groups = policy.keep_groups and spec.top_groups < spec.num_groups
        self.pick_E, cautious_E = pick_probabilities(spec, load, policy.risk)
        self.work_EC: Floats = expert_work(spec, cautious_E, policy.rows_per_step)
        is_known = load is not None and policy.cold_below > 0
        self.is_cold_E = (
            load.mean_E < policy.cold_below if load is not None and is_known else np.zeros(spec.num_experts, np.bool_)
        )
        self.counted_S = np.zeros(fleet.num_shards, np.int64)
        self.host_counted_S = np.zeros(fleet.num_shards, np.int64)
        self.promotion_us = policy.promotion_us_per_mib
        # Time of the slowest shard in µs if no home changed before the local search, else None.
        self.level_at_rest: float | None = None
        # The last result of `busy_S`, after the homes and fallbacks for which it was computed.
        self._known_busy: tuple[HomeMatrix, Array, Floats] | None = None

    @property
    def routing(self) -> tuple[int, float, float]:
        """Return the size of a group, the share of groups that a token uses, and a token's picks in a group it uses."""
        spec = self.spec
        return spec.group_size, spec.top_groups / spec.num_groups, spec.top_k / spec.top_groups

    def shards_per_token(self, num_shards: int) -> float:
        """Return the expected number of shards that compute the experts of a token (`expert_groups`)."""
        return float(expert_groups.shards_per_token(self.matrix.homes_EH, self.matrix.num_E, self.routing, num_shards))

    @property
    def fallback_E(self) -> Array:
        """Return the first standby of each expert without a home, [E]; -1 for experts with a home or no standby."""
        return np.where(self.matrix.num_E == 0, self.standby.homes_EH[:, 0], -1)

    def busy_S(self, fleet: FleetBudget) -> Floats:
        """Return the time of each shard in µs, [S], when the rows of every expert are split best over its homes."""
        fallback_E = self.fallback_E
        if self._known_busy is None or not (
            self._known_busy[0].is_same(self.matrix) and np.array_equal(self._known_busy[1], fallback_E)
        ):
            busy_S = balance.busy_times(
                self.work_EC, fleet.cost_SP, self.matrix.homes_EH, self.matrix.num_E, fallback_E, self.promotion_us
            )
            self._known_busy = self.matrix.copy(), fallback_E, busy_S
        return self._known_busy[2].copy()

    def level_before(self, fleet: FleetBudget) -> float:
        """Return the time in µs of the slowest shard with the running homes, draining shards included.

        Experts without a live home or standby add no time.
        """
        if self.level_at_rest is not None:
            return self.level_at_rest
        busy_S = balance.busy_times(
            self.work_EC, fleet.all_costs_SP, self.before.homes_EH, self.before.num_E,
            self.standby_before.homes_EH[:, 0].copy(), self.promotion_us,
        )  # fmt: skip
        return float(busy_S.max())

    def add(self, expert: int, shard: int) -> None:
        """Append `shard` to the homes of `expert`; add a column to the matrix if necessary."""
        if self.matrix.num_E[expert] == self.matrix.homes_EH.shape[1]:
            self.matrix = self.matrix.resized(self.matrix.homes_EH.shape[1] + 1)
        self.matrix.homes_EH[expert, self.matrix.num_E[expert]] = shard
        self.matrix.num_E[expert] += 1

    def drop(self, expert: int, shard: int) -> None:
        """Remove `shard` from the homes of `expert`."""
        homes_H = self.matrix.homes_EH[expert]
        kept = homes_H[(homes_H >= 0) & (homes_H != shard)]
        homes_H[:] = -1
        homes_H[: len(kept)] = kept
        self.matrix.num_E[expert] = len(kept)

    def draining_home(self, expert: int, num_shards: int) -> int:
        """Return a draining shard that is a running home of `expert`, or -1 if there is no such shard.

        The numbers of draining shards start at `num_shards`.
        """
        last = int(self.before.homes_EH[expert].max(initial=-1))
        return last if last >= num_shards else -1

    def coldest_with_others(self, shard: int) -> int:
        """Return the expert with the least work per home, among experts with a home on `shard` and a home elsewhere.

        Return -1 if there is no such expert.
        """
        held = np.flatnonzero((self.matrix.homes_EH == shard).any(axis=1) & (self.matrix.num_E > 1))
        return int(held[np.argmin(self.work_EC[held].sum(axis=1) / self.matrix.num_E[held])]) if len(held) else -1

    def coldest(self, min_homes: int) -> tuple[int, int]:
        """Return the expert with the least work per home, and its last home.

        Only experts with at least `min_homes` homes are considered. Return (-1, -1) if there is no such expert.
        """
        candidates = np.flatnonzero(self.matrix.num_E >= min_homes)
        if not len(candidates):
            return -1, -1
        num_E = self.matrix.num_E[candidates]
        expert = int(candidates[np.argmin(self.work_EC[candidates].sum(axis=1) / num_E)])
        return expert, int(self.matrix.homes_EH[expert, self.matrix.num_E[expert] - 1])
