"""A cost fit estimates the cost model of a shard from the calls that the shard computed.

The estimate is a recursive least-squares fit with exponential forgetting. The fit keeps a 3 × 3 matrix and a vector for
all calls so far, and both fade. No fitted cost is negative.

- Errors count relative to the usual time of such a call. Otherwise one prompt would outweigh a thousand tokens.
- A call that took much longer or shorter than the other calls of its batch counts less (Huber's weights around the
  median). A pause of the process therefore does not change the cost model, but a shard that has become slower in all
  its calls does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cluster.topology import CostModel

HALF_LIFE_CALLS = 500.0  # A call counts half after so many later calls.
TOLERANCE = 0.5  # A call whose ratio to the prediction differs by more than this part from the median counts less.
PRIOR_CALLS = 1.0  # The cost model that is assumed at first counts as much as so many calls.
MIN_US = 1.0  # Times below this count as this many µs, so that no division by zero occurs.

Floats = NDArray[np.float64]


@dataclass
class CostFit:
    """A `CostFit` learns the cost model of one shard from batches of its calls; `first` is assumed before any call."""

    first: CostModel = CostModel()  # noqa: RUF009 - frozen
    _squares: Floats = field(default_factory=lambda: np.zeros((3, 3)))
    _products: Floats = field(default_factory=lambda: np.zeros(3))

    def __post_init__(self) -> None:
        self.cost_model = self.first

    def observe(self, num_experts: Floats, num_rows: Floats, mib: Floats, took_us: Floats) -> CostModel:
        """Update the fit with a batch of calls and return the new cost model.

        Each array has one entry per call: the experts touched, the rows, the MiB of one expert, and the time in µs.
        """
        if not len(took_us):
            return self.cost_model
        took_us = np.maximum(took_us, MIN_US)
        parts = np.stack((np.ones(len(took_us)), mib * num_experts, mib * num_rows), axis=1)
        ratio = took_us / np.maximum(parts @ _vector(self.cost_model), MIN_US)
        off = np.abs(ratio / np.median(ratio) - 1.0)
        usual_us = np.maximum(parts @ _vector(self.first), MIN_US)  # With `took_us`, slow calls would count too little.
        weight = np.minimum(1.0, TOLERANCE / np.maximum(off, 1e-9)) / usual_us**2
        age = 0.5 ** (np.arange(len(took_us))[::-1] / HALF_LIFE_CALLS)
        kept = 0.5 ** (len(took_us) / HALF_LIFE_CALLS)
        weighted = parts * (weight * age)[:, None]
        self._squares = kept * self._squares + weighted.T @ parts
        self._products = kept * self._products + weighted.T @ took_us
        self.cost_model = CostModel(*_solve(self._squares, self._products, _vector(self.first)))
        return self.cost_model


@dataclass
class RowsPerCall:
    """`RowsPerCall` is the mean number of rows of a shard's calls, in which old calls fade as in the `CostFit`."""

    mean: float = 0.0
    _num_calls: float = 0.0

    def observe(self, num_calls: int, num_rows: int) -> float:
        """Update the mean number of rows per call with the calls since the previous update, and return the mean."""
        if num_calls > 0:
            kept = 0.5 ** (num_calls / HALF_LIFE_CALLS) * self._num_calls
            self.mean = (kept * self.mean + num_rows) / (kept + num_calls)
            self._num_calls = kept + num_calls
        return self.mean


def _vector(cost_model: CostModel) -> Floats:
    return np.array([cost_model.call_us, cost_model.weight_us_per_mib, cost_model.row_us_per_mib])


def _solve(squares: Floats, products: Floats, prior: Floats) -> list[float]:
    """Return the three costs with the least error of which none is negative.

    The function tries every subset of the three costs as the ones that are not 0.
    """
    ridge = PRIOR_CALLS * 1e-3 / np.maximum(prior, 1e-3) ** 2  # The prior decides only what the calls leave open.
    squares, products = squares + np.diag(ridge), products + ridge * prior
    best, least = np.zeros(3), 0.0
    for num in (1, 2, 3):
        for chosen in combinations(range(3), num):
            block = np.ix_(chosen, chosen)
            part = np.linalg.solve(squares[block], products[list(chosen)])
            error = -float(part @ products[list(chosen)])
            if (part >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[list(chosen)] = part
    return [float(cost) for cost in best]
