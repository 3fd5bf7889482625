"""The `VirtualLoop` is an event loop whose clock jumps to the next scheduled callback.

Hours of virtual time pass in seconds, and a program that draws its random numbers from a seed runs the same way each
time.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from heapq import heappop, heappush
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(RuntimeError):
    """No callback is scheduled, so the remaining tasks would wait for ever."""


class VirtualLoop(asyncio.BaseEventLoop):
    """A `VirtualLoop` runs callbacks in the order of their times, and in the order of scheduling at equal times.

    The loop has no sockets and no threads. The methods that asyncio calls most often are replaced by short versions,
    because asyncio's own methods took half of a simulation's time.
    """

    _ready: deque[asyncio.Handle]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._later: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heappush(self._later, (when, next(self._numbers), handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def _run_once(self) -> None:
        ready, later = self._ready, self._later
        while not ready:
            if not later:
                raise Stuck("no callback is scheduled, and the main coroutine has not ended")
            self._now = max(self._now, later[0][0])
            while later and later[0][0] <= self._now:
                _, _, handle = heappop(later)
                if not handle.cancelled():
                    ready.append(handle)
        for _ in range(len(ready)):
            handle_now = ready.popleft()
            if not handle_now.cancelled():
                handle_now._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing, because `_run_once` skips a cancelled handle when the handle is due."""

    def _write_to_self(self) -> None:
        """Do nothing, because no other thread adds callbacks for which the loop must wake up."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` as `asyncio.run` does, but in virtual time; return its result and cancel the remaining tasks."""
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
