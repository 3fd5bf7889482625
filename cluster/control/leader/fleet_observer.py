"""The `FleetObserver` tells the leader which experts each shard holds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.control.shard_control import ShardControl, ShardFailed
from cluster.placement.migration import Holding
from cluster.topology import Shard

log = logging.getLogger(__name__)

MAX_ANSWER_S = 5.0  # Maximum seconds that shards have to answer; `GrpcShards` gives up a call after the same time.
FADING = 0.9  # After each answer, this share of the time of earlier, slower answers still counts.


@dataclass(frozen=True)
class _Observation:
    """An `_Observation` is what a shard answered when the leader asked for its experts.

    `incarnation` and `digest` (the held digest) come from the record with which the shard was asked.
    """

    incarnation: str
    digest: str
    holding: Holding

    def is_current(self, shard: Shard) -> bool:
        """Return True if the record `shard` has the same incarnation and held digest as the observation."""
        return (self.incarnation, self.digest) == (shard.incarnation, shard.held_digest)


class FleetObserver:
    """A `FleetObserver` knows which experts each shard holds, from the shard's last answer.

    The observer asks a shard again only if the shard's experts may have changed. The observer asks several shards at
    the same time. `timeout_s` is the time in seconds that shards usually have to answer.

    If answers come late, shards get more time, up to MAX_ANSWER_S. Otherwise a leader on a busy machine would never get
    the answers of all shards in time, and would never publish a placement. A shard that does not answer at all does not
    prolong the time.
    """

    def __init__(self, shards: ShardControl, timeout_s: float) -> None:
        self.shards, self.timeout_s = shards, timeout_s
        self._observations: dict[str, _Observation] = {}
        self._changed: set[str] = set()  # Ids of shards to ask again even if the held digest is the same.
        self._slowest_s = 0.0  # The time in seconds of the slowest answer; earlier answers count less and less.

    @property
    def answer_s(self) -> float:
        """Return the time in seconds that shards have to answer now: twice the time of the slowest answer if needed."""
        return min(MAX_ANSWER_S, max(self.timeout_s, 2 * self._slowest_s))

    def expect_change(self, shard_id: str) -> None:
        """Make the next turn ask the shard again, because a job on the shard has ended."""
        self._changed.add(shard_id)

    async def holdings(self, known: Mapping[str, Shard]) -> dict[str, Holding]:
        """Return the experts of each known shard; ask only the shards whose experts may have changed.

        If a shard does not answer, the shard's last answer still counts: only missing heartbeats show that a shard is
        dead. A shard that has not answered since its process started is left out.
        """
        self._observations = {
            id: seen
            for id, seen in self._observations.items()
            if id in known and seen.incarnation == known[id].incarnation
        }
        outdated = [shard for id, shard in sorted(known.items()) if self._is_outdated(shard)]
        self._changed.clear()
        answers = await self.ask(outdated)
        self._changed |= {shard.id for shard in outdated} - answers.keys()
        return {id: seen.holding for id, seen in self._observations.items()}

    def _is_outdated(self, shard: Shard) -> bool:
        seen = self._observations.get(shard.id)
        return seen is None or shard.id in self._changed or not seen.is_current(shard)

    async def ask(self, shards: Sequence[Shard]) -> dict[str, Holding]:
        """Ask `shards` which experts they hold now; return the answers that arrive within `answer_s`, by shard id.

        An answer that comes later is not returned, but counts for `holdings`.
        """
        tasks = {shard.id: asyncio.ensure_future(self._ask_one(shard)) for shard in shards}
        if tasks:
            await asyncio.wait(tasks.values(), timeout=self.answer_s)
        answers = {id: task.result() if task.done() else None for id, task in tasks.items()}
        return {id: holding for id, holding in answers.items() if holding is not None}

    async def _ask_one(self, shard: Shard) -> Holding | None:
        clock = asyncio.get_running_loop().time
        asked_at = clock()
        try:
            holding = await self.shards.holding(shard)
        except ShardFailed as error:
            log.warning("Shard %s does not say what it holds: %s", shard.id, error)
            return None
        self._slowest_s = max(clock() - asked_at, FADING * self._slowest_s)
        self._observations[shard.id] = _Observation(shard.incarnation, shard.held_digest, holding)
        return holding
