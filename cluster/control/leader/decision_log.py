"""The leader's part of the registry's log of decisions, which operators read through the admin API."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

from cluster.control.registry_store import RegistryStore, StoreUnavailable

log = logging.getLogger(__name__)


class DecisionLog:
    """A `DecisionLog` adds decisions to the registry with their time and author. `clock` gives seconds since 1970."""

    def __init__(self, author: str, registry: RegistryStore, clock: Callable[[], float]) -> None:
        self.author, self.registry, self.clock = author, registry, clock

    async def add(self, decision: Mapping[str, str]) -> None:
        """Log `decision` and store it in the registry; a store that does not answer loses the entry."""
        log.info("Decided: %s", decision)
        with suppress(StoreUnavailable):
            await self.registry.note_decision({"at": f"{self.clock():.3f}", "by": self.author, **decision})
