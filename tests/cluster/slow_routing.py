"""The choice of homes in plain Python: what `cluster.routing` does with one compiled function."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from cluster.routing import CallCost, HomeTable


def choose_homes(
    expert_P: NDArray[np.integer],
    homes: HomeTable,
    queue_depth: Mapping[str, int],
    excluded: Collection[str],
    cost: CallCost,
) -> NDArray[np.intp]:
    """The home of each pick, as an index into `homes.shard_ids`.

    Experts go to the home that would be done first, those without a choice before the others and big ones before small
    ones. The rows of one expert stay together unless it has more than `cost.max_piece` of them.
    """
    counts_E = np.bincount(expert_P, minlength=len(homes.homes))
    experts: list[int] = counts_E.nonzero()[0].tolist()
    num_rows: list[int] = counts_E[experts].tolist()
    options = [tuple(h for h in homes.homes[e] if homes.shard_ids[h] not in excluded) for e in experts]
    order = sorted(range(len(experts)), key=lambda i: (len(options[i]) > 1, -num_rows[i]))

    filling = _Filling([queue_depth.get(id, 0) * cost.queued for id in homes.shard_ids], cost)
    home_E = np.zeros(len(homes.homes), dtype=np.intp)
    split: list[tuple[int, list[int]]] = []
    for i in order:
        pieces = filling.add(options[i], num_rows[i])
        home_E[experts[i]] = pieces[0]
        if len(set(pieces)) > 1:
            split.append((experts[i], pieces))

    home_P: NDArray[np.intp] = home_E[expert_P]
    for expert, pieces in split:
        piece_of_row = np.arange(counts_E[expert]) // cost.max_piece
        home_P[expert_P == expert] = np.array(pieces)[piece_of_row]
    return home_P


class _Filling:
    """How long each shard will take, as experts are given to it."""

    def __init__(self, busy: list[float], cost: CallCost) -> None:
        self.busy = busy
        self.is_called = [False] * len(busy)
        self.cost = cost

    def add(self, options: tuple[int, ...], num_rows: int) -> list[int]:
        """Gives out the rows of one expert piece by piece; returns the home of each piece."""
        if len(options) == 1 or num_rows <= self.cost.max_piece:
            return [self._give(options, num_rows, ())] * -(-num_rows // self.cost.max_piece)
        pieces: list[int] = []
        for start in range(0, num_rows, self.cost.max_piece):
            pieces.append(self._give(options, min(self.cost.max_piece, num_rows - start), pieces))
        return sorted(pieces)

    def _give(self, options: tuple[int, ...], num_rows: int, holding: Collection[int]) -> int:
        home, least = options[0], float("inf")
        for option in options:
            # A message costs the caller, not the shard: it counts in the choice, not in how busy the shard is.
            extra = (0.0 if self.is_called[option] else self.cost.message) + (option not in holding) * self.cost.expert
            if self.busy[option] + extra < least:
                home, least = option, self.busy[option] + extra
        self.busy[home] += num_rows * self.cost.row + (home not in holding) * self.cost.expert
        self.is_called[home] = True
        return home
