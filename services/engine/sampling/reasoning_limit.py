"""A `ReasoningLimit` ends the reasoning of a request's answer when the request's `ThinkingBudget` is used up."""

from __future__ import annotations

from collections.abc import Sequence

from services.engine.contract.sampling_params import ThinkingBudget
from services.engine.request import Request


class ReasoningLimit:
    """A `ReasoningLimit` says with which token a request must continue when its reasoning budget is used up.

    The token depends only on the request's tokens, so an engine that continues another engine's answer gets the same.
    """

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._start, self._marker = _sets(budget.start_ids), _sets(budget.end_ids)
        self._blank = frozenset(budget.blank_ids)
        self._num_searched = 0  # generated tokens that were searched for the marker, or that are blank
        self._first: int | None = None if self._start else 0  # generated tokens before the reasoning; None: not known
        self._has_ended = False  # True: the reasoning has ended, or the answer has none

    def forced_id(self, request: Request, ahead: Sequence[int]) -> int | None:
        """Return the only id that may follow the request's tokens and the drafts in `ahead`; None if any id may."""
        if self._has_ended or self._ends_in_new_tokens(request):
            return None
        first = self._first
        if first is None:
            first = self._find_start([*self._generated(request, self._num_searched), *ahead], self._num_searched)[0]
        if first is None or request.num_generated + len(ahead) - first < self._budget.max_tokens:
            return None
        last = max(first, request.num_generated - (len(self._marker) - 1))
        tail = [*self._generated(request, last), *ahead][max(0, last - request.num_generated) :]
        if self._occurs_in(tail):
            return None
        lens = range(min(len(tail), len(self._marker) - 1), 0, -1)
        num_written = next((n for n in lens if _is_begun(tail[-n:], self._marker)), 0)
        return self._budget.end_ids[num_written][0]

    def _ends_in_new_tokens(self, request: Request) -> bool:
        if request.num_generated <= self._num_searched:
            return False
        if self._first is None:
            self._first, num_blank, self._has_ended = self._find_start(
                self._generated(request, self._num_searched), self._num_searched
            )
            self._num_searched = num_blank if self._first is None else self._first
        if self._first is not None:
            last = max(self._first, self._num_searched - (len(self._marker) - 1))
            self._has_ended = self._occurs_in(self._generated(request, last))
            self._num_searched = request.num_generated
        return self._has_ended

    def _find_start(self, token_ids: Sequence[int], num_before: int) -> tuple[int | None, int, bool]:
        """Find the marker that opens the reasoning in `token_ids`, which follow the first `num_before` (blank) tokens.

        Return the number of tokens of the answer up to the marker's end (None: there is no whole marker), the number of
        blank tokens, and True if the answer begins with another text.
        """
        num_blank = next((n for n, token_id in enumerate(token_ids) if token_id not in self._blank), len(token_ids))
        head = token_ids[num_blank : num_blank + len(self._start)]
        if not _is_begun(head, self._start):
            return None, num_before + num_blank, True
        first = num_before + num_blank + len(head) if len(head) == len(self._start) else None
        return first, num_before + num_blank, False

    def _generated(self, request: Request, first: int) -> list[int]:
        """Return the generated tokens after the first `first` of them."""
        return request.token_ids[request.num_prompt_tokens + first :]

    def _occurs_in(self, token_ids: Sequence[int]) -> bool:
        size, last_ids = len(self._marker), self._marker[-1]
        ends = [end for end, token_id in enumerate(token_ids, 1) if token_id in last_ids and end >= size]
        return any(_is_begun(token_ids[end - size : end], self._marker) for end in ends)


def _sets(marker: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    return [frozenset(ids) for ids in marker]


def _is_begun(token_ids: Sequence[int], marker: Sequence[frozenset[int]]) -> bool:
    """Return True if `token_ids` are the first tokens of `marker`, or all of its tokens."""
    return all(token_id in ids for token_id, ids in zip(token_ids, marker, strict=False))
