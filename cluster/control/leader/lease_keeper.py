"""The lease that makes one controller the leader: how a controller acquires, renews and releases it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from cluster.control.registry_store import LEASE_TTL_S, Lease, RegistryStore, StoreUnavailable

log = logging.getLogger(__name__)

MAX_TURN_S = 60.0  # A leader whose turn lasts longer than this loses its lease: it may be stuck.


class LeaseKeeper:
    """A `LeaseKeeper` holds one controller's lease, if the controller has one. `clock` gives seconds since 1970."""

    def __init__(self, owner: str, registry: RegistryStore, clock: Callable[[], float]) -> None:
        self.owner, self.registry, self.clock = owner, registry, clock
        self.lease: Lease | None = None
        self._turn_began = 0.0

    @property
    def fencing(self) -> int:
        """Return the lease's fencing token; only the leader has one."""
        assert self.lease is not None
        return self.lease.fencing

    def begin_turn(self) -> None:
        """Note that a turn begins now, from which MAX_TURN_S counts."""
        self._turn_began = self.clock()

    async def renew(self) -> bool:
        """Renew the lease; return False if this controller has none or has lost it. May raise StoreUnavailable."""
        return self.lease is not None and await self.registry.renew_lease(self.lease)

    async def acquire(self) -> bool:
        """Try to acquire a new lease; return whether this controller leads now. May raise StoreUnavailable."""
        self.lease = await self.registry.acquire_lease(self.owner)
        if self.lease is not None:
            log.info("%s leads, with token %d.", self.owner, self.lease.fencing)
        return self.lease is not None

    async def renew_during_long_turns(self) -> None:
        """Renew the lease until cancelled, also within turns that outlast it, as with a thousand shards.

        The next turn finds out whether the lease was lost meanwhile.
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
