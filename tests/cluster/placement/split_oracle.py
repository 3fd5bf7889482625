"""The split oracle finds the best split of experts' rows over their homes with a linear programme."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linprog
from scipy.sparse import coo_matrix


def least_maximum(
    homes: Sequence[Sequence[int]], cost_ES: ArrayLike, num_shards: int, busy_S: ArrayLike | None = None
) -> float:
    """Return the least possible time of the slowest shard over all splits of the experts' rows.

    - `homes[e]` lists the shards that are homes of expert e.
    - `cost_ES` is the time of all rows of each expert on each shard. The shape is [E, S], or [E, 1] if all shards are
      equally fast.
    - `busy_S` is the time that each shard needs for other work, 0 by default.
    """
    pairs = [(expert, home) for expert, expert_homes in enumerate(homes) for home in expert_homes]
    experts, shards = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    costs = np.broadcast_to(np.asarray(cost_ES, np.float64).T, (num_shards, len(homes))).T[experts, shards]
    columns = np.arange(len(pairs))
    whole = coo_matrix((np.ones(len(pairs)), (experts, columns)), (len(homes), len(pairs) + 1))
    loads = coo_matrix(
        (
            np.concatenate([costs, -np.ones(num_shards)]),
            (
                np.concatenate([shards, np.arange(num_shards)]),
                np.concatenate([columns, np.full(num_shards, len(pairs))]),
            ),
        ),
        (num_shards, len(pairs) + 1),
    )
    objective = np.zeros(len(pairs) + 1)
    objective[-1] = 1.0
    busy = np.zeros(num_shards) if busy_S is None else np.asarray(busy_S, np.float64)
    has_home = np.array([float(bool(expert_homes)) for expert_homes in homes])
    return float(linprog(objective, loads, -busy, whole, has_home, method="highs").fun)
