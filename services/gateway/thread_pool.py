"""Long work beside the event loop, as much at once as the machine bears and a bounded line before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from services.engine.contract.errors import EngineOverloaded

NUM_THREADS = 4
MAX_OPEN = 256  # as many as the engine lets wait

P = ParamSpec("P")
T = TypeVar("T")


class BoundedThreadPool:
    """BoundedThreads of their own, because asyncio's line before its default ones has no end."""

    def __init__(self, num_threads: int = NUM_THREADS, max_open: int = MAX_OPEN) -> None:
        self._executor = ThreadPoolExecutor(num_threads, "gateway")
        self._lock, self._num_open, self._max_open = threading.Lock(), 0, max_open

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns or raises; EngineOverloaded where `max_open` others run or wait.

        Cancelled, it leaves the line; what already runs keeps its place until it ends.
        """
        with self._lock:
            if self._num_open >= self._max_open:
                raise EngineOverloaded(
                    f"{self._num_open} requests are being tokenized or checked, which is the most at a time."
                )
            self._num_open += 1
        future = self._executor.submit(function, *args, **kwargs)
        future.add_done_callback(self._close)
        return await asyncio.wrap_future(future)

    def _close(self, _: object) -> None:
        with self._lock:
            self._num_open -= 1
