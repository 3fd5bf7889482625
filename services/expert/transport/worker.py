"""A `Worker` is the thread of a shard that computes, so that the event loop stays free.

Between two jobs the thread serves sockets. A request that this thread reads itself is computed and answered without
waking another thread.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
OnReady = Callable[[int], None]  # the argument is READ, WRITE or READ | WRITE
READ, WRITE = select.POLLIN, select.POLLOUT


class Worker:
    """A `Worker` runs jobs one after the other on a separate thread.

    Jobs and the functions that watch sockets should not raise. If one does, the error is logged and the thread goes on,
    because the thread serves all clients. `run` and `idle` belong to an event loop; any thread may call the other
    methods.
    """

    def __init__(self, max_depth: int, name: str) -> None:
        self.max_depth = max_depth
        self._jobs: deque[Callable[[], object] | None] = deque()
        self._busy_since: float | None = None  # start of the current job; None between jobs
        # The thread polls without the `selectors` module, which takes longer than the system call itself.
        self._poll: Any = select.epoll() if hasattr(select, "epoll") else select.poll()
        self._watched: dict[int, tuple[OnReady, int]] = {}  # by file descriptor of the socket
        self._waking, self._woken = socket.socketpair()
        self._waking.setblocking(False)
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.watch(self._woken, self._drain)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Return the number of jobs that were accepted and are not finished yet."""
        return len(self._jobs) + (self._busy_since is not None)

    @property
    def is_full(self) -> bool:
        return self.depth >= self.max_depth

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy_s(self) -> float:
        """Return for how many seconds the current job has been running; 0 between jobs."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def watch(self, tcp_socket: socket.socket, on_ready: OnReady, events: int = READ) -> None:
        """Call `on_ready` on the worker's thread whenever the socket is ready for `events`."""
        self._watched[tcp_socket.fileno()] = on_ready, events
        self._poll.register(tcp_socket, events)
        self._wake()  # a `poll` that has already begun does not watch the new socket

    def watch_for(self, tcp_socket: socket.socket, events: int) -> None:
        """Change the events for which a socket is watched."""
        on_ready, before = self._watched[tcp_socket.fileno()]
        if before != events:
            self._watched[tcp_socket.fileno()] = on_ready, events
            self._poll.modify(tcp_socket, events)

    def forget(self, tcp_socket: socket.socket) -> None:
        """Stop watching a socket, if the socket is watched."""
        with suppress(KeyError, ValueError):  # a worker that was closed watches nothing
            del self._watched[tcp_socket.fileno()]
            self._poll.unregister(tcp_socket)

    def submit(self, job: Callable[[], object]) -> None:
        """Accept a job, even if the worker is full.

        Callers check `is_full` before they submit a job that another shard can do as well.
        """
        self._jobs.append(job)
        self._wake()

    async def run(self, function: Callable[[], T]) -> T:
        """Run `function` between two jobs and return its result, or raise the exception that the function raised."""
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
        """Wait until every job that was accepted so far is finished."""
        await self.run(lambda: None)

    def close(self) -> None:
        """Finish the accepted jobs and end the thread."""
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
            with suppress(BlockingIOError):  # the socket is full, which wakes the worker as well
                self._waking.send(b"\0")

    def _drain(self, _: int) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)

    def _work(self) -> None:
        while True:
            for file, events in self._poll.poll(0 if self._jobs else None):
                if watched := self._watched.get(file):
                    try:
                        watched[0](events & (READ | WRITE) or READ)  # after an error, reading raises the error
                    except Exception:
                        log.exception("The worker failed to serve a socket.")
            if not self._jobs:
                continue
            if (job := self._jobs.popleft()) is None:
                return
            self._busy_since = time.monotonic()
            try:
                job()
            except Exception:
                log.exception("A job of the worker failed.")
            self._busy_since = None


def _settle(future: asyncio.Future[T], setter: Callable[[T], None], value: T) -> None:
    if not future.done():  # the caller may have been cancelled meanwhile
        setter(value)
