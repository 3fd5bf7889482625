"""The coverage of a placement tells which experts have too few live homes, and which picks would fail if a shard died.

`PlacementArrays` hold everything that is slow to compute, and are built once per epoch. A `CoverageReport` is built
again when shards die or come back. A report and its methods take only a few numpy calls, so a backbone can report
coverage several times a second.

Legend: E: the experts of all layers, one layer after the other. H: the homes and standbys of all experts. S: the
shards. L: the layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cluster.topology import Homes, Placement

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Rates = Mapping[int, NDArray[np.float64]]  # Picks per second of each expert, by layer.

FULL_COVER = 2


@dataclass(frozen=True)
class HotExpert:
    """A `HotExpert` is an expert of one layer with its picks per second."""

    layer: int
    expert: int
    picks_per_s: float


class PlacementArrays:
    """`PlacementArrays` are the arrays of one placement, from which coverage and load are computed quickly.

    - Experts of all layers are numbered one after the other. `starts` holds the first number of each layer in `layers`
      and, as the last entry, the number of all experts.
    - Shards are numbered as in `shard_ids`.
    - Entry h of `expert_H` and `shard_H` names an expert and a shard. The shard is a home of the expert if
      `is_device_H[h]` is True, else a standby. Homes come before standbys.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.shard_ids = placement.shard_ids
        self.layers = sorted(placement.homes)
        sizes = [len(placement.homes[layer]) for layer in self.layers]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.num_experts = int(self.starts[-1])
        homes = [self._homes(placement.homes), self._homes(placement.standby)]
        self.expert_H, self.shard_H = (np.concatenate(parts) for parts in zip(*homes, strict=True))
        self.is_device_H: NDArray[np.bool_] = np.arange(len(self.expert_H)) < len(homes[0][0])

    def _homes(self, homes_of: Mapping[int, Homes]) -> tuple[Ids, Ids]:
        """Return the expert numbers and the shard numbers of all homes in `homes_of`, sorted by expert."""
        index = {id: number for number, id in enumerate(self.shard_ids)}
        experts, shards = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for layer, start in zip(self.layers, self.starts.tolist(), strict=False):
            homes = homes_of.get(layer, ())
            nums = np.fromiter(map(len, homes), np.int64, len(homes))
            experts.append(start + np.repeat(np.arange(len(homes)), nums))
            shards.append(np.fromiter((index[id] for ids in homes for id in ids), np.int64, int(nums.sum())))
        return np.concatenate(experts), np.concatenate(shards)

    @cached_property
    def _shares(self) -> tuple[Ids, Ids, Floats]:
        """Return, for each home, its expert, its shard, and the home's share if the expert's picks are split evenly."""
        experts, shards = self.expert_H[self.is_device_H], self.shard_H[self.is_device_H]
        num_E = np.bincount(experts, minlength=self.num_experts)
        return experts, shards, 1.0 / num_E[experts]

    @cached_property
    def layer_E(self) -> Ids:
        """Return the layer of each expert as a position in `layers`, [E]."""
        return np.repeat(np.arange(len(self.layers)), np.diff(self.starts))

    def name(self, number: int) -> tuple[int, int]:
        """Return the layer id of the expert that has the number `number`, and the expert's id in its layer."""
        place = int(self.layer_E[number])
        return self.layers[place], number - int(self.starts[place])

    def rates(self, by_layer: Rates) -> Floats:
        """Return the picks per second of all experts, [E]; experts of layers that are not in `by_layer` have 0."""
        rate_E = np.zeros(self.num_experts)
        for place, layer in enumerate(self.layers):
            if layer in by_layer:
                rate_E[self.starts[place] : self.starts[place + 1]] = by_layer[layer]
        return rate_E

    def loads(self, rate_E: Floats) -> Floats:
        """Return the picks per second of each layer on each shard, [L, S]; homes share their expert's picks evenly."""
        experts, shards, share = self._shares
        cells = self.layer_E[experts] * len(self.shard_ids) + shards
        size = len(self.layers) * len(self.shard_ids)
        load_C: Floats = np.bincount(cells, rate_E[experts] * share, size).astype(np.float64)
        return load_C.reshape(len(self.layers), len(self.shard_ids))

    def num_live_homes(self, live: Collection[str]) -> Ids:
        """Return how many homes and standbys each expert has on the shards in `live`, [E]."""
        is_live_S = np.array([id in live for id in self.shard_ids], np.bool_)
        return np.bincount(self.expert_H[is_live_S[self.shard_H]], minlength=self.num_experts)

    def hottest(self, rate_E: Floats, count: int) -> list[HotExpert]:
        """Return the `count` experts with the most picks, the hottest first; experts without picks are left out."""
        count = min(count, self.num_experts)
        found = np.argpartition(-rate_E, count - 1)[:count] if count else np.zeros(0, np.int64)
        found = found[np.lexsort((found, -rate_E[found]))]
        return [HotExpert(*self.name(int(number)), float(rate_E[number])) for number in found if rate_E[number] > 0]


def balancedness(loads_LS: Floats) -> Floats:
    """Return the balancedness of each layer, [L]: the mean load divided by the maximum, or 1 if there is no load."""
    most_L = loads_LS.max(axis=1, initial=0.0)
    even_L: Floats = np.divide(loads_LS.mean(axis=1), most_L, out=np.ones_like(most_L), where=most_L > 0)
    return even_L


class CoverageReport:
    """A `CoverageReport` says how well a placement is covered while the shards in `live` are alive."""

    def __init__(self, arrays: PlacementArrays, live: Collection[str]) -> None:
        self.arrays, self.live = arrays, frozenset(live)
        self.num_live_E = arrays.num_live_homes(live)
        is_live_S = np.array([id in self.live for id in arrays.shard_ids], np.bool_)
        is_last_H = (self.num_live_E[arrays.expert_H] == 1) & is_live_S[arrays.shard_H]
        self._last_expert, self._last_shard = arrays.expert_H[is_last_H], arrays.shard_H[is_last_H]

    @property
    def cover(self) -> int:
        """Return the cover of the placement: the lowest number of live homes and standbys of any expert."""
        return int(self.num_live_E.min(initial=len(self.arrays.shard_ids)))

    @property
    def below_cover(self) -> Ids:
        """Return the numbers (positions in E) of the experts that have less than full cover."""
        return np.flatnonzero(self.num_live_E < FULL_COVER)

    @property
    def num_missing(self) -> int:
        """Return how many homes or standbys are missing for full cover, summed over all experts."""
        return int((FULL_COVER - self.num_live_E[self.below_cover]).sum())

    def blast_radius(self, rate_E: Floats) -> dict[str, float]:
        """Return the blast radius of each shard, by shard id.

        The blast radius of a shard is the share of all picks that go to experts whose last live home or standby is the
        shard. `rate_E` holds the picks per second of each expert. If all rates are 0, all experts count as picked
        equally often.
        """
        weight_E = rate_E if rate_E.any() else np.ones_like(rate_E)
        lost_S = np.bincount(self._last_shard, weight_E[self._last_expert], len(self.arrays.shard_ids))
        return dict(zip(self.arrays.shard_ids, (lost_S / max(float(weight_E.sum()), 1e-300)).tolist(), strict=True))


@dataclass(frozen=True)
class Repair:
    """A `Repair` says since when experts have been below full cover, and how long the last repair took.

    Times are in seconds since 1970, durations in seconds. `below_since` is None while all experts have full cover.
    """

    below_since: float | None = None
    last_took_s: float | None = None
    num_repaired: int = 0

    def note(self, is_below: bool, now: float) -> Repair:
        """Return the `Repair` after an observation at time `now`; `is_below` says if any expert lacks full cover."""
        if is_below == (self.below_since is not None):
            return self
        if self.below_since is None:
            return replace(self, below_since=now)
        return Repair(None, now - self.below_since, self.num_repaired + 1)

    def seconds_left(self, now: float, usual_s: float) -> float | None:
        """Return the estimated seconds until full cover, or None if cover is full; a repair usually takes `usual_s`."""
        return None if self.below_since is None else max(0.0, self.below_since + usual_s - now)
