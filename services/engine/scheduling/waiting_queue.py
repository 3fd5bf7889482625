"""The `WaitingQueue` limits and sorts the requests that wait for their start, and estimates the waiting time."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, replace

from services.engine.contract.errors import EngineOverloaded
from services.engine.request import Request, serving_order

AGEING_S = 10.0  # seconds of waiting that lower the priority number by 1, so that no request waits for ever
RATE_KEPT = 0.99  # factor by which older counts of starts and seconds are multiplied at each step
MAX_RETRY_AFTER = 60  # largest number of seconds that a refused client is asked to wait before it retries
HEAD_START = 1 << 62  # larger than any count of arrivals, so that resumed requests come before new requests


class WaitingQueue:
    """A `WaitingQueue` holds the requests that wait for their start, in the order in which the requests are served.

    At most `max_waiting` new requests wait. Resumed and preempted requests were accepted earlier and are never refused.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._requests: list[Request] = []
        self._num_added = 0
        self._start_rate = StartRate()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, place: int) -> Request:
        return self._requests[place]

    @property
    def overload(self) -> EngineOverloaded | None:
        """Return the error with which `add` would refuse a new request now, or None if `add` would accept it."""
        if len(self) < self.max_waiting:
            return None
        sentence = f"{len(self)} requests are waiting, which is the most this server queues."
        return EngineOverloaded(sentence, self.retry_after)

    @property
    def retry_after(self) -> int:
        """Return the expected seconds until half of the waiting requests have started, at the recent start rate."""
        return self._start_rate.retry_after(len(self))

    def add(self, request: Request, now: float) -> None:
        """Queue a request that has just arrived; raise EngineOverloaded if `max_waiting` requests wait already.

        A resumed request comes before all new requests of its level, and is accepted even if the queue is full. So the
        queue may be longer than `max_waiting`, but at most by the number of requests that lost engines had accepted.
        """
        if (overload := self.overload) and not request.is_resumed:
            raise overload
        self._num_added += 1
        request.arrival = self._num_added - (HEAD_START if request.is_resumed else 0)
        self.put_back(request, now)

    def put_back(self, request: Request, now: float) -> None:
        """Queue a preempted request again; its position in the queue follows from its level and its first arrival."""
        request.waiting_since = now
        insort(self._requests, request, key=serving_order)

    def start(self, request: Request, now: float) -> None:
        """Remove a request that starts, and add the time in the queue to the request's `waited_s`."""
        self.remove(request)
        request.waited_s += now - request.waiting_since

    def remove(self, request: Request) -> None:
        """Remove a request that ends while it still waits, for example because the client has disconnected."""
        self._requests.remove(request)

    def age(self, now: float) -> None:
        """Compute the level of every waiting request from the request's total waiting time, and sort the queue again.

        The level of a running request does not change.
        """
        for request in self._requests:
            waited_s = request.waited_s + now - request.waiting_since
            request.level = request.params.priority - int(waited_s / AGEING_S)
        self._requests.sort(key=serving_order)

    def note_step(self, num_started: int, seconds: float) -> None:
        """Update the start rate with a step that took `seconds` and started `num_started` requests."""
        self._start_rate = self._start_rate.after_step(num_started, seconds)


@dataclass(frozen=True)
class StartRate:
    """A `StartRate` says how many requests started in how many seconds; older steps have less weight."""

    num_starts: float = 0.0
    seconds: float = 0.0

    def after_step(self, num_started: int, seconds: float) -> StartRate:
        """Return the start rate after one more step."""
        return replace(
            self, num_starts=RATE_KEPT * self.num_starts + num_started, seconds=RATE_KEPT * self.seconds + seconds
        )

    def retry_after(self, num_waiting: int) -> int:
        """Return the expected seconds until half of `num_waiting` requests have started: 1 to MAX_RETRY_AFTER."""
        seconds = num_waiting / 2 * self.seconds / max(self.num_starts, 1e-6)
        return max(1, min(MAX_RETRY_AFTER, math.ceil(seconds)))
