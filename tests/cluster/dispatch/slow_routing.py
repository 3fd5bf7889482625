"""`choose_homes` chooses homes in plain Python; tests compare it with the compiled `cluster.dispatch.routing`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.home_choice import CallCost
from cluster.dispatch.routing import RELIEF, HomeTable

Given = dict[int, dict[int, int]]  # number of rows by expert and home, the homes in the order of preference


def choose_homes(
    expert_P: NDArray[np.integer],
    homes: HomeTable,
    queue_depth: Mapping[str, int],
    excluded: Collection[str],
    cost: CallCost,
) -> NDArray[np.intp]:
    """Return the home of each pick as an index into `homes.shard_ids`.

    Each expert goes to the home that would finish first. Experts with one possible home are assigned before experts
    with several, and experts with many rows before experts with few. The rows of one expert stay together unless the
    expert has more than `cost.max_piece` rows. The slowest shard then passes on rows of split experts, where possible.
    """
    counts_E = np.bincount(expert_P, minlength=len(homes.homes)).tolist()
    options = {
        expert: [home for home in homes.homes[expert] if homes.shard_ids[home] not in excluded]
        for expert, count in enumerate(counts_E)
        if count
    }
    filling = _Filling([queue_depth.get(id, 0) * cost.queued for id in homes.shard_ids], cost)
    for expert in sorted(options, key=lambda expert: (len(options[expert]) > 1, -counts_E[expert])):
        filling.add(expert, options[expert], counts_E[expert])
    filling.relieve([e for e in sorted(options) if len(options[e]) > 1 and counts_E[e] > cost.max_piece])
    home_of_row = {
        expert: iter([home for home, num_rows in by_home.items() for _ in range(num_rows)])
        for expert, by_home in filling.given.items()
    }
    return np.array([next(home_of_row[expert]) for expert in expert_P.tolist()], np.intp)


class _Filling:
    """A `_Filling` says how long each shard will take, while experts are assigned to shards one after the other."""

    def __init__(self, busy: list[float], cost: CallCost) -> None:
        self.busy = busy
        self.is_called = [False] * len(busy)
        self.cost = cost
        self.given: Given = {}

    def add(self, expert: int, options: Sequence[int], num_rows: int) -> None:
        """Assign the rows of one expert piece by piece."""
        self.given[expert] = dict.fromkeys(options, 0)
        piece = num_rows if len(options) == 1 else self.cost.max_piece
        for start in range(0, num_rows, piece):
            self._give(expert, min(piece, num_rows - start))

    def _give(self, expert: int, num_rows: int) -> None:
        # A message costs time at the caller, not at the shard: its cost counts here, but not in `busy`.
        home = min(
            self.given[expert],
            key=lambda home: self.busy[home] + (not self.is_called[home]) * self.cost.message + self.new(expert, home),
        )
        self.busy[home] += num_rows * self.cost.row + self.new(expert, home)
        self.given[expert][home] += num_rows
        self.is_called[home] = True

    def new(self, expert: int, home: int) -> float:
        return 0.0 if self.given[expert][home] else self.cost.expert

    def relieve(self, experts: Sequence[int]) -> None:
        """Move rows along chains of homes from the slowest shard to the shard that is done first."""
        for _ in range(4 * len(self.busy)):
            slowest = self.busy.index(max(self.busy))
            reached = self._reach(slowest, experts)
            if not reached:
                return
            last = min(reached, key=lambda to: self.busy[to] + self.new(reached[to][0], to))
            num_rows = int(
                (self.busy[slowest] - self.busy[last] - self.new(reached[last][0], last)) / (2 * self.cost.row)
            )
            if num_rows <= 0 or num_rows * self.cost.row <= RELIEF * self.busy[slowest]:
                return
            chain = [last]
            while chain[-1] != slowest:
                chain.append(reached[chain[-1]][1])
            hops = [(reached[to][0], giver, to) for to, giver in itertools.pairwise(chain)]
            num_rows = min([num_rows, *(self.given[expert][giver] for expert, giver, _ in hops)])
            self.busy[slowest] -= num_rows * self.cost.row
            self.busy[last] += num_rows * self.cost.row
            for expert, giver, to in hops:
                self.busy[to] += self.new(expert, to)
                self.given[expert][giver] -= num_rows
                self.given[expert][to] += num_rows
                self.busy[giver] -= self.new(expert, giver)

    def _reach(self, slowest: int, experts: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Return, for each shard that rows can reach, the pair (expert of the rows, shard that gives the rows)."""
        reached: dict[int, tuple[int, int]] = {}
        queue = [slowest]
        for shard in queue:
            for expert in experts:
                if not self.given[expert].get(shard):
                    continue
                for to in self.given[expert]:
                    new = self.new(expert, to)
                    is_too_slow = new > 0 and self.busy[to] + new >= self.busy[slowest]
                    if to != slowest and to not in reached and not is_too_slow:
                        reached[to] = expert, shard
                        queue.append(to)
        return reached
