"""A cost fit estimates the cost model of a shard from the calls that the shard computed.

The estimate is a recursive least-squares fit with exponential forgetting. The fit keeps a 3 × 3 matrix and a vector
that sum up all calls so far, with less weight for older calls. No fitted cost is negative.

- The fit divides the error of a call by the usual time of a call with as many rows and experts. Otherwise one call with
  a prompt would outweigh a thousand calls with single tokens.
- A call that took much longer or shorter than the other calls of the same batch counts less (Huber's weights around the
  median). A pause of the process therefore does not change the cost model, but a shard that becomes slower in all calls
  does change the cost model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cluster.topology import CostModel

HALF_LIFE_CALLS = 500.0  # Number of later calls after which a call counts half.
# A call has the ratio of its measured to its predicted time, and a batch has the median of these ratios. A call counts
# less if its ratio differs from the median by more than this fraction of the median.
TOLERANCE = 0.5
PRIOR_CALLS = 1.0  # Weight of the first cost model in the fit, in calls.
MIN_US = 1.0  # Smallest time in µs with which the fit computes, so that no division by zero occurs.

Floats = NDArray[np.float64]


@dataclass
class CostFit:
    """A `CostFit` learns a shard's cost model from batches of the shard's calls, and starts with the model `first`."""

    first: CostModel = CostModel()  # noqa: RUF009 - frozen
    _squares: Floats = field(default_factory=lambda: np.zeros((3, 3)))
    _products: Floats = field(default_factory=lambda: np.zeros(3))

    def __post_init__(self) -> None:
        self.cost_model = self.first

    def observe(self, num_experts: Floats, num_rows: Floats, mib: Floats, took_us: Floats) -> CostModel:
        """Update the fit with a batch of calls and return the new cost model.

        Each array has one entry per call:

        - `num_experts` and `num_rows`: the numbers of experts touched and of rows.
        - `mib`: the size of one expert in MiB.
        - `took_us`: the measured time in µs.
        """
        if not len(took_us):
            return self.cost_model
        took_us = np.maximum(took_us, MIN_US)
        parts = np.stack((np.ones(len(took_us)), mib * num_experts, mib * num_rows), axis=1)
        ratio = took_us / np.maximum(parts @ _vector(self.cost_model), MIN_US)
        off = np.abs(ratio / np.median(ratio) - 1.0)
        usual_us = np.maximum(parts @ _vector(self.first), MIN_US)  # Dividing by `took_us` would favour fast calls.
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
    """`RowsPerCall` is the mean number of rows of a shard's calls, where older calls count less as in a `CostFit`."""

    mean: float = 0.0
    _num_calls: float = 0.0

    def observe(self, num_calls: int, num_rows: int) -> float:
        """Update the mean with `num_calls` new calls, which had `num_rows` rows in total, and return the new mean."""
        if num_calls > 0:
            kept = 0.5 ** (num_calls / HALF_LIFE_CALLS) * self._num_calls
            self.mean = (kept * self.mean + num_rows) / (kept + num_calls)
            self._num_calls = kept + num_calls
        return self.mean


def _vector(cost_model: CostModel) -> Floats:
    return np.array([cost_model.call_us, cost_model.weight_us_per_mib, cost_model.row_us_per_mib])


def _solve(squares: Floats, products: Floats, prior: Floats) -> list[float]:
    """Return the three costs (per call, weight and row) that have the least error without a negative cost.

    The function solves the least-squares problem for every subset of the costs, with the remaining costs set to 0.
    """
    # The prior is weak, so that it decides only the costs that the calls do not determine.
    ridge = PRIOR_CALLS * 1e-3 / np.maximum(prior, 1e-3) ** 2
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
