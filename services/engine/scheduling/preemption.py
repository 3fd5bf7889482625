"""`choose_preempted` chooses the running requests that are preempted so that a waiting request can start.

The waiting request is called the newcomer. The function only chooses; the scheduler preempts. The rules:

- A running request is preempted only if its priority is strictly lower than the newcomer's priority. Otherwise two
  requests could preempt each other again and again.
- Requests are preempted only if the newcomer can then start in the same step. Otherwise the preempted requests would
  lose their work for nothing.
- Time spent waiting can protect a running request, but cannot help a newcomer to preempt. Waiting lowers the level of a
  request, but not its priority number. A running request is preempted only if its number and its level are both higher
  than the newcomer's. A request that waited long before its start has a low level, which protects it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from services.engine.request import Request


@dataclass(frozen=True)
class Shortage:
    """A `Shortage` says how many slots, pages and tokens a waiting request lacks; 0 or less means enough."""

    num_slots: int
    num_pages: int
    num_tokens: int  # tokens of the step's token budget

    @property
    def is_over(self) -> bool:
        """Return True if the waiting request lacks neither slots nor pages nor tokens."""
        return max(self.num_slots, self.num_pages, self.num_tokens) <= 0


def preemption_candidates(request: Request, running: Sequence[Request]) -> list[Request]:
    """Return the running requests that `request` may preempt, in the order in which the requests are preempted.

    `running` is in serving order. The result is in reverse serving order.
    """
    return [
        other
        for other in reversed(running)
        if other.params.priority > request.params.priority and other.level > request.level
    ]


def choose_preempted(
    candidates: Sequence[Request],
    shortage: Shortage,
    planned: Mapping[Request, int],
    num_users: Callable[[int], int],
    reused: Collection[int],
) -> list[Request]:
    """Return the first candidates, as few as possible, whose preemption together ends the shortage.

    Return an empty list if preempting all candidates would not end the shortage. Also return an empty list if only
    tokens of the step's budget are lacking: the next step has a new budget, which requests share (`Scheduler._share`).

    - `planned`: number of tokens of this step's budget that each candidate would use.
    - `num_users(page)`: number of running requests that use the page.
    - `reused`: pages of the prefix with which the newcomer starts. Freeing these pages does not help the newcomer.
    """
    if shortage.num_slots <= 0 and shortage.num_pages <= 0:
        return []
    num_leaving: Counter[int] = Counter()  # by page: number of preempted requests that use the page
    num_pages, num_tokens = 0, 0
    for count, other in enumerate(candidates, 1):
        num_leaving.update(other.block_table)
        # Add 1, because `Scheduler._shortage` reserves one page for each running request to grow into.
        num_pages += 1 + sum(num_users(page) == num_leaving[page] and page not in reused for page in other.block_table)
        num_tokens += planned.get(other, 0)
        rest = Shortage(shortage.num_slots - count, shortage.num_pages - num_pages, shortage.num_tokens - num_tokens)
        if rest.is_over:
            return list(candidates[:count])
    return []
