"""The thread that computes, so that the event loop stays free; between two jobs it serves sockets of its own.

A message that it reads itself is computed and answered without waking another thread.
"""

from __future__ import annotations

import asyncio
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
OnReady = Callable[[int], None]  # gets READ, WRITE or both
READ, WRITE = select.POLLIN, select.POLLOUT


class Worker:
    """Runs jobs one after the other on a thread of its own; jobs and what watches sockets must not raise.

    `depth` counts jobs accepted and not yet finished. `run` belongs to an event loop, the rest to any thread.
    """

    def __init__(self, max_depth: int, name: str) -> None:
        self.max_depth = max_depth
        self._jobs: deque[Callable[[], object] | None] = deque()
        self._busy_since: float | None = None  # None between jobs
        # Not `selectors`, which takes longer than the system call.
        self._poll: Any = select.epoll() if hasattr(select, "epoll") else select.poll()
        self._watched: dict[int, tuple[OnReady, int]] = {}  # by file descriptor
        self._waking, self._woken = socket.socketpair()
        self._waking.setblocking(False)
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.watch(self._woken, self._drain)
        self._thread.start()

    @property
    def depth(self) -> int:
        return len(self._jobs) + (self._busy_since is not None)

    @property
    def is_full(self) -> bool:
        return self.depth >= self.max_depth

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy_s(self) -> float:
        """For how long it has been at one job; 0 between jobs."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def watch(self, connection: socket.socket, on_ready: OnReady, events: int = READ) -> None:
        """Calls `on_ready` on the worker's thread whenever the socket is ready for `events`."""
        self._watched[connection.fileno()] = on_ready, events
        self._poll.register(connection, events)
        self._wake()  # a `poll` under way does not know of it

    def watch_for(self, connection: socket.socket, events: int) -> None:
        """Changes what a watched socket is watched for."""
        on_ready, before = self._watched[connection.fileno()]
        if before != events:
            self._watched[connection.fileno()] = on_ready, events
            self._poll.modify(connection, events)

    def forget(self, connection: socket.socket) -> None:
        with suppress(KeyError, ValueError):  # a worker that has ended watches nothing
            del self._watched[connection.fileno()]
            self._poll.unregister(connection)

    def submit(self, job: Callable[[], object]) -> None:
        """Takes a job, over the bound too: callers ask `is_full` before jobs that others may take as well."""
        self._jobs.append(job)
        self._wake()

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
        self._jobs.append(None)
        self._wake()
        self._thread.join()
        self._watched.clear()
        if hasattr(self._poll, "close"):
            self._poll.close()
        self._waking.close()
        self._woken.close()

    def _wake(self) -> None:
        if threading.get_ident() != self._thread.ident:
            with suppress(BlockingIOError):  # it has enough to wake up for already
                self._waking.send(b"\0")

    def _drain(self, _: int) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)

    def _work(self) -> None:
        while True:
            for file, events in self._poll.poll(0 if self._jobs else None):
                if watched := self._watched.get(file):
                    watched[0](events & (READ | WRITE) or READ)  # an error is found by reading
            if not self._jobs:
                continue
            if (job := self._jobs.popleft()) is None:
                return
            self._busy_since = time.monotonic()
            job()
            self._busy_since = None


def _settle(future: asyncio.Future[T], setter: Callable[[T], None], value: T) -> None:
    if not future.done():  # the caller may have been cancelled
        setter(value)
