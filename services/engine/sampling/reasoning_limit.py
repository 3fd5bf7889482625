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
        self._marker = [frozenset(ids) for ids in budget.end_ids]
        self._num_searched = 0  # generated tokens that were searched for the marker
        self._has_ended = False

    def forced_id(self, request: Request, ahead: Sequence[int]) -> int | None:
        """Return the only id that may follow the request's tokens and the drafts in `ahead`; None if any id may."""
        if self._has_ended or self._ends_in_new_tokens(request):
            return None
        if request.num_generated + len(ahead) < self._budget.max_tokens:
            return None
        tail = [*self._from(request, request.num_generated), *ahead]
        if self._occurs_in(tail):
            return None
        lens = range(min(len(tail), len(self._marker) - 1), 0, -1)
        num_written = next((n for n in lens if self._is_begun(tail[-n:])), 0)
        return self._budget.end_ids[num_written][0]

    def _ends_in_new_tokens(self, request: Request) -> bool:
        if request.num_generated > self._num_searched:
            self._has_ended = self._occurs_in(self._from(request, self._num_searched))
            self._num_searched = request.num_generated
        return self._has_ended

    def _from(self, request: Request, num_generated: int) -> list[int]:
        """Return the tokens after the first `num_generated`, preceded by tokens in which a marker may have begun."""
        first = max(0, num_generated - (len(self._marker) - 1))
        return request.token_ids[request.num_prompt_tokens + first :]

    def _occurs_in(self, token_ids: Sequence[int]) -> bool:
        size, last_ids = len(self._marker), self._marker[-1]
        ends = [end for end, token_id in enumerate(token_ids, 1) if token_id in last_ids and end >= size]
        return any(self._is_begun(token_ids[end - size : end]) for end in ends)

    def _is_begun(self, token_ids: Sequence[int]) -> bool:
        """Return True if `token_ids` are the first tokens of the marker, or all of its tokens."""
        return all(token_id in ids for token_id, ids in zip(token_ids, self._marker, strict=False))
