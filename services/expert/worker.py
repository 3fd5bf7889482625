"""The thread that computes, so that the event loop stays free to read, refuse and answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """Runs jobs one after the other on a thread of its own; jobs must not raise.

    `depth` counts jobs accepted and not yet finished. `submit` and `run` belong to one thread, the event loop's.
    """

    def __init__(self, max_depth: int, name: str) -> None:
        self.max_depth = max_depth
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._num_accepted = 0  # written by the caller only
        self._num_finished = 0  # written by the thread only
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        return self._num_accepted - self._num_finished

    @property
    def is_full(self) -> bool:
        return self.depth >= self.max_depth

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Callable[[], object]) -> None:
        """Takes a job, over the bound too: callers ask `is_full` before jobs that others may take as well."""
        self._num_accepted += 1
        self._jobs.put(job)

    async def run(self, function: Callable[[], T]) -> T:
        """Runs `function` between two jobs and returns its result, or raises what it raised."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def job() -> None:
            try:
                outcome, setter = function(), future.set_result
            except Exception as error:
                loop.call_soon_threadsafe(_settle, future, future.set_exception, error)
            else:
                loop.call_soon_threadsafe(_settle, future, setter, outcome)

        self.submit(job)
        result: T = await future
        return result

    async def idle(self) -> None:
        """Returns when everything accepted so far is finished."""
        await self.run(lambda: None)

    def close(self) -> None:
        """Finishes what was accepted and ends the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            self._num_finished += 1


def _settle(future: asyncio.Future[T], setter: Callable[[T], None], value: T) -> None:
    if not future.done():  # the caller may have been cancelled
        setter(value)
