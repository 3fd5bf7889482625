"""An event loop whose clock jumps to whatever is next: hours in seconds, and the same again for the same seed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(RuntimeError):
    """Everything waits for something that will never happen."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in the order of their times and, at one time, in the order they were scheduled. No sockets, no
    threads. It poses as its own selector, which is where a loop waits."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = self

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("nothing is scheduled, and nothing is done")
        self._now += timeout
        return []

    def _process_events(self, events: list[Any]) -> None:
        assert not events

    def _write_to_self(self) -> None:
        """Nobody else can wake it."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Like `asyncio.run`, in virtual time; tasks left over are cancelled."""
    loop = VirtualLoop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main)
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        asyncio.set_event_loop(None)
        loop.close()
