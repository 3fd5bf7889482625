"""Which running requests make way for a waiting one of strictly higher priority. Touches nothing.

Strictly, so that nobody is preempted by a request that it could preempt in turn, and only where the newcomer then
starts in the same step, so that no work is thrown away for nothing. Waiting protects and never attacks: who waited so
long that it is level with the newcomer goes on, but nobody is preempted for what another gained by waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from services.engine.request import Request


@dataclass(frozen=True)
class Shortage:
    """What a waiting request misses to start, `num_tokens` of the step's budget; nothing where 0 or below."""

    num_slots: int
    num_pages: int
    num_tokens: int

    @property
    def is_over(self) -> bool:
        return max(self.num_slots, self.num_pages, self.num_tokens) <= 0


def lower_ones(request: Request, running: Sequence[Request]) -> list[Request]:
    """Running requests, in the order in which they are served, that `request` may preempt: the first to go first."""
    return [
        other
        for other in reversed(running)
        if other.params.priority > request.params.priority and other.level > request.level
    ]


def make_way(
    lower: Sequence[Request],
    lack: Shortage,
    planned: Mapping[Request, int],
    num_users: Callable[[int], int],
    reused: Collection[int],
) -> list[Request]:
    """The first of `lower` that are enough to end the lack; none if all are not, or if only the budget is missing,
    which is shared (`Scheduler._share`) and there again in the next step.

    `planned`: tokens of the budget that each would take in this step. `num_users`: of a page. `reused`: the pages that
    the newcomer starts with, which are no use to it beyond that.
    """
    if lack.num_slots <= 0 and lack.num_pages <= 0:
        return []
    left: Counter[int] = Counter()  # by page: how many of those that go use it
    num_pages, num_tokens = 0, 0
    for count, other in enumerate(lower, 1):
        left.update(other.block_table)
        num_pages += 1 + sum(num_users(page) == left[page] and page not in reused for page in other.block_table)
        num_tokens += planned.get(other, 0)
        if Shortage(lack.num_slots - count, lack.num_pages - num_pages, lack.num_tokens - num_tokens).is_over:
            return list(lower[:count])
    return []
