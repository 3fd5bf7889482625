"""The `DecisionLog` writes the leader's decisions to the registry, where the admin API reads them for operators."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

from cluster.control.registry_store import RegistryStore, StoreUnavailable

log = logging.getLogger(__name__)


class DecisionLog:
    """A `DecisionLog` adds decisions to the registry, each with its time and its author.

    `clock` gives seconds since 1970.
    """

    def __init__(self, author: str, registry: RegistryStore, clock: Callable[[], float]) -> None:
        self.author, self.registry, self.clock = author, registry, clock

    async def add(self, decision: Mapping[str, str]) -> None:
        """Write `decision` to the log of this process and to the registry's log of decisions.

        If the store does not answer, the registry gets no entry.
        """
        log.info("Decided: %s", decision)
        with suppress(StoreUnavailable):
            await self.registry.note_decision({"at": f"{self.clock():.3f}", "by": self.author, **decision})
