"""The load of an expert is how often the router picks it.

Backbones count picks and add the counts to sums in Redis once a second, and the controller reads the sums. Loads are
only advice for the planner. A count that is added twice after a timeout, or dropped in a long outage, may change a
placement a little, but never a generated token.

Legend: E experts of a layer, W windows of time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]

# Counts are dropped after this many consecutive failures to send: about a minute at one attempt a second.
MAX_MERGES = 60


class LoadCounter:
    """A `LoadCounter` counts the picks of each expert since the last `take()`; several threads may use it.

    Counts that could not be sent come back through `merge()`. After `max_merges` failures in a row, `merge()` drops the
    counts, so that a long outage does not end in a burst of old load. `num_dropped` counts the dropped picks.
    """

    def __init__(self, num_experts: Mapping[int, int], max_merges: int = MAX_MERGES) -> None:
        self.max_merges = max_merges
        self.num_dropped = 0
        self._num_merges = 0
        self._lock = threading.Lock()
        self._num_experts = dict(num_experts)
        self._counts = self._zeros()

    def add(self, layer: int, topk_ids: ArrayLike) -> None:
        """Count the picks of one batch in layer `layer`; `topk_ids` is an array or CPU tensor of expert ids."""
        picks_E = np.bincount(np.asarray(topk_ids).reshape(-1), minlength=self._num_experts[layer])
        assert len(picks_E) == self._num_experts[layer], f"layer {layer} has no expert {len(picks_E) - 1}"
        with self._lock:
            self._counts[layer] += picks_E

    def take(self) -> dict[int, Counts]:
        """Return the picks per expert since the last `take()`, by layer, without layers that have no picks."""
        with self._lock:
            taken, self._counts = self._counts, self._zeros()
        return {layer: counts for layer, counts in taken.items() if counts.any()}

    def merge(self, taken: Mapping[int, Counts]) -> None:
        """Add the counts from `take()` to the current counts again, because sending the counts failed."""
        self._num_merges += 1
        if self._num_merges > self.max_merges:
            self.num_dropped += sum(int(counts.sum()) for counts in taken.values())
            return
        with self._lock:
            for layer, counts in taken.items():
                self._counts[layer] += counts

    def mark_sent(self) -> None:
        """Reset the number of consecutive failures to 0, because the counts from `take()` were sent."""
        self._num_merges = 0

    def _zeros(self) -> dict[int, Counts]:
        return {layer: np.zeros(num_experts, np.int64) for layer, num_experts in self._num_experts.items()}


@dataclass(frozen=True)
class ExpectedLoad:
    """An `ExpectedLoad` holds the load of a layer's experts, in picks per second, as float64 arrays [E].

    - `short_E` and `long_E`: the averages of the last minutes and of the last hours.
    - `mean_E`: the expected load.
    - `std_E`: the standard deviation of the expected load, from two sources: the variation from one window to the next
      (without the counting noise) and the error of `mean_E`.
    """

    short_E: NDArray[np.float64]
    long_E: NDArray[np.float64]
    mean_E: NDArray[np.float64]
    std_E: NDArray[np.float64]

    @classmethod
    def steady(cls, mean: ArrayLike, std: ArrayLike = 0.0) -> Self:
        """Return a load whose expected load and two averages are all `mean`, with the standard deviation `std`."""
        mean_E = np.asarray(mean, np.float64)
        return cls(mean_E, mean_E, mean_E, np.broadcast_to(np.asarray(std, np.float64), mean_E.shape))


def expected_load(
    counts_WE: Counts, ages_s: Sequence[float], window_s: float, half_lives_s: tuple[float, float] = (120.0, 3600.0)
) -> ExpectedLoad:
    """Return the expected load of a layer's experts, which combines a short and a long exponentially decayed average.

    - `counts_WE`: the picks of each expert in each window.
    - `ages_s`: the age of each window in seconds.
    - `window_s`: the length of a window in seconds.
    - `half_lives_s`: the half-lives of the short and of the long average in seconds. The weight of a pick halves with
      each half-life.

    The mean `mean_E` lies between the two averages, and near the short average if the picks of the last minutes differ
    from the long average by more than the counting noise. The weight of the short average follows from empirical Bayes:
    the prior is the drift that all experts of the layer have in common, relative to an expert's load.
    """
    short_E, long_E = (decayed_rate(counts_WE, ages_s, window_s, half_life) for half_life in half_lives_s)
    noise_E, long_noise_E = (
        long_E * _noise_per_pick(ages_s, window_s, half_life) for half_life in half_lives_s
    )  # Counts are Poisson-distributed, so the variance of a count is its mean.
    drift = np.sum((short_E - long_E) ** 2 - noise_E - long_noise_E) / max(float(np.sum(long_E**2)), 1e-300)
    prior_E = max(float(drift), 0.0) * long_E**2
    weight_E = np.divide(prior_E, prior_E + noise_E, out=np.zeros_like(prior_E), where=prior_E > 0)
    weights_W = 0.5 ** (np.asarray(ages_s, np.float64) / half_lives_s[1])
    spread_E = weights_W @ (counts_WE / window_s - long_E) ** 2 / weights_W.sum()
    varies_E = np.maximum(spread_E - long_E / window_s, 0.0)
    error_E = weight_E * noise_E + (1 - weight_E) * np.minimum(long_noise_E, noise_E)
    mean_E = long_E + weight_E * (short_E - long_E)
    return ExpectedLoad(short_E, long_E, mean_E, np.sqrt(varies_E + error_E))


def _noise_per_pick(ages_s: Sequence[float], window_s: float, half_life_s: float) -> float:
    """Return the variance of a decayed average of Poisson counts, divided by the average, in picks per second."""
    weights_W = 0.5 ** (np.asarray(ages_s, np.float64) / half_life_s)
    return float((weights_W**2).sum() / (weights_W.sum() ** 2 * window_s))


def decayed_rate(
    counts_WE: Counts, ages_s: Sequence[float], window_s: float, half_life_s: float
) -> NDArray[np.float64]:
    """Return the picks per second of each expert, [E]; a window has the weight 0.5 ** (age / half-life)."""
    assert len(counts_WE) == len(ages_s) > 0
    weights_W = 0.5 ** (np.asarray(ages_s, np.float64) / half_life_s)
    rate_E: NDArray[np.float64] = weights_W @ counts_WE / (weights_W.sum() * window_s)
    return rate_E
