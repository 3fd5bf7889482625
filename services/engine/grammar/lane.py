"""A `Lane` lets few threads at a time check grammars, in the order of `WaitingGrammars`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from services.engine.grammar.waiting_grammars import WaitingGrammars


class Lane:
    """A `Lane` has `num_places` places, and gives each check in the lane `seconds` seconds of processor time.

    A thread that leaves its place hands the place to the next waiting thread. A semaphore would not do, because a
    thread that comes back at once could take its place again before any waiting thread wakes up.
    """

    def __init__(self, num_places: int, seconds: float) -> None:
        self.seconds = seconds
        self._num_free, self._lock = num_places, threading.Lock()
        self._waiting: WaitingGrammars[threading.Event] = WaitingGrammars()

    def __len__(self) -> int:
        """Return the number of threads that wait."""
        return len(self._waiting)

    @contextmanager
    def place(self, num_chars: int) -> Iterator[None]:
        """Wait for a place for a grammar with `num_chars` characters, and hold the place."""
        turn = threading.Event()
        with self._lock:
            self._waiting.add(turn, num_chars, time.monotonic())
            self._start_more()
        turn.wait()
        try:
            yield
        finally:
            with self._lock:
                self._num_free += 1
                self._start_more()

    def _start_more(self) -> None:
        while self._num_free and (turn := self._waiting.pop()):
            self._num_free -= 1
            turn.set()
