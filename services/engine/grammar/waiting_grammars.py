"""A `WaitingGrammars` decides the order in which grammars get the places that check or compile grammars.

The time that a grammar takes is not known before the grammar is compiled, but short texts almost always take
milliseconds. So short grammars go first. Long grammars do not starve: a grammar of n characters gives way to a shorter
grammar only if the shorter grammar arrives less than n * `SECONDS_PER_CHAR` seconds later, and at most
`MAX_SECONDS_LATER` seconds later.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from typing import Generic, TypeVar

SECONDS_PER_CHAR = 0.001
MAX_SECONDS_LATER = 5.0
SMALL_CHARS = 512  # a grammar with at most so many characters is small

T = TypeVar("T")


class WaitingGrammars(Generic[T]):
    """A `WaitingGrammars` holds the grammars that wait for one kind of place, each with an item of the caller.

    The class is not safe for several threads; the caller holds a lock.
    """

    def __init__(self) -> None:
        self._small: list[tuple[float, int, T]] = []  # heaps of rank, number of arrival, and item
        self._large: list[tuple[float, int, T]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._small) + len(self._large)

    def add(self, item: T, num_chars: int, now: float) -> None:
        """Add the item of a grammar with `num_chars` characters, which arrives at the time `now` in seconds."""
        rank = now + min(num_chars * SECONDS_PER_CHAR, MAX_SECONDS_LATER)
        heapq.heappush(self._small if num_chars <= SMALL_CHARS else self._large, (rank, next(self._numbers), item))

    def pop(self) -> T | None:
        """Remove and return the item that is next, or return None if no grammar waits."""
        heaps = [heap for heap in (self._small, self._large) if heap]
        return heapq.heappop(min(heaps, key=lambda heap: heap[0][:2]))[2] if heaps else None

    def pop_small(self) -> T | None:
        """Remove and return the item of the small grammar that is next, or return None if no small grammar waits."""
        return heapq.heappop(self._small)[2] if self._small else None

    def pop_all(self) -> Iterator[T]:
        """Remove and yield all items in order."""
        while (item := self.pop()) is not None:
            yield item
