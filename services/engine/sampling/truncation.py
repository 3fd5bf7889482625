"""Truncation keeps only the likeliest tokens of a distribution: by `top_k`, then by `top_p`, then by `min_p`.

1. `top_k` keeps the `top_k` largest weights.
2. `top_p` keeps the largest of the remaining weights: the fewest whose sum is at least `top_p` times the sum of all
   weights that step 1 kept.
3. `min_p` keeps each of the remaining weights that is at least `min_p` times the largest weight.

If several weights are equal and only some of the equal weights fit, the weights of the lowest ids are kept.

Legend: S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from services.engine.contract.sampling_params import SamplingParams


def truncate(weights_SV: Tensor, params: Sequence[SamplingParams]) -> None:
    """Set the weights that truncation does not keep to zero, in place; `params[s]` belongs to row s."""
    rows = [s for s, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    if not rows:
        return
    if not weights_SV.is_cpu:
        weights_SV[rows] = truncate_on_device(weights_SV[rows], [params[s] for s in rows])
        return
    for s in rows:
        weights_V, p = weights_SV[s].numpy(), params[s]
        ascending_V = np.sort(weights_V)  # numpy's sort is forty times faster than torch's
        _truncate_row(weights_V, ascending_V, _top_k(p, len(weights_V)), p.top_p, np.float32(p.min_p))


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    return min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size


@njit(nogil=True, cache=True)
def _truncate_row(weights_V, ascending_V, top_k, top_p, min_p):  # type: ignore[no-untyped-def]
    last, num_kept = len(ascending_V) - 1, top_k
    if top_p < 1:
        total, mass, num_kept = 0.0, 0.0, 0
        for n in range(top_k):
            total += ascending_V[last - n]
        while num_kept < top_k and (num_kept == 0 or mass < top_p * total):
            mass += ascending_V[last - num_kept]
            num_kept += 1
    while ascending_V[last - num_kept + 1] < min_p * ascending_V[last]:
        num_kept -= 1
    edge, num_over = ascending_V[last - num_kept + 1], -num_kept
    for i in range(len(weights_V)):
        num_over += weights_V[i] >= edge
        weights_V[i] = weights_V[i] if weights_V[i] >= edge else np.float32(0)
    i = last
    while num_over > 0:
        if weights_V[i] == edge:
            weights_V[i] = 0
            num_over -= 1
        i -= 1


def truncate_on_device(weights_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return truncated weights that equal the result of `truncate`, computed on a device without a loop over ids."""
    device, vocab_size = weights_SV.device, weights_SV.shape[-1]
    top_k_S1 = torch.tensor([[_top_k(p, vocab_size)] for p in params], device=device)
    top_p_S1 = torch.tensor([[p.top_p] for p in params], device=device, dtype=torch.float64)
    min_p_S1 = torch.tensor([[p.min_p] for p in params], device=device)
    ascending_SV = weights_SV.sort(dim=-1).values
    descending_SV = ascending_SV.flip(-1)
    mass_SV = descending_SV.cumsum(dim=-1, dtype=torch.float64)
    target_S1 = top_p_S1 * mass_SV.gather(-1, top_k_S1 - 1)
    num_in_p_S1 = torch.where(top_p_S1 < 1, torch.searchsorted(mass_SV, target_S1) + 1, vocab_size)
    num_below_S1 = torch.searchsorted(ascending_SV, min_p_S1 * descending_SV[:, :1])
    num_kept_S1 = torch.minimum(top_k_S1, num_in_p_S1).minimum(vocab_size - num_below_S1)
    edge_S1 = descending_SV.gather(-1, num_kept_S1 - 1)
    is_kept_SV = weights_SV >= edge_S1
    num_over_S = is_kept_SV.sum(dim=-1) - num_kept_S1.squeeze(-1)
    for s in num_over_S.nonzero().flatten().tolist():
        at_edge = (weights_SV[s] == edge_S1[s]).nonzero().flatten()
        is_kept_SV[s, at_edge[len(at_edge) - int(num_over_S[s]) :]] = False
    return weights_SV * is_kept_SV
