"""Chooses the next token of each row from its logits; every row is chosen without regard to the others.

Legend: S rows to sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.engine.request import SamplingParams


@dataclass(frozen=True)
class Choice:
    """What a row is sampled with; `position` is that of the token to be chosen in its sequence."""

    params: SamplingParams
    seed: int
    position: int
    forbidden_ids: frozenset[int] = frozenset()


def sample(logits_SV: Tensor, choices: Sequence[Choice]) -> list[int | None]:
    """One token id per row of fp32 logits; None for a row that holds NaN or +infinity, or -infinity alone."""
    assert logits_SV.shape[0] == len(choices)
    logits_SV = _forbid(logits_SV, choices)
    can_choose: list[bool] = logits_SV.amax(dim=-1).isfinite().tolist()
    greedy: list[int] = logits_SV.argmax(dim=-1).tolist()  # ties: the lowest id
    tokens = [token if can else None for token, can in zip(greedy, can_choose, strict=True)]
    rows = [row for row, choice in enumerate(choices) if can_choose[row] and not choice.params.is_greedy]
    if rows:
        drawn = _draw(logits_SV[rows], [choices[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def target_probs(logits_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The distribution tokens are drawn from, after temperature, top-k and top-p in this order: fp64, (S, V)."""
    temperature_S1 = logits_SV.new_tensor([[p.temperature] for p in params], dtype=torch.float64)
    top_S1 = logits_SV.max(dim=-1, keepdim=True).values
    probs_SV = torch.softmax((logits_SV - top_S1) / temperature_S1, dim=-1)
    rows = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if rows:
        probs_SV[rows] = _keep_top(probs_SV[rows], [params[row] for row in rows])
    return probs_SV


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (Philox, counter-based; top 53 bits)."""
    bits = np.random.Philox(key=seed % 2**64, counter=position << 64).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def _forbid(logits_SV: Tensor, choices: Sequence[Choice]) -> Tensor:
    pairs = [(row, token) for row, choice in enumerate(choices) for token in choice.forbidden_ids]
    if not pairs:
        return logits_SV
    rows, tokens = torch.tensor(pairs, device=logits_SV.device).unbind(dim=1)
    return logits_SV.index_put((rows, tokens), logits_SV.new_tensor(-torch.inf))


def _keep_top(probs_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    vocab_size = probs_SV.shape[-1]
    top_ks = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    top_k_S1 = torch.tensor(top_ks, device=probs_SV.device)[:, None]
    top_p_S1 = probs_SV.new_tensor([[p.top_p] for p in params])
    sorted_SV, ids_SV = probs_SV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(vocab_size, device=probs_SV.device)
    sorted_SV = sorted_SV * (ranks_V < top_k_S1)
    before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV
    sorted_SV = sorted_SV * (before_SV < top_p_S1 * sorted_SV.sum(dim=-1, keepdim=True))
    kept_SV = torch.zeros_like(probs_SV).scatter_(-1, ids_SV, sorted_SV)
    return kept_SV / kept_SV.sum(dim=-1, keepdim=True)


def _draw(logits_SV: Tensor, choices: Sequence[Choice]) -> list[int]:
    cumulative_SV = target_probs(logits_SV, [choice.params for choice in choices]).cumsum(dim=-1)
    noise_S1 = cumulative_SV.new_tensor([[uniform(choice.seed, choice.position)] for choice in choices])
    # The first id whose cumulative probability is above the target: never one of probability zero.
    target_S1 = noise_S1 * cumulative_SV[:, -1:]
    tokens: list[int] = torch.searchsorted(cumulative_SV, target_S1, right=True).squeeze(-1).tolist()
    return tokens
