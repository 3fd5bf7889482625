"""The best split of experts' rows over their homes, as a linear programme."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linprog
from scipy.sparse import coo_matrix


def least_maximum(
    homes: Sequence[Sequence[int]], cost_ES: ArrayLike, num_shards: int, busy_S: ArrayLike | None = None
) -> float:
    """The least possible maximum over shards of what they have plus their share of each expert's cost there."""
    pairs = [(expert, home) for expert, of in enumerate(homes) for home in of]
    experts, shards = (np.array(one, np.int64) for one in zip(*pairs, strict=True))
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
    has_home = np.array([float(bool(of)) for of in homes])
    return float(linprog(objective, loads, -busy, whole, has_home, method="highs").fun)
