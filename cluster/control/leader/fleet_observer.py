"""What the leader knows of the experts that each shard holds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.control.shard_control import ShardControl, ShardFailed
from cluster.placement.migration import Holding
from cluster.topology import Shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Observation:
    """What a shard answered, and the incarnation and the digest of its record at that time."""

    incarnation: str
    digest: str
    holding: Holding

    def is_current(self, shard: Shard) -> bool:
        return (self.incarnation, self.digest) == (shard.incarnation, shard.held_digest)


class FleetObserver:
    """A `FleetObserver` keeps every shard's last answer, and asks a shard again only when it may hold something else.

    `timeout_s` is how long shards have to answer; all are asked at once.
    """

    def __init__(self, shards: ShardControl, timeout_s: float) -> None:
        self.shards, self.timeout_s = shards, timeout_s
        self._observations: dict[str, _Observation] = {}
        self._changed: set[str] = set()  # Shards to ask again although their digest may be the same.

    def expect_change(self, shard_id: str) -> None:
        """Ask this shard again at the next turn, because work on it has ended."""
        self._changed.add(shard_id)

    async def holdings(self, known: Mapping[str, Shard]) -> dict[str, Holding]:
        """Return what each known shard holds; ask again where the digest has changed.

        A shard that does not answer is taken to hold what it held before: its heartbeat, not its silence here, says
        whether it is alive. A shard that has never answered is left out.
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
        """Return what the shards hold at this moment; those that do not answer in time are left out."""
        tasks = {shard.id: asyncio.ensure_future(self._ask_one(shard)) for shard in shards}
        if tasks:
            await asyncio.wait(tasks.values(), timeout=self.timeout_s)
        answers = {id: task.result() if task.done() else None for id, task in tasks.items()}
        return {id: holding for id, holding in answers.items() if holding is not None}

    async def _ask_one(self, shard: Shard) -> Holding | None:
        try:
            holding = await self.shards.holding(shard)
        except ShardFailed as error:
            log.warning("Shard %s does not say what it holds: %s", shard.id, error)
            return None
        self._observations[shard.id] = _Observation(shard.incarnation, shard.held_digest, holding)
        return holding
