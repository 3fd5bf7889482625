"""A `Follower` keeps a backbone up to date with the placement and the shards.

A follower reads the registry periodically. While the registry does not answer, the backbone continues with the
placement and the shards that the follower read last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from cluster.control.registry_store import RegistryStore, StalePlacement
from cluster.topology import Placement, Shard

log = logging.getLogger(__name__)

# A shard counts as gone if this number of consecutive registry answers did not contain the shard. If the store has lost
# its data, all live shards send a heartbeat before that many answers have come.
MAX_MISSED = 8

Adopt = Callable[[Placement, Iterable[Shard]], None]


class Follower:
    """A `Follower` keeps the newest placement that it has read, and the newest record of each shard.

    If the store has lost the placement, the follower publishes its copy of the placement again. No controller is needed
    for this: backbones use the placement even if there is no controller.

    - `name`: the backbone's name in the registry.
    - `model`: the checkpoint's digest; the follower ignores a placement for another checkpoint.
    - `adopt`: a callback that receives the placement and the shards each time the follower has read the registry.
    """

    def __init__(self, name: str, model: str, registry: RegistryStore, adopt: Adopt) -> None:
        self.name, self.model, self.registry = name, model, registry
        self.placement: Placement | None = None
        self.shards: dict[str, Shard] = {}
        self._num_missed: dict[str, int] = {}  # By shard id: consecutive answers without the shard.
        self._adopt = adopt

    @property
    def gone(self) -> Collection[str]:
        """Return the ids of the shards in the placement that were in none of the last `MAX_MISSED` registry answers."""
        return [id for id, num_missed in self._num_missed.items() if num_missed >= MAX_MISSED]

    @property
    def epoch(self) -> int:
        """Return the epoch of the placement that the backbone follows, or 0 if there is no placement."""
        return self.placement.epoch if self.placement else 0

    async def refresh(self) -> bool:
        """Read the placement and the shards from the registry, then report the followed epoch to the registry.

        Returns True if there is a placement to follow. If the method raises StoreUnavailable, the follower keeps the
        placement and the shards that it read before.
        """
        epoch, shards = await self.registry.epoch(), await self.registry.shards()
        if epoch > self.epoch and (stored := await self.registry.placement()) and stored.model == self.model:
            self.placement = stored if stored.epoch > self.epoch else self.placement
        elif epoch == 0 and self.placement is not None:
            await self._give_back(self.placement)
        if self.placement is None:
            return False
        # After the store has lost its data, live shards may be missing. The follower keeps the record of a missing
        # shard, because the stream to the shard shows whether the shard is alive.
        homes = set(self.placement.shard_ids)
        self.shards = {id: shard for id, shard in self.shards.items() if id in homes}
        self.shards |= {shard.id: shard for shard in shards}
        listed = {shard.id for shard in shards}
        self._num_missed = {id: self._num_missed.get(id, 0) + 1 for id in homes if id not in listed}
        self._adopt(self.placement, self.shards.values())
        await self.registry.follow(self.name, self.epoch)
        return True

    async def leave(self) -> None:
        """Delete this backbone's entry in the registry; may raise StoreUnavailable."""
        await self.registry.unfollow(self.name)

    async def _give_back(self, placement: Placement) -> None:
        try:
            await self.registry.publish(placement, expected_epoch=0, fencing=0)
            log.warning("The store had lost the placement and got epoch %d back.", placement.epoch)
        except StalePlacement:
            pass  # Another backbone or a controller has published a placement first.
