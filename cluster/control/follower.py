"""How a backbone keeps up with the placement and the shards: it asks once in a while, and needs nobody's answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from cluster.control.registry_store import RegistryStore, StalePlacement
from cluster.topology import Placement, Shard

log = logging.getLogger(__name__)

MAX_MISSED = 8  # answers: a store that came back empty hears of every shard within so many

Adopt = Callable[[Placement, Iterable[Shard]], None]


class Follower:
    """Knows the newest placement that it has seen, and every shard that it has seen alive.

    A store that has lost the placement gets it back: backbones run on it, whether there is a controller or not.
    """

    def __init__(self, name: str, model: str, registry: RegistryStore, adopt: Adopt) -> None:
        self.name, self.model, self.registry = name, model, registry
        self.placement: Placement | None = None
        self.shards: dict[str, Shard] = {}
        self._num_missed: dict[str, int] = {}  # of each shard, the store's answers in a row without it
        self._adopt = adopt

    @property
    def gone(self) -> Collection[str]:
        """The shards of the placement that the store, whenever it answered lately, did not know as alive."""
        return [id for id, num_missed in self._num_missed.items() if num_missed >= MAX_MISSED]

    @property
    def epoch(self) -> int:
        return self.placement.epoch if self.placement else 0

    async def refresh(self) -> bool:
        """Takes what is new and says what it follows; whether there is a placement. Raises StoreUnavailable, after
        which everything is as before."""
        epoch, shards = await self.registry.epoch(), await self.registry.shards()
        if epoch > self.epoch and (stored := await self.registry.placement()) and stored.model == self.model:
            self.placement = stored if stored.epoch > self.epoch else self.placement
        elif epoch == 0 and self.placement is not None:
            await self._give_back(self.placement)
        if self.placement is None:
            return False
        # A shard that is missing from a store that came back empty may well be alive: its stream will tell.
        homes = set(self.placement.shard_ids)
        self.shards = {id: shard for id, shard in self.shards.items() if id in homes}
        self.shards |= {shard.id: shard for shard in shards}
        there = {shard.id for shard in shards}
        self._num_missed = {id: self._num_missed.get(id, 0) + 1 for id in homes if id not in there}
        self._adopt(self.placement, self.shards.values())
        await self.registry.follow(self.name, self.epoch)
        return True

    async def leave(self) -> None:
        await self.registry.unfollow(self.name)

    async def _give_back(self, placement: Placement) -> None:
        try:
            await self.registry.publish(placement, expected_epoch=0, fencing=0)
            log.warning("The store had lost the placement and got epoch %d back.", placement.epoch)
        except StalePlacement:
            pass  # somebody was faster
