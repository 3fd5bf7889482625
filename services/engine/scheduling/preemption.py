"""`choose_preempted` chooses the running requests to preempt for a newcomer, and changes nothing itself.

The newcomer is a waiting request of strictly higher priority. The rules:

- Only strictly lower priorities are preempted. Otherwise two requests could preempt each other in turn.
- Requests are preempted only if the newcomer then starts in the same step, so that no work is thrown away in vain.
- Time spent waiting protects a request, but is never the reason to preempt another one. A running request is preempted
  only if both its priority number and its level are above the newcomer's. So a running request that had waited until
  its level was as good as the newcomer's goes on, and a newcomer cannot preempt by having waited long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from services.engine.request import Request


@dataclass(frozen=True)
class Shortage:
    """A `Shortage` says what a waiting request lacks in order to start; 0 or less means that nothing is lacking."""

    num_slots: int
    num_pages: int
    num_tokens: int  # of the step's token budget

    @property
    def is_over(self) -> bool:
        """Return True if nothing is lacking."""
        return max(self.num_slots, self.num_pages, self.num_tokens) <= 0


def preemption_candidates(request: Request, running: Sequence[Request]) -> list[Request]:
    """Return the running requests that `request` may preempt, the first to be preempted first.

    `running` is in serving order, so the candidates come in the reverse of it.
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
    """Return the fewest candidates, taken in their order, that together end the shortage.

    Return an empty list if all candidates together are not enough, or if only the token budget is short: the budget is
    shared (`Scheduler._share`) and is there again in the next step.

    - `planned`: tokens of this step's budget that each candidate would use.
    - `num_users(page)`: how many running requests use the page.
    - `reused`: pages that the newcomer starts with; freeing them does not help it.
    """
    if shortage.num_slots <= 0 and shortage.num_pages <= 0:
        return []
    num_leaving: Counter[int] = Counter()  # by page: how many of the preempted requests use the page
    num_pages, num_tokens = 0, 0
    for count, other in enumerate(candidates, 1):
        num_leaving.update(other.block_table)
        # 1 more: each running request has a page in reserve to grow into (`Scheduler._shortage`).
        num_pages += 1 + sum(num_users(page) == num_leaving[page] and page not in reused for page in other.block_table)
        num_tokens += planned.get(other, 0)
        rest = Shortage(shortage.num_slots - count, shortage.num_pages - num_pages, shortage.num_tokens - num_tokens)
        if rest.is_over:
            return list(candidates[:count])
    return []
