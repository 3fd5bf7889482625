"""The tests check that drafts change neither the tokens nor their distribution.

The model is a Markov chain of five tokens, and a second Markov chain makes the drafts. The tests compare the results
with the probabilities of all sequences.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.contract.sampling_params import SamplingParams
from services.engine.request import Request
from services.engine.sampling.sampler import Sampler, SamplingRow
from tests.services.engine.sampling.statistics import chi_squared, chi_squared_bound, obvious_probs, request

SAMPLER = Sampler()
VOCAB_SIZE, LENGTH, NUM_SEQUENCES = 5, 3, 8_000
# Logits of the next token of the model and of the drafter, one row per last token.
MODEL_VV = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
DRAFTER_VV = MODEL_VV + 0.8 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 3},
    {"top_p": 0.8, "min_p": 0.1, "presence_penalty": 0.8, "frequency_penalty": -0.3},
]
# A `Verify` function decides which tokens a step adds to a request, and returns the tokens. The arguments are:
# the drafts; the model's tokens after the first 0, 1, 2, ... drafts; each draft's probability according to the drafter;
# and each draft's probability according to the model.
Verify = Callable[[list[int], list[int], list[float], list[float]], list[int]]


def coupled(drafts: list[int], tokens: list[int], _q: list[float], _p: list[float]) -> list[int]:
    """Verify as the engine does: accept drafts as long as each draft equals the model's token, and add one token."""
    num_accepted = next((i for i, draft in enumerate(drafts) if draft != tokens[i]), len(drafts))
    return tokens[: num_accepted + 1]


def accepts_by_draft_probability(drafts: list[int], tokens: list[int], q: list[float], p: list[float]) -> list[int]:
    return _rejection(drafts, tokens, q)


def takes_no_residual(drafts: list[int], tokens: list[int], q: list[float], p: list[float]) -> list[int]:
    """Sample by rejection, but wrongly replace a rejected draft from the whole distribution, not from the residual."""
    return _rejection(drafts, tokens, [a / b for a, b in zip(p, q, strict=True)])


def accepts_everything(drafts: list[int], tokens: list[int], q: list[float], p: list[float]) -> list[int]:
    return [*drafts, tokens[-1]]


_generator = np.random.default_rng(0)


def _rejection(drafts: list[int], tokens: list[int], chances: list[float]) -> list[int]:
    accepted = list(itertools.takewhile(lambda i: _generator.random() < chances[i], range(len(drafts))))
    return [*drafts[: len(accepted)], tokens[len(accepted)]]


def logits(chain_VV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    return chain_VV[[[*row.request.token_ids, *row.ahead][-1] for row in rows]]


def choose(chain_VV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    return [sampled.token_id for sampled in SAMPLER.sample(logits(chain_VV, rows), rows) if sampled is not None]


def generate(depth: int, params: dict[str, Any], verify: Verify = coupled, drafter_VV: Tensor = DRAFTER_VV) -> Any:
    """Return the sequences that follow token 0, the number of drafts made, and the number of drafts accepted."""
    requests = [request(prompt=[0], seed=seed, **params) for seed in range(NUM_SEQUENCES)]
    num_drafts = num_accepted = 0
    while unfinished := [r for r in requests if r.num_generated < LENGTH]:
        drafts: list[list[int]] = [[] for _ in unfinished]
        for _ in range(depth):
            rows = [SamplingRow(r, tuple(d)) for r, d in zip(unfinished, drafts, strict=True)]
            for draft, token in zip(drafts, choose(drafter_VV, rows), strict=True):
                draft.append(token)
        rows = [SamplingRow(r, tuple(d[:n])) for r, d in zip(unfinished, drafts, strict=True) for n in range(depth + 1)]
        tokens = choose(MODEL_VV, rows)
        for i, (r, d) in enumerate(zip(unfinished, drafts, strict=True)):
            q = [probability(drafter_VV, r, d[:n], d[n]) for n in range(depth)] if verify is not coupled else []
            p = [probability(MODEL_VV, r, d[:n], d[n]) for n in range(depth)] if verify is not coupled else []
            added = verify(d, tokens[i * (depth + 1) : (i + 1) * (depth + 1)], q, p)
            num_drafts, num_accepted = num_drafts + depth, num_accepted + len(added) - 1
            r.token_ids += added
    return [tuple(r.token_ids[1 : 1 + LENGTH]) for r in requests], num_accepted / max(1, num_drafts)


def probability(chain_VV: Tensor, asked: Request, ahead: list[int], token_id: int) -> float:
    return float(next_probs(chain_VV is DRAFTER_VV, (*asked.token_ids, *ahead), asked.params)[token_id])


@cache
def next_probs(is_drafter: bool, tokens: tuple[int, ...], params: SamplingParams) -> NDArray[np.float64]:
    chain_VV = DRAFTER_VV if is_drafter else MODEL_VV
    counts = Counter(tokens[1:])
    edited = [
        logit - params.presence_penalty * (counts[i] > 0) - params.frequency_penalty * counts[i]
        for i, logit in enumerate(chain_VV[tokens[-1]].tolist())
    ]
    return obvious_probs(edited, params)


def chi_squared_and_bound(sequences: Sequence[tuple[int, ...]], params: dict[str, Any]) -> tuple[float, float]:
    """Compare how often each possible sequence occurs in `sequences` with its probability.

    Return chi-squared, and the value that chi-squared exceeds only rarely by chance.
    """
    cells = list(itertools.product(range(VOCAB_SIZE), repeat=LENGTH))
    asked = request(prompt=[0], **params)
    probs = np.array(
        [np.prod([probability(MODEL_VV, asked, list(cell[:n]), cell[n]) for n in range(LENGTH)]) for cell in cells]
    )
    counts = Counter(sequences)
    found = chi_squared(np.array([counts[cell] for cell in cells]), probs)
    return found, chi_squared_bound(int((probs > 0).sum()))


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_drafts_change_no_token_and_the_distribution_is_the_models(params: dict[str, Any]) -> None:
    without, _ = generate(0, params)
    found, bound = chi_squared_and_bound(without, params)
    assert found < bound
    for depth in (1, 3):
        sequences, acceptance = generate(depth, params)
        assert sequences == without
        assert 0.2 < acceptance < 0.9, "with so few or so many accepted drafts the test would not see what drafts do"


@pytest.mark.parametrize("verify", [accepts_by_draft_probability, takes_no_residual, accepts_everything])
def test_biased_verification_would_be_seen(verify: Verify) -> None:
    sequences, _ = generate(2, {}, verify)
    found, bound = chi_squared_and_bound(sequences, {})
    assert found > 2 * bound


def test_drafts_of_the_models_own_logits_are_all_accepted() -> None:
    _, acceptance = generate(2, {}, drafter_VV=MODEL_VV)
    assert acceptance == 1


def test_acceptance_is_high_where_the_distributions_are_close() -> None:
    """Compare the acceptance with its bounds, which follow from the total variation distance d of the distributions.

    Equal noise makes at least (1 - d) / (1 + d) of the choices equal (Daliri et al., Coupling without Communication,
    2024), and no coupling makes more than 1 - d equal.
    """
    rows = [SamplingRow(request(seed=seed)) for seed in range(NUM_SEQUENCES)]
    generator = torch.Generator().manual_seed(5)
    for spread in (0.1, 0.5, 2.0):
        model = torch.randn(1, 50, generator=generator)
        drafter = model + spread * torch.randn(1, 50, generator=generator)
        p, q = torch.softmax(model, dim=-1), torch.softmax(drafter, dim=-1)
        distance = float((p - q).abs().sum()) / 2
        choices = [SAMPLER.sample(x.expand(len(rows), -1).contiguous(), rows) for x in (model, drafter)]
        rate = sum(a == b for a, b in zip(*choices, strict=True)) / len(rows)
        assert (1 - distance) / (1 + distance) - 0.015 < rate < 1 - distance + 0.015
