"""An event loop whose clock jumps to whatever is next: hours in seconds, and the same again for the same seed."""

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
    """Everything waits for something that will never happen."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in the order of their times and, at one time, in the order they were scheduled. No sockets, no
    threads.

    What a loop does most is replaced by the little of it that is needed here: it took half of a simulation's time.
    """

    _ready: deque[asyncio.Handle]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._later: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
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
                raise Stuck("nothing is scheduled, and nothing is done")
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
        """It is passed over when its time has come."""

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
