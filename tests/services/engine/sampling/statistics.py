"""The functions here make requests for the sampler, and compute token distributions with simple, slow code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engine.contract.sampling_params import SamplingParams
from services.engine.request import Request


def request(
    prompt: Sequence[int] = (1,),
    generated: Iterable[int] = (),
    seed: int = 0,
    stop_ids: Iterable[int] = (),
    **params: Any,
) -> Request:
    made = Request("r", list(prompt), SamplingParams(**params), seed, max_len=10**6, stop_ids=frozenset(stop_ids))
    made.token_ids.extend(generated)
    return made


def obvious_probs(logits: Sequence[float], params: SamplingParams) -> NDArray[np.float64]:
    """Return the probability of each token after temperature, top_k, top_p and min_p, computed in a simple loop."""
    weights = np.exp((np.array(logits, dtype=np.float64) - max(logits)) / params.temperature)
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order = order[: params.top_k] if params.top_k > 0 else order
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if kept and (mass >= params.top_p * total or weights[i] < params.min_p * weights[order[0]]):
            break
        kept.append(i)
        mass += weights[i]
    probs = np.zeros(len(weights))
    probs[kept] = weights[kept] / weights[kept].sum()
    return probs


def chi_squared(counts: NDArray[Any], probs: NDArray[np.float64]) -> float:
    """Compare counts with probabilities and return chi-squared: infinity if an outcome of probability 0 was counted."""
    expected = probs * counts.sum()
    if counts[expected == 0].any():
        return float("inf")
    possible = expected > 0
    return float((((counts - expected) ** 2)[possible] / expected[possible]).sum())


def chi_squared_bound(num_cells: int) -> float:
    """Return the value that chi-squared exceeds by chance in one of about 30,000 tests (Wilson and Hilferty, 1931)."""
    degrees = num_cells - 1
    return float(degrees * (1 - 2 / (9 * degrees) + 4 * np.sqrt(2 / (9 * degrees))) ** 3)
