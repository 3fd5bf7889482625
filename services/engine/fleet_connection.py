"""A `FleetConnection` connects a backbone with expert shards: it follows the placement, and reports load and health."""

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

WATCH_PERIOD_S = 0.5  # seconds between two reads of the placement from the store
FLUSH_PERIOD_S = 1.0  # seconds between two reports of the expert load
RATE_KEPT = 0.9  # weight of the earlier reports in the moving average of picks per second
NUM_HOTTEST = 20  # number of experts with the most picks that a status lists
MAX_NAMED = 20  # largest number of experts below full cover that a status lists


class FleetConnection:
    """A `FleetConnection` keeps a backbone's `RemoteExperts` at the newest placement, and reports load and health.

    "Load" means the picks of each expert, and "health" means the state of the fleet. All methods must be called on the
    same event loop; the engine's thread calls `experts`.

    - `model`: the digest of the checkpoint.
    - `expert_bytes`: the size of one expert in bytes, by layer.
    """

    def __init__(
        self, model: str, expert_bytes: Mapping[int, int], registry: RegistryStore, loads: LoadStore, picks: LoadCounter
    ) -> None:
        self.experts = RemoteExperts(expert_mib={layer: size / 2**20 for layer, size in expert_bytes.items()})
        name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._follower = Follower(name, model, registry, self._adopt)
        self._load = LoadReporter(picks, loads)
        self._coverage = CoverageMonitor(expert_bytes)
        self._placed_at = 0.0  # time of the last call of `_adopt`, in seconds since 1970
        self._expected_digests: dict[str, str] = {}  # by shard id: the digest of the experts that the shard should hold
        self._tasks: list[asyncio.Task[None]] = []

    async def first_placement(self) -> None:
        """Wait until the store has a placement, and start to use the placement."""
        while not await self._refresh():
            await asyncio.sleep(0.1)

    def start(self) -> None:
        """Start two tasks: the first task follows the placement, and the second task reports the load."""
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._load.run())]

    async def stop(self) -> None:
        """End the tasks, and fail the layer calls in flight so that the engine does not wait for these calls."""
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
        """Return True if all tasks that `start` created are still running."""
        return not any(task.done() for task in self._tasks)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                await self._refresh()
                if (placement := self._follower.placement) is not None:
                    self._update_coverage(placement)
            except Exception:
                log.exception("Updating the placement failed; epoch %d stays in use.", self.experts.epoch)

    async def _refresh(self) -> bool:
        """Read the newest placement and the shards from the store; return True if there is a placement.

        If the store cannot be reached, keep the old placement and return False.
        """
        try:
            return await self._follower.refresh()
        except StoreUnavailable as error:
            log.warning("The store cannot be reached; epoch %d stays in use: %s", self.experts.epoch, error)
            return False

    def _adopt(self, placement: Placement, shards: Iterable[Shard]) -> None:
        if placement.epoch != self.experts.epoch:
            self._expected_digests = {shard_id: placement.digest_of(shard_id) for shard_id in placement.shard_ids}
        self._placed_at = time.time()
        self.experts.update(placement, shards)

    # Status

    def status(self) -> dict[str, Any]:
        """Return numbers about the placement, the shards and the traffic; return {} before the first placement."""
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
        """Return the ids of the shards whose stream is down or that are no longer in the store.

        An open stream does not prove that a shard works: a process that hangs keeps its stream open until it is called.
        """
        return {*self.experts.down, *self._follower.gone}

    def _shard_states(self, placement: Placement) -> dict[str, str]:
        """Return the state of each shard of the placement, by shard id: unreachable, draining, loading or live."""
        unreachable = self._unreachable

        def state(shard: Shard) -> str:
            if shard.id in unreachable:
                return "unreachable"
            if shard.draining:
                return "draining"
            return "live" if shard.held_digest == self._expected_digests[shard.id] else "loading"

        return {id: state(self._shard(id)) for id in placement.shard_ids}

    def _update_coverage(self, placement: Placement) -> CoverageReport:
        """Return the coverage of the placement; only shards that serve their experts now count as live.

        A shard that is loading or dropping experts counts as live. Such a shard may hold more experts than the
        placement says, but never fewer. A shard loads new experts before the new placement is published, and keeps old
        experts as long as the published placement names these experts.
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
        """Return one dict for each shard of the placement, sorted by shard id; the dicts are a part of the status."""
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
        """Return the shard `shard_id`, with empty fields if the shard never registered since this backbone started."""
        never_seen = Shard(shard_id, endpoint="", node="", pool="", device="", incarnation="", memory_budget=0)
        return self._follower.shards.get(shard_id) or never_seen


class LoadReporter:
    """A `LoadReporter` adds a backbone's counts of picks to the load store once a second, and averages these counts.

    `rates` maps each layer to the picks per second of its experts (E,), averaged over about ten reports.
    """

    def __init__(self, picks: LoadCounter, loads: LoadStore) -> None:
        self._picks, self._loads = picks, loads
        self.rates: dict[int, NDArray[np.float64]] = {}

    async def run(self) -> None:
        """Report the counts every FLUSH_PERIOD_S seconds; add counts that could not be sent to the next report."""
        while True:
            await asyncio.sleep(FLUSH_PERIOD_S)
            taken = self._picks.take()
            self._update_rates(taken)
            try:
                await self._loads.add(taken, time.time())
                self._picks.mark_sent()
            except StoreUnavailable as error:
                log.warning("The expert load could not be sent and is added to the next report: %s", error)
                self._picks.merge(taken)
            except Exception:
                log.exception("The expert load of the last second could not be sent and is lost.")

    def _update_rates(self, taken: Mapping[int, NDArray[np.int64]]) -> None:
        for layer in {*self.rates, *taken}:
            old, new = self.rates.get(layer, 0.0), taken.get(layer, 0)
            self.rates[layer] = np.asarray(RATE_KEPT * old + (1 - RATE_KEPT) * new / FLUSH_PERIOD_S)


class CoverageMonitor:
    """A `CoverageMonitor` tracks which experts are below full cover, and for how long there have been such experts.

    The coverage is computed again only if the placement or the live shards have changed. `expert_bytes` is the size of
    one expert in bytes, by layer.
    """

    def __init__(self, expert_bytes: Mapping[int, int]) -> None:
        self._expert_bytes = expert_bytes
        self._report: CoverageReport | None = None
        self._repair = Repair()

    def update(self, placement: Placement, live: Collection[str], now: float) -> CoverageReport:
        """Return the coverage of a placement if only the shards whose ids are in `live` serve their experts.

        The caller must call this method whenever the placement or the live shards may have changed. `now` is in seconds
        since 1970.
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
        """Return numbers about coverage and balance for health checks, metrics and `expertmesh status`.

        - `coverage`: the result of the last call of `update`.
        - `rates`: the picks per second of each expert, by layer.
        - `now`: the time in seconds since 1970.
        """
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
        # The loss of a shard is noticed when the shard's heartbeat expires. Then the missing bytes are loaded, at the
        # rate that the planner assumes.
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
