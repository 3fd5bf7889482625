"""A home matrix holds the homes of a layer's experts as shard numbers, as the planner's compiled functions need them.

Legend: as in `cluster.placement.balance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from cluster.placement.balance import Array
from cluster.topology import Homes


class ShardNumbers(dict[str, int]):
    """`ShardNumbers` maps a shard's id to its number, and every unknown id to -1."""

    def __missing__(self, id: str) -> int:
        return -1


@dataclass
class HomeMatrix:
    """A `HomeMatrix` holds the homes, or the standbys, of all experts of one layer.

    The first `num_E[e]` entries of `homes_EH[e]` are shard numbers, the preferred home first; the other entries are -1.
    """

    homes_EH: Array
    num_E: Array

    @classmethod
    def empty(cls, num_experts: int, width: int) -> HomeMatrix:
        """Create a matrix without any home."""
        return cls(np.full((num_experts, width), -1, np.int64), np.zeros(num_experts, np.int64))

    @classmethod
    def of(cls, homes: Homes, index: ShardNumbers, width: int) -> HomeMatrix:
        """Create a matrix from shard ids (`homes`); the matrix has `width` columns, or more if necessary.

        Homes on shards that are not in `index` are left out.
        """
        num_E = np.fromiter(map(len, homes), np.int64, len(homes))
        flat = np.fromiter(map(index.__getitem__, chain.from_iterable(homes)), np.int64, int(num_E.sum()))
        table = cls.empty(len(homes), max(width, int(num_E.max(initial=0))))
        table.homes_EH[np.arange(table.homes_EH.shape[1]) < num_E[:, None]] = flat
        table.num_E = num_E
        return table if flat.min(initial=0) >= 0 else table.only_below(len(index))

    def only_below(self, num_shards: int) -> HomeMatrix:
        """Return a matrix with only the homes on shards 0 to `num_shards` - 1, in the same order."""
        is_kept_EH = (self.homes_EH >= 0) & (self.homes_EH < num_shards)
        order = np.argsort(~is_kept_EH, axis=1, kind="stable")
        kept_EH = np.where(is_kept_EH, self.homes_EH, -1)
        return HomeMatrix(np.take_along_axis(kept_EH, order, axis=1), is_kept_EH.sum(axis=1))

    def copy(self) -> HomeMatrix:
        return HomeMatrix(self.homes_EH.copy(), self.num_E.copy())

    def resized(self, width: int) -> HomeMatrix:
        """Return a copy with `width` columns; no expert may have more than `width` homes."""
        assert width >= self.num_E.max(initial=0)
        table = HomeMatrix.empty(len(self.num_E), width)
        most = min(width, self.homes_EH.shape[1])
        table.homes_EH[:, :most] = self.homes_EH[:, :most]
        table.num_E = self.num_E.copy()
        return table

    def held_S(self, num_shards: int) -> Array:
        """Return the number of experts on each shard, [S]."""
        return np.bincount(self.homes_EH.ravel() + 1, minlength=num_shards + 1)[1:]

    def is_same(self, other: HomeMatrix) -> bool:
        """Return True if `other` has the same homes in the same order."""
        if self.homes_EH.shape == other.homes_EH.shape:
            return np.array_equal(self.homes_EH, other.homes_EH)
        return len(self.changed(other)) == 0

    def changed(self, other: HomeMatrix) -> Array:
        """Return the experts whose homes or order of homes are different in `other`."""
        width = min(self.homes_EH.shape[1], other.homes_EH.shape[1])
        differs_E = (self.homes_EH[:, :width] != other.homes_EH[:, :width]).any(axis=1)
        for table in (self, other):
            if table.homes_EH.shape[1] > width:
                differs_E |= table.num_E > width
        return np.flatnonzero(differs_E)

    def num_added(self, other: HomeMatrix) -> int:
        """Return the number of homes in this matrix that are not in `other`."""
        return sum(len(set(self.of_expert(e)) - set(other.of_expert(e))) for e in self.changed(other).tolist())

    def of_expert(self, expert: int) -> list[int]:
        """Return the shard numbers of the homes of `expert`, the preferred home first."""
        homes: list[int] = self.homes_EH[expert, : self.num_E[expert]].tolist()
        return homes

    def ids_of(self, expert: int, ids: Sequence[str]) -> tuple[str, ...]:
        """Return the shard ids of the homes of `expert`; `ids` lists the ids of all shards by shard number."""
        return tuple(ids[home] for home in self.of_expert(expert))
