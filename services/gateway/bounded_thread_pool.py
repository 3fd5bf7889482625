"""A `BoundedThreadPool` runs long work in threads, so that the work does not block the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from services.engine.contract.errors import EngineOverloaded

NUM_THREADS = 4  # calls that run at the same time
MAX_OPEN = 256  # maximum number of calls that run or wait; as many requests may wait in the engine

P = ParamSpec("P")
T = TypeVar("T")


class BoundedThreadPool:
    """A `BoundedThreadPool` runs functions in threads and refuses calls when too many calls run or wait.

    asyncio's default thread pool is not used, because any number of calls may wait in its queue.
    """

    def __init__(self, num_threads: int = NUM_THREADS, max_open: int = MAX_OPEN) -> None:
        self._executor = ThreadPoolExecutor(num_threads, "gateway")
        self._lock, self._num_open, self._max_open = threading.Lock(), 0, max_open

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in a thread, and return its result or raise its exception.

        Raises EngineOverloaded if `max_open` other calls run or wait. If the caller is cancelled while the call waits,
        the call leaves the queue. A call that already runs counts as open until it ends, because a thread cannot be
        interrupted.
        """
        with self._lock:
            if self._num_open >= self._max_open:
                raise EngineOverloaded(
                    f"{self._num_open} requests are being tokenized or checked, which is the maximum; try again later."
                )
            self._num_open += 1
        future = self._executor.submit(function, *args, **kwargs)
        future.add_done_callback(self._close)
        return await asyncio.wrap_future(future)

    async def run_if(self, is_long: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` and return its result; if `is_long` is True, the call runs in a thread as in `run`.

        A long call in the event loop's own thread would block the event loop, and a short call takes less time than the
        way to a thread and back.
        """
        return await self.run(function, *args, **kwargs) if is_long else function(*args, **kwargs)

    def _close(self, _: object) -> None:
        with self._lock:
            self._num_open -= 1
