"""Requests that wait: who of them is next, and for how long."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from services.engine.request import Request

AGEING_S = 10.0  # of waiting count as one number less of priority, so that nobody waits for ever
RATE_KEPT = 0.99  # of the measured starts per second, from one step to the next
MAX_RETRY_AFTER = 60


def begin_to_wait(request: Request, now: float) -> None:
    request.waiting_since = now


def age(waiting: Iterable[Request], now: float) -> None:
    """Sets the level of those that wait, by all the time they ever waited; it stays while they run."""
    for request in waiting:
        waited_s = request.waited_s + now - request.waiting_since
        request.level = request.params.priority - int(waited_s / AGEING_S)


def end_to_wait(request: Request, now: float) -> None:
    request.waited_s += now - request.waiting_since


@dataclass(frozen=True)
class StartRate:
    """Requests that started, and the seconds that this took; older ones fade."""

    num_starts: float = 0.0
    seconds: float = 0.0

    def after_step(self, num_started: int, seconds: float) -> StartRate:
        return replace(
            self, num_starts=RATE_KEPT * self.num_starts + num_started, seconds=RATE_KEPT * self.seconds + seconds
        )

    def retry_after(self, num_waiting: int) -> int:
        """Seconds in which half of those that wait will have started: 1 to MAX_RETRY_AFTER."""
        seconds = num_waiting / 2 * self.seconds / max(self.num_starts, 1e-6)
        return max(1, min(MAX_RETRY_AFTER, math.ceil(seconds)))
