"""The picks of a call sorted into messages: one for each home, or several where it gets many rows.

Legend: P picks of the call (the picks of a row stand together), K picks a row, Q picks to send, S shards, M messages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


class Grouped(NamedTuple):
    """Message m takes the picks `pick_Q[first_M[m] : first_M[m + 1]]`, in the order of their rows."""

    pick_Q: NDArray[np.int64]
    first_M: list[int]  # one more than there are messages
    shard_M: list[int]
    num_rows_M: list[int]
    num_experts_M: list[int]  # distinct ones


def group(
    pick_Q: NDArray[np.int64],
    home_Q: NDArray[np.int64],
    expert_P: NDArray[np.int64],
    top_k: int,
    num_shards: int,
    num_experts: int,
    max_rows: int,
) -> Grouped:
    """Messages of at most `max_rows` rows for picks (ascending) that go to the shards `home_Q`."""
    sorted_Q, numbers = _group(pick_Q, home_Q, expert_P, top_k, num_shards, num_experts, max_rows)
    firsts, *columns = numbers.tolist()
    firsts.append(len(pick_Q))
    return Grouped(sorted_Q, firsts, *columns)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _group(
    pick_Q: Any, home_Q: Any, expert_P: Any, top_k: Any, num_shards: Any, num_experts: Any, max_rows: Any
) -> Any:
    num_picks = len(pick_Q)
    place_S = np.zeros(num_shards + 1, np.int64)
    for q in range(num_picks):
        place_S[home_Q[q] + 1] += 1
    place_S = np.cumsum(place_S)
    sorted_Q, shard_Q = np.empty(num_picks, np.int64), np.empty(num_picks, np.int64)
    for q in range(num_picks):
        place = place_S[home_Q[q]]
        sorted_Q[place], shard_Q[place] = pick_Q[q], home_Q[q]
        place_S[home_Q[q]] += 1
    seen_by_E = np.full(num_experts, -1, np.int64)  # the last message that an expert was seen in
    numbers = np.zeros((4, num_picks), np.int64)  # first pick, shard, rows, experts
    num_messages, last_row = 0, -1
    for q in range(num_picks):
        row, current = sorted_Q[q] // top_k, num_messages - 1
        is_new_row = row != last_row
        if q == 0 or shard_Q[q] != numbers[1, current] or (is_new_row and numbers[2, current] == max_rows):
            current = num_messages
            num_messages += 1
            numbers[0, current], numbers[1, current] = q, shard_Q[q]
            is_new_row = True
        numbers[2, current] += is_new_row
        last_row = row
        expert = expert_P[sorted_Q[q]]
        if seen_by_E[expert] != current:
            seen_by_E[expert] = current
            numbers[3, current] += 1
    return sorted_Q, numbers[:, :num_messages].copy()
