"""A `Follower` keeps a backbone up to date with the placement and the shards.

A follower asks the registry now and then. While the registry does not answer, the backbone runs on what it last read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from cluster.control.registry_store import RegistryStore, StalePlacement
from cluster.topology import Placement, Shard

log = logging.getLogger(__name__)

# Answers of the registry in a row without a shard, after which the shard counts as gone. A store that came back empty
# hears the heartbeats of all live shards within fewer answers.
MAX_MISSED = 8

Adopt = Callable[[Placement, Iterable[Shard]], None]


class Follower:
    """A `Follower` keeps the newest placement that it has read, and the newest record of each shard.

    A store that has lost the placement gets the follower's placement back, because backbones run on that placement
    whether there is a controller or not.

    - `name`: the backbone's name in the registry.
    - `model`: the checkpoint's digest; a placement for another checkpoint is not followed.
    - `adopt`: receives the placement and the shards after each reading.
    """

    def __init__(self, name: str, model: str, registry: RegistryStore, adopt: Adopt) -> None:
        self.name, self.model, self.registry = name, model, registry
        self.placement: Placement | None = None
        self.shards: dict[str, Shard] = {}
        self._num_missed: dict[str, int] = {}  # The registry's answers in a row without each shard of the placement.
        self._adopt = adopt

    @property
    def gone(self) -> Collection[str]:
        """Return the shards of the placement that were missing from the last `MAX_MISSED` answers of the registry."""
        return [id for id, num_missed in self._num_missed.items() if num_missed >= MAX_MISSED]

    @property
    def epoch(self) -> int:
        """Return the epoch that is followed, or 0 if there is none."""
        return self.placement.epoch if self.placement else 0

    async def refresh(self) -> bool:
        """Read the placement and the shards, and report the followed epoch; return whether there is a placement.

        Raises StoreUnavailable; then the follower keeps what it read before.
        """
        epoch, shards = await self.registry.epoch(), await self.registry.shards()
        if epoch > self.epoch and (stored := await self.registry.placement()) and stored.model == self.model:
            self.placement = stored if stored.epoch > self.epoch else self.placement
        elif epoch == 0 and self.placement is not None:
            await self._give_back(self.placement)
        if self.placement is None:
            return False
        # A store that came back empty lacks live shards. A missing shard is kept; its stream shows whether it is alive.
        homes = set(self.placement.shard_ids)
        self.shards = {id: shard for id, shard in self.shards.items() if id in homes}
        self.shards |= {shard.id: shard for shard in shards}
        listed = {shard.id for shard in shards}
        self._num_missed = {id: self._num_missed.get(id, 0) + 1 for id in homes if id not in listed}
        self._adopt(self.placement, self.shards.values())
        await self.registry.follow(self.name, self.epoch)
        return True

    async def leave(self) -> None:
        """Delete this backbone's entry in the registry. Raises StoreUnavailable."""
        await self.registry.unfollow(self.name)

    async def _give_back(self, placement: Placement) -> None:
        try:
            await self.registry.publish(placement, expected_epoch=0, fencing=0)
            log.warning("The store had lost the placement and got epoch %d back.", placement.epoch)
        except StalePlacement:
            pass  # Another backbone or a controller was faster.
