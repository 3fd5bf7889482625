"""A `FleetConnection` connects a backbone with the expert shards: it takes placements, and reports load and health."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.control.follower import Follower
from cluster.control.load_store import LoadStore
from cluster.control.registry_store import HEARTBEAT_TTL_S, RegistryStore, StoreUnavailable
from cluster.dispatch.shard_health import Circuit
from cluster.load import LoadCounter
from cluster.placement.coverage import FULL_COVER, CoverageReport, PlacementArrays, Rates, Repair, balancedness
from cluster.placement.plan import PlanPolicy
from cluster.topology import Placement, Shard
from services.expert.client import RemoteExperts

log = logging.getLogger(__name__)

WATCH_PERIOD_S = 0.5  # seconds from one look for a new placement to the next
FLUSH_PERIOD_S = 1.0  # seconds from one report of the expert load to the next
RATE_KEPT = 0.9  # weight that the measured picks per second keep from one report to the next
NUM_HOTTEST = 20  # experts with the most picks that a status names
MAX_NAMED = 20  # experts below cover that a status names


class FleetConnection:
    """A `FleetConnection` keeps a backbone's `RemoteExperts` at the newest placement, and reports load and health.

    The load is that of the experts, and the health is that of the fleet. The methods belong to one event
    loop; `experts` is called by the engine's thread. `expert_bytes` is the size of one expert, by layer, and `model` is
    the digest of the checkpoint.
    """

    def __init__(
        self, model: str, expert_bytes: Mapping[int, int], registry: RegistryStore, loads: LoadStore, picks: LoadCounter
    ) -> None:
        self.experts = RemoteExperts(expert_mib={layer: size / 2**20 for layer, size in expert_bytes.items()})
        name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._follower = Follower(name, model, registry, self._adopt)
        self._load = LoadReporter(picks, loads)
        self._coverage = CoverageMonitor(expert_bytes)
        self._placed_at = 0.0  # time of the last `_adopt`, in seconds since 1970
        self._expected_digests: dict[str, str] = {}  # by shard: the digest of the experts that it should hold
        self._tasks: list[asyncio.Task[None]] = []

    async def first_placement(self) -> None:
        """Wait for the first placement."""
        while not await self._refresh():
            await asyncio.sleep(0.1)

    def start(self) -> None:
        """Start to follow the placement and to report the load, in tasks of their own."""
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._load.run())]

    async def stop(self) -> None:
        """End the tasks and fail the layer calls in flight, for which the engine would wait before it stops."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.experts.give_up()

    async def leave(self) -> None:
        """Tell the store that this backbone no longer uses a placement, and close the streams to the shards."""
        with suppress(StoreUnavailable):
            await self._follower.leave()
        await asyncio.to_thread(self.experts.close)

    @property
    def is_healthy(self) -> bool:
        """Return False if a task has ended."""
        return not any(task.done() for task in self._tasks)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                await self._refresh()
                if (placement := self._follower.placement) is not None:
                    self._update_coverage(placement)
            except Exception:
                log.exception("Serving on with epoch %d.", self.experts.epoch)

    async def _refresh(self) -> bool:
        """Take the newest placement and shards from the store; return True if there is a placement.

        If the store cannot be reached, everything stays as it is.
        """
        try:
            return await self._follower.refresh()
        except StoreUnavailable as error:
            log.warning("Serving on with epoch %d: %s", self.experts.epoch, error)
            return False

    def _adopt(self, placement: Placement, shards: Iterable[Shard]) -> None:
        if placement.epoch != self.experts.epoch:
            self._expected_digests = {shard_id: placement.digest_of(shard_id) for shard_id in placement.shard_ids}
        self._placed_at = time.time()
        self.experts.update(placement, shards)

    # Status

    def status(self) -> dict[str, Any]:
        """Return the placement, the shards and the traffic in numbers; nothing before the first placement."""
        placement = self._follower.placement
        if placement is None:
            return {}
        states, circuits = self._shard_states(placement), self.experts.circuits
        coverage = self._update_coverage(placement)
        tier = self._coverage.report(coverage, self._load.rates, time.time())
        return {
            "epoch": self.experts.epoch,
            "cover": coverage.cover,
            "placement_age_s": time.time() - self._placed_at,
            "down": sorted(set(placement.shard_ids) - coverage.live),
            "traffic": asdict(self.experts.traffic),
            "circuits": circuits,
            "tier": tier,
            "shards": self._shard_report(placement, states, tier, circuits),
        }

    @property
    def _unreachable(self) -> set[str]:
        """Return the shards whose stream is down, and those that are gone from the store.

        The store has to be asked as well: a process that hangs keeps its stream open as long as nobody calls it.
        """
        return {*self.experts.down, *self._follower.gone}

    def _shard_states(self, placement: Placement) -> dict[str, str]:
        """Return the state of each shard of the placement: live, or why the shard does not serve its experts."""
        unreachable = self._unreachable

        def state(shard: Shard) -> str:
            if shard.id in unreachable:
                return "unreachable"
            if shard.draining:
                return "draining"
            return "live" if shard.held_digest == self._expected_digests[shard.id] else "loading"

        return {id: state(self._shard(id)) for id in placement.shard_ids}

    def _update_coverage(self, placement: Placement) -> CoverageReport:
        """Return the coverage of the placement by the shards that serve their experts now.

        A shard whose experts are being changed counts as live. Such a shard may hold more experts than the placement
        says, but never fewer: a shard gets new experts before they are published, and keeps old experts while they are
        published.
        """
        unreachable, circuits = self._unreachable, self.experts.circuits
        live = [
            id
            for id in placement.shard_ids
            if id not in unreachable
            and circuits.get(id) != Circuit.OPEN
            and (shard := self._follower.shards.get(id)) is not None
            and (shard.num_held > 0 or shard.held_digest == self._expected_digests[id])
        ]
        return self._coverage.update(placement, live, time.time())

    def _shard_report(
        self, placement: Placement, states: Mapping[str, str], tier: Mapping[str, Any], circuits: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """Return what a status says about each shard of the placement, by shard id."""
        names = ("id", "pool", "node", "endpoint", "device", "num_held", "incarnation", "queue_depth")
        reports = []
        for shard in map(self._shard, sorted(placement.shard_ids)):
            registered = {name: getattr(shard, name) for name in names}
            measured = {
                "pace": asdict(shard.cost_model),
                "picks_per_s": tier["shard_picks_per_s"][shard.id],
                "blast_radius": tier["blast_radius"][shard.id],
                "circuit": circuits.get(shard.id, "unknown"),
                "state": states[shard.id],
            }
            reports.append(registered | measured)
        return reports

    def _shard(self, shard_id: str) -> Shard:
        """Return a shard of the placement, with empty fields if it has not registered since this backbone started."""
        never_seen = Shard(shard_id, endpoint="", node="", pool="", device="", incarnation="", memory_budget=0)
        return self._follower.shards.get(shard_id) or never_seen


class LoadReporter:
    """A `LoadReporter` adds a backbone's counts of picks to the load store once a second, and keeps the rate of picks.

    `rates` holds the picks per second of each expert, by layer, averaged over about ten reports.
    """

    def __init__(self, picks: LoadCounter, loads: LoadStore) -> None:
        self._picks, self._loads = picks, loads
        self.rates: dict[int, NDArray[np.float64]] = {}

    async def run(self) -> None:
        """Report for ever; counts that cannot be sent are kept and sent with the next report."""
        while True:
            await asyncio.sleep(FLUSH_PERIOD_S)
            taken = self._picks.take()
            self._update_rates(taken)
            try:
                await self._loads.add(taken, time.time())
                self._picks.mark_sent()
            except StoreUnavailable as error:
                log.warning("Expert load is kept for later: %s", error)
                self._picks.merge(taken)
            except Exception:
                log.exception("The expert load of the last second is lost.")

    def _update_rates(self, taken: Mapping[int, NDArray[np.int64]]) -> None:
        for layer in {*self.rates, *taken}:
            old, new = self.rates.get(layer, 0.0), taken.get(layer, 0)
            self.rates[layer] = np.asarray(RATE_KEPT * old + (1 - RATE_KEPT) * new / FLUSH_PERIOD_S)


class CoverageMonitor:
    """A `CoverageMonitor` knows which experts have too few live homes, and since when.

    The report describes the expert tier in plain numbers. The coverage is computed again only if the placement or the
    live shards changed. `expert_bytes` is the size of one expert, by layer.
    """

    def __init__(self, expert_bytes: Mapping[int, int]) -> None:
        self._expert_bytes = expert_bytes
        self._report: CoverageReport | None = None
        self._repair = Repair()

    def update(self, placement: Placement, live: Collection[str], now: float) -> CoverageReport:
        """Return the coverage of a placement by the `live` shards; call this whenever either may have changed.

        `now` is in seconds since 1970.
        """
        report, live = self._report, frozenset(live) & set(placement.shard_ids)
        if report is None or report.arrays.placement is not placement:
            report = CoverageReport(PlacementArrays(placement), live)
        elif report.live != live:
            report = CoverageReport(report.arrays, live)
        self._report = report
        self._repair = self._repair.note(report.num_missing > 0, now)
        return report

    def report(self, coverage: CoverageReport, rates: Rates, now: float) -> dict[str, Any]:
        """Return the numbers for health, metrics and `expertmesh status`, with the picks per second in `rates`."""
        arrays = coverage.arrays
        rate_E = arrays.rates(rates)
        loads_LS = arrays.loads(rate_E)
        balance = zip(arrays.layers, balancedness(loads_LS).tolist(), strict=True)
        picks_S = loads_LS.sum(axis=0)
        return {
            "blast_radius": coverage.blast_radius(rate_E),
            "balancedness": {str(layer): value for layer, value in balance},
            "shard_picks_per_s": dict(zip(arrays.shard_ids, picks_S.tolist(), strict=True)),
            "hottest": [vars(hot) for hot in arrays.hottest(rate_E, NUM_HOTTEST)],
            **self._cover(coverage, now),
        }

    def _cover(self, coverage: CoverageReport, now: float) -> dict[str, Any]:
        below, arrays = coverage.below_cover, coverage.arrays
        named = below[np.argsort(coverage.num_live_E[below], kind="stable")[:MAX_NAMED]].tolist()
        lives = coverage.num_live_E[below]
        # The loss is noticed when the heartbeats end. After that, experts move as fast as the planner assumes.
        usual_s = HEARTBEAT_TTL_S + self._missing_bytes(coverage) / PlanPolicy().bytes_per_s
        return {
            "experts_below_cover": len(below),
            "below_cover_by_homes": {str(num): int((lives == num).sum()) for num in range(FULL_COVER)},
            "below_cover": [[*arrays.name(number), int(coverage.num_live_E[number])] for number in named],
            "missing_bytes": self._missing_bytes(coverage),
            "below_cover_since": self._repair.below_since,
            "time_to_repair_s": self._repair.seconds_left(now, self._repair.last_took_s or usual_s),
            "last_repair_s": self._repair.last_took_s,
            "num_repairs": self._repair.num_repaired,
        }

    def _missing_bytes(self, coverage: CoverageReport) -> int:
        below, arrays = coverage.below_cover, coverage.arrays
        size_L = np.array([self._expert_bytes[layer] for layer in arrays.layers], np.int64)
        return int((size_L[arrays.layer_E[below]] * (FULL_COVER - coverage.num_live_E[below])).sum())
