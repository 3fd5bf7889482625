"""Which home of an expert computes which rows of a batch: one decision per message to the shards, so it must be quick.

Legend: E experts of the layer, P picks (one row sent to one expert), S shards that are a home of something.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CallCost:
    """What makes a shard slow, in microseconds: a queued call, an expert's weights, one row, one more message."""

    queued: float = 200.0
    expert: float = 20.0
    row: float = 1.0
    message: float = 200.0

    @property
    def max_piece(self) -> int:
        """Rows of one expert that are worth keeping together: their arithmetic costs what reading the weights does."""
        return max(1, int(self.expert / self.row))


class NoLiveHome(LookupError):
    """Some experts have no home that may be asked; `experts` lists them."""

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__(f"The experts {list(experts)} have no live home among the shards of the placement.")
        self.experts = tuple(experts)


class HomeTable:
    """The homes of one layer with shards as small numbers: `shard_ids[i]` is shard i. Made once per placement."""

    def __init__(self, homes: Sequence[Sequence[str]]) -> None:
        self.shard_ids = tuple(sorted({id for ids in homes for id in ids}))
        index = {id: i for i, id in enumerate(self.shard_ids)}
        self.homes = tuple(tuple(index[id] for id in ids) for ids in homes)

    def live_homes(self, experts: Sequence[int], excluded: Collection[str]) -> list[tuple[int, ...]]:
        """The homes of each of `experts` that are not excluded; NoLiveHome if one of them has none."""
        homes = [self.homes[expert] for expert in experts]
        if excluded:
            homes = [tuple(h for h in ids if self.shard_ids[h] not in excluded) for ids in homes]
        if not all(homes):
            raise NoLiveHome([expert for expert, ids in zip(experts, homes, strict=True) if not ids])
        return homes


def choose_homes(
    expert_P: NDArray[np.integer],
    homes: HomeTable,
    queue_depth: Mapping[str, int],
    excluded: Collection[str] = (),
    cost: CallCost = CallCost(),
) -> NDArray[np.intp]:
    """The home of each pick, as an index into `homes.shard_ids`; raises NoLiveHome.

    Experts go to the home that would be done first, those without a choice before the others and big ones before small
    ones. The rows of one expert stay together unless it has more than `cost.max_piece` of them.
    """
    counts_E = np.bincount(expert_P, minlength=len(homes.homes))
    experts: list[int] = counts_E.nonzero()[0].tolist()
    num_rows: list[int] = counts_E[experts].tolist()
    options = homes.live_homes(experts, excluded)
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
