"""A `SimProcess` is a simulated process, which can be killed, stopped and resumed."""

from __future__ import annotations

import asyncio


class InvariantViolated(AssertionError):
    """A condition that must always hold in a fleet did not hold."""


class SimProcess:
    """A `SimProcess` is a process of a simulated fleet: it is up or dead, and while it is up it may be stopped."""

    def __init__(self, name: str) -> None:
        self.name, self.is_up = name, True
        self.died_at = 0.0
        self.slowness = 1.0
        self._running = asyncio.Event()
        self._running.set()

    @property
    def is_stopped(self) -> bool:
        """Return True if the process is stopped."""
        return not self._running.is_set()

    def stop(self) -> None:
        """Stop the process, as SIGSTOP does; the process does nothing until `resume` is called."""
        self._running.clear()

    def resume(self) -> None:
        """Let the process go on after `stop`."""
        self._running.set()

    async def wait_until_running(self) -> None:
        """Wait until the process is resumed; return at once if the process is not stopped."""
        if not self._running.is_set():
            await self._running.wait()
