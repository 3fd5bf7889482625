"""What a backbone tells of the expert tier: experts below cover, what a shard's death would cost, load and balance."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from cluster.control.registry_store import HEARTBEAT_TTL_S
from cluster.placement.coverage import FULL_COVER, CoverageReport, PlacementArrays, Rates, Repair, balancedness
from cluster.placement.plan import PlanPolicy
from cluster.topology import Placement

NUM_HOTTEST = 20
MAX_NAMED = 20  # experts below cover that are told by name


class TierWatch:
    """Remembers what is costly to find, and since when something is amiss. `expert_bytes` by layer."""

    def __init__(self, expert_bytes: Mapping[int, int]) -> None:
        self._expert_bytes = expert_bytes
        self._exposure: CoverageReport | None = None
        self._repair = Repair()

    def note(self, placement: Placement, live: Collection[str], now: float) -> CoverageReport:
        """Takes note of who serves what the placement says; to be called whenever that may have changed."""
        known, live = self._exposure, frozenset(live) & set(placement.shard_ids)
        if known is None or known.arrays.placement is not placement:
            known = CoverageReport(PlacementArrays(placement), live)
        elif known.live != live:
            known = CoverageReport(known.arrays, live)
        self._exposure = known
        self._repair = self._repair.note(known.num_missing > 0, now)
        return known

    def report(self, exposure: CoverageReport, rates: Rates, now: float) -> dict[str, Any]:
        """Plain numbers for health, metrics and `expertmesh status`."""
        arrays = exposure.arrays
        rate_E = arrays.rates(rates)
        loads_LS = arrays.loads(rate_E)
        balance = zip(arrays.layers, balancedness(loads_LS).tolist(), strict=True)
        picks_S = loads_LS.sum(axis=0)
        return {
            "blast_radius": exposure.blast_radius(rate_E),
            "balancedness": {str(layer): value for layer, value in balance},
            "shard_picks_per_s": dict(zip(arrays.shard_ids, picks_S.tolist(), strict=True)),
            "hottest": [vars(hot) for hot in arrays.hottest(rate_E, NUM_HOTTEST)],
            **self._cover(exposure, now),
        }

    def _cover(self, exposure: CoverageReport, now: float) -> dict[str, Any]:
        below, arrays = exposure.below_cover, exposure.arrays
        named = below[np.argsort(exposure.num_live_E[below], kind="stable")[:MAX_NAMED]].tolist()
        lives = exposure.num_live_E[below]
        # Detected when the heartbeats stop, repaired at the pace that the planner assumes of moves.
        usual_s = HEARTBEAT_TTL_S + self._missing_bytes(exposure) / PlanPolicy().bytes_per_s
        return {
            "experts_below_cover": len(below),
            "below_cover_by_homes": {str(num): int((lives == num).sum()) for num in range(FULL_COVER)},
            "below_cover": [[*arrays.name(number), int(exposure.num_live_E[number])] for number in named],
            "missing_bytes": self._missing_bytes(exposure),
            "below_cover_since": self._repair.below_since,
            "time_to_repair_s": self._repair.seconds_left(now, self._repair.last_took_s or usual_s),
            "last_repair_s": self._repair.last_took_s,
            "num_repairs": self._repair.num_repaired,
        }

    def _missing_bytes(self, exposure: CoverageReport) -> int:
        below, arrays = exposure.below_cover, exposure.arrays
        size_L = np.array([self._expert_bytes[layer] for layer in arrays.layers], np.int64)
        return int((size_L[arrays.layer_E[below]] * (FULL_COVER - exposure.num_live_E[below])).sum())
