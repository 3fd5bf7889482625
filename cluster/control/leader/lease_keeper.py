"""The `LeaseKeeper` acquires, renews and releases the lease that makes one controller the leader."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from cluster.control.registry_store import LEASE_TTL_S, Lease, RegistryStore, StoreUnavailable

log = logging.getLogger(__name__)

# A leader loses its lease if a turn lasts longer than this time in seconds, because the leader may be stuck.
MAX_TURN_S = 60.0


class LeaseKeeper:
    """A `LeaseKeeper` keeps the lease of one controller; `lease` is None while the controller does not lead.

    `clock` gives seconds since 1970.
    """

    def __init__(self, owner: str, registry: RegistryStore, clock: Callable[[], float]) -> None:
        self.owner, self.registry, self.clock = owner, registry, clock
        self.lease: Lease | None = None
        self._turn_began = 0.0

    @property
    def fencing(self) -> int:
        """Return the fencing token of the lease; the controller must hold the lease."""
        assert self.lease is not None
        return self.lease.fencing

    def begin_turn(self) -> None:
        """Record that a turn begins now; the turn may last MAX_TURN_S seconds."""
        self._turn_began = self.clock()

    async def renew(self) -> bool:
        """Renew the lease; return False if this controller does not hold the lease.

        May raise StoreUnavailable.
        """
        return self.lease is not None and await self.registry.renew_lease(self.lease)

    async def acquire(self) -> bool:
        """Try to acquire a new lease; return True if this controller leads now.

        May raise StoreUnavailable.
        """
        self.lease = await self.registry.acquire_lease(self.owner)
        if self.lease is not None:
            log.info("%s leads, with token %d.", self.owner, self.lease.fencing)
        return self.lease is not None

    async def renew_during_long_turns(self) -> None:
        """Renew the lease until cancelled, so that a turn may last longer than the lease.

        In a fleet with a thousand shards, a turn lasts longer than the lease. If the lease is lost nevertheless, the
        next turn notices the loss.
        """
        while True:
            await asyncio.sleep(LEASE_TTL_S / 3)
            if self.lease is not None and self.clock() - self._turn_began < MAX_TURN_S:
                with suppress(StoreUnavailable):
                    await self.registry.renew_lease(self.lease)

    async def release(self) -> None:
        """Release the lease, so that another controller can lead at once."""
        if self.lease is not None:
            with suppress(StoreUnavailable):
                await self.registry.release_lease(self.lease)
