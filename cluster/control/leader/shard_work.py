"""The `ShardWork` runs the leader's loads and drops on shards, and records which homes are verified."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.control.leader.fleet_observer import FleetObserver
from cluster.control.leader.published_placement import PublishedPlacement
from cluster.control.shard_control import ShardControl, ShardFailed, WitnessFailed
from cluster.placement.migration import DEVICE, STANDBY, Home, by_shard
from cluster.topology import Experts, Placement, Shard

log = logging.getLogger(__name__)


@dataclass
class _VerifiedHomes:
    """A `_VerifiedHomes` records which homes on a shard this leader has loaded and verified.

    The record is valid for one incarnation of the shard.
    """

    incarnation: str
    homes: set[Home] = field(default_factory=set)


class ShardWork:
    """A `ShardWork` runs one job at a time on each shard: a load with its canary, or a drop.

    - `observer`: is told when a job has ended, because the shard's experts may have changed.
    - `published`: gives the epoch and the fencing token for orders, and the present homes, which can be witnesses.
    - `clock`: gives seconds since 1970.
    - `pause_s`: the seconds without loads on a shard after a job on the shard has failed.
    """

    def __init__(
        self,
        shards: ShardControl,
        observer: FleetObserver,
        published: PublishedPlacement,
        clock: Callable[[], float],
        pause_s: float,
    ) -> None:
        self.shards, self.observer, self.published = shards, observer, published
        self.clock, self.pause_s = clock, pause_s
        self.gains: dict[int, int] = {}  # The largest gain exponent that any load has reported, by layer.
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._verified: dict[str, _VerifiedHomes] = {}
        self._paused_until: dict[str, float] = {}

    def forget_verified(self) -> None:
        """Forget which homes are verified, because a new leader verifies all homes again."""
        self._verified = {}

    def cancel(self) -> None:
        """Cancel all jobs; a shard may still carry out an order that it has received."""
        for job in self._jobs.values():
            job.cancel()

    def verified_on(self, shard: Shard) -> set[Home]:
        """Return the homes that have been loaded and verified on `shard` since its process started.

        Homes of an earlier incarnation do not count.
        """
        verified = self._verified.get(shard.id)
        return verified.homes if verified and verified.incarnation == shard.incarnation else set()

    def start_drops(self, known: Mapping[str, Shard], homes: Iterable[Home]) -> None:
        """Start a drop on each shard that has homes in `homes`; skip shards that already have a job."""
        for id, on_shard in sorted(_grouped(homes).items()):
            self._start(known[id], self._drop(known[id], on_shard))

    def start_loads(self, known: Mapping[str, Shard], homes: Iterable[Home]) -> None:
        """Start a load on each shard that has homes in `homes`.

        The method skips shards that already have a job, and shards on which a job failed less than `pause_s` seconds
        ago.
        """
        now = self.clock()
        self._paused_until = {id: until for id, until in self._paused_until.items() if until > now}
        for id, on_shard in sorted(_grouped(homes).items()):
            if id not in self._paused_until:
                self._start(known[id], self._load(known, known[id], on_shard))

    def _start(self, shard: Shard, job: Coroutine[Any, Any, None]) -> None:
        self._jobs = {id: task for id, task in self._jobs.items() if not task.done()}
        if shard.id in self._jobs:
            job.close()
        else:
            self._jobs[shard.id] = asyncio.create_task(self._guarded(shard, job))

    async def _guarded(self, shard: Shard, job: Awaitable[None]) -> None:
        try:
            await job
        except ShardFailed as error:
            log.warning("Shard %s loads nothing for %.0f s: %s", shard.id, self.pause_s, error)
            self._paused_until[shard.id] = self.clock() + self.pause_s
        finally:
            self.observer.expect_change(shard.id)

    async def _drop(self, shard: Shard, homes: set[Home]) -> None:
        self.verified_on(shard).difference_update(homes)
        device, standby = _experts_of(shard.id, homes)
        await self.shards.drop(shard, device, standby, self.published.order)

    async def _load(self, known: Mapping[str, Shard], shard: Shard, homes: set[Home]) -> None:
        """Load `homes` on `shard`, run the canary against the witnesses, and record the homes as verified.

        If `shard` and a witness compute different sums for an expert, `shard` drops the expert, and ShardFailed is
        raised.
        """
        device, standby = _experts_of(shard.id, homes)
        gains = await self.shards.load(shard, device, standby, self.published.order)
        for layer, gain in gains.items():
            self.gains[layer] = max(gain, self.gains.get(layer, gain))
        for witness_id, experts in witnesses(self.published.placement, known, shard.id, homes).items():
            try:
                different = await self.shards.disagreements(known[witness_id], shard, experts)
            except WitnessFailed as error:
                log.warning("No comparison of %s with %s: %s", shard.id, witness_id, error)
                continue
            if different:
                await self.shards.drop(shard, different, {}, self.published.order)
                raise ShardFailed(f"it computes the experts {different} (by layer) otherwise than {witness_id}")
        verified = self._verified.get(shard.id)
        if verified is None or verified.incarnation != shard.incarnation:
            verified = self._verified[shard.id] = _VerifiedHomes(shard.incarnation)
        verified.homes |= homes


def witnesses(
    placement: Placement | None, known: Mapping[str, Shard], shard_id: str, homes: Iterable[Home]
) -> dict[str, Experts]:
    """Choose witnesses for the new `homes` on the shard `shard_id`; return each witness's experts by layer.

    The witness of a home in device memory is the first known shard that is another home of the expert in `placement`. A
    home has no witness if its expert has no other home on a known shard. A standby never has a witness.
    """
    if placement is None:
        return {}
    chosen = set()
    for home in homes:
        others = [id for id in placement.homes[home.layer][home.expert] if id in known and id != shard_id]
        if home.tier == DEVICE and others:
            chosen.add(Home(home.layer, home.expert, others[0]))
    return dict(by_shard(chosen, DEVICE))


def _grouped(homes: Iterable[Home]) -> dict[str, set[Home]]:
    by_id: dict[str, set[Home]] = {}
    for home in homes:
        by_id.setdefault(home.shard_id, set()).add(home)
    return by_id


def _experts_of(shard_id: str, homes: Iterable[Home]) -> tuple[Experts, Experts]:
    """Return the shard's experts in `homes` as a pair, each by layer: (in device memory, standbys)."""
    device, standby = (by_shard(homes, tier).get(shard_id, {}) for tier in (DEVICE, STANDBY))
    return device, standby
