"""A shard's pace, fitted to the calls it computed: weighted least squares that forget, with no negative cost.

What is kept of all calls is a 3 × 3 matrix and a vector, both fading: the recursive form of the fit. Errors count in
relation to what such a call usually takes, or one prompt would outweigh a thousand tokens. A call that took very much
longer or shorter than its neighbours counts less (Huber's weights about the median): a pause of the process is not
taken for its pace, while a shard that has become slower altogether is believed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cluster.topology import CostModel

HALF_LIFE_CALLS = 500.0
TOLERANCE = 0.5  # of the median: what differs more from it counts less
PRIOR_CALLS = 1.0  # how many calls the pace that was assumed at first counts as
MIN_US = 1.0

Floats = NDArray[np.float64]


@dataclass
class CostFit:
    """`observe` takes calls in batches, `pace` is what follows from all so far."""

    first: CostModel = CostModel()  # noqa: RUF009 - frozen
    _squares: Floats = field(default_factory=lambda: np.zeros((3, 3)))
    _products: Floats = field(default_factory=lambda: np.zeros(3))

    def __post_init__(self) -> None:
        self.cost_model = self.first

    def observe(self, num_experts: Floats, num_rows: Floats, mib: Floats, took_us: Floats) -> CostModel:
        """Learns from calls: experts touched, rows, MiB of one expert, µs of each; returns the new pace."""
        if not len(took_us):
            return self.cost_model
        took_us = np.maximum(took_us, MIN_US)
        parts = np.stack((np.ones(len(took_us)), mib * num_experts, mib * num_rows), axis=1)
        ratio = took_us / np.maximum(parts @ _vector(self.cost_model), MIN_US)
        off = np.abs(ratio / np.median(ratio) - 1.0)
        usual_us = np.maximum(parts @ _vector(self.first), MIN_US)  # not `took_us`: slow calls would count for little
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
    """The mean rows of a call, of which old ones fade as they do for the pace."""

    mean: float = 0.0
    _num_calls: float = 0.0

    def observe(self, num_calls: int, num_rows: int) -> float:
        """Learns from calls that came in since the last time; returns the new mean."""
        if num_calls > 0:
            kept = 0.5 ** (num_calls / HALF_LIFE_CALLS) * self._num_calls
            self.mean = (kept * self.mean + num_rows) / (kept + num_calls)
            self._num_calls = kept + num_calls
        return self.mean


def _vector(pace: CostModel) -> Floats:
    return np.array([pace.call_us, pace.weight_us_per_mib, pace.row_us_per_mib])


def _solve(squares: Floats, products: Floats, prior: Floats) -> list[float]:
    """The best costs of which none is negative: of three, every choice of those that are not 0 is tried."""
    ridge = PRIOR_CALLS * 1e-3 / np.maximum(prior, 1e-3) ** 2  # decides only what the calls leave open
    squares, products = squares + np.diag(ridge), products + ridge * prior
    best, least = np.zeros(3), 0.0
    for num in (1, 2, 3):
        for chosen in combinations(range(3), num):
            own = np.ix_(chosen, chosen)
            part = np.linalg.solve(squares[own], products[list(chosen)])
            error = -float(part @ products[list(chosen)])
            if (part >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[list(chosen)] = part
    return [float(cost) for cost in best]
