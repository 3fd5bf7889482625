import math
from typing import Any

import numpy as np
import pytest
import torch

from services.engine.contract.sampling_params import MAX_TOP_K, LogitBias, SamplingParams
from services.engine.request import Request
from services.engine.sampling.sampler import Sampler, SamplingRow, target_weights, token_logprobs
from services.engine.sampling.truncation import truncate, truncate_on_device
from tests.services.engine.sampling.statistics import chi_squared, chi_squared_bound, obvious_probs, request

SAMPLER = Sampler()
SMALL = [0.3, -1.0, 1.2, 0.0, 0.9, 1.2]  # the largest value occurs twice
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 3},
    {"top_k": 2},
    {"top_p": 0.5},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.77},
    {"min_p": 0.5},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.3},
]
SMALLEST = {"top_p": 0.0}  # the smallest nucleus: one token


def tokens_of(logits: torch.Tensor, *rows: SamplingRow) -> list[int | None]:
    return [sampled and sampled.token_id for sampled in SAMPLER.sample(logits, rows)]


def token_of(logits: list[float], row: SamplingRow | Request) -> int | None:
    [token] = tokens_of(torch.tensor([logits]), row if isinstance(row, SamplingRow) else SamplingRow(row))
    return token


def test_greedy_takes_the_highest_and_the_lowest_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 1.0, 1.0, 5.0]])
    assert tokens_of(logits, SamplingRow(request(temperature=0)), SamplingRow(request(temperature=0))) == [1, 0]


@pytest.mark.parametrize("bad", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]], ids=str)
@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_k": 1}, {"logprobs": 1}], ids=str)
def test_no_token_is_chosen_from_a_row_that_allows_none_and_the_others_do_not_mind(
    bad: list[float], params: dict[str, Any]
) -> None:
    logits = torch.tensor([[0.0, 99.0], bad, [99.0, -torch.inf]])
    assert tokens_of(logits, *(SamplingRow(request(**params)) for _ in range(3))) == [1, None, 0]


# The distribution


@pytest.mark.parametrize("params", [*KINDS, SMALLEST], ids=str)
def test_target_weights_are_those_of_the_obvious_way(params: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    for logits in (torch.tensor([SMALL]), 2 * torch.randn(1, 300, generator=generator), torch.zeros(1, 9)):
        [weights] = target_weights(logits, [SamplingParams(**params)]).double()
        expected = obvious_probs(logits[0].tolist(), SamplingParams(**params))
        assert torch.allclose(weights / weights.sum(), torch.from_numpy(expected), rtol=1e-5, atol=1e-12)


def test_a_device_keeps_what_a_cpu_keeps() -> None:
    params = [SamplingParams(**kind) for kind in (*KINDS, SMALLEST)]
    generator = torch.Generator().manual_seed(2)
    for vocab_size in (1, 6, 3000):
        # The logits are rounded so that some logits are equal.
        weights = torch.softmax((2 * torch.randn(len(params), vocab_size, generator=generator)).round(), dim=-1)
        expected = truncate_on_device(weights, params)
        truncate(weights, params)
        assert torch.equal(weights, expected)


def test_the_edges_of_the_parameters() -> None:
    logits = torch.tensor([[0.5, 2.0, 1.0]])
    everything = target_weights(logits, [SamplingParams()])
    for unlimited in (SamplingParams(top_k=MAX_TOP_K), SamplingParams(top_k=-1), SamplingParams(top_k=3)):
        assert torch.equal(target_weights(logits, [unlimited]), everything)
    for certain in ({"top_p": 0.0}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-300}):
        assert (target_weights(logits, [SamplingParams(**certain)]) > 0).tolist() == [[False, True, False]]


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_draws_follow_the_target_distribution(params: dict[str, Any]) -> None:
    num_draws, logits = 12_000, torch.tensor([SMALL])
    rows = [
        SamplingRow(request(seed=seed, **params), ahead=(0,) * ahead)
        for seed in range(num_draws // 4)
        for ahead in range(4)
    ]
    tokens = tokens_of(logits.expand(num_draws, -1).contiguous(), *rows)
    counts = np.bincount(tokens, minlength=len(SMALL))
    expected = obvious_probs(SMALL, SamplingParams(**params))
    bound = chi_squared_bound(int((expected > 0).sum()))
    assert chi_squared(counts, expected) < bound
    biased = expected * np.where(np.arange(len(SMALL)) == 2, 1.2, 1)
    assert chi_squared(counts, biased / biased.sum()) > bound, "the test must be able to see a bias"


LOW, HIGH = [5e-324, 1e-60, 1e-30, 1.0], [1e30, 1e60, 1e308]
EXTREMES = [(name, value) for name in ("temperature", "repetition_penalty") for value in LOW + HIGH]
EXTREMES += [(name, value) for name in ("top_p", "min_p") for value in (0.0, *LOW)]


@pytest.mark.parametrize(("name", "extreme"), EXTREMES)
def test_extremes_choose_a_token_that_may_be_chosen(name: str, extreme: float) -> None:
    logits = torch.tensor([[0.0, -3.0, 5.0, 90.0, -torch.inf]])
    for seed in range(20):
        asked = request(generated=[0, 1, 2, 4], seed=seed, min_tokens=9, stop_ids={3}, **{name: extreme})
        assert tokens_of(logits, SamplingRow(asked))[0] in (0, 1, 2)


# Edits of the logits


def test_stop_ids_wait_for_min_tokens_ahead_included() -> None:
    early = request(prompt=[5], generated=[6], temperature=0, min_tokens=3, stop_ids={1, 2})
    logits = [0.0, 9.0, 8.0, 1.0]
    assert token_of(logits, early) == 3
    assert token_of(logits, SamplingRow(early, ahead=(0,))) == 3
    assert token_of(logits, SamplingRow(early, ahead=(0, 0))) == 1
    early.token_ids += [0, 0]
    assert token_of(logits, early) == 1


def test_logit_bias_is_added() -> None:
    assert token_of([0.0, 1.0, 2.0], request(temperature=0, logit_bias=LogitBias.of({0: 2.5, 2: -3.0}))) == 0
    assert token_of([0.0, 1.0, 2.0], request(temperature=0, logit_bias=LogitBias.of({0: 2.5, 2: 1.0}))) == 2


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"repetition_penalty": 2.0}, [1.5, 2.0, -2.0, 0.5, -4.0]),  # prompt tokens count, too
        ({"presence_penalty": 0.5}, [3.0, 3.5, -1.5, 1.0, -2.0]),  # generated tokens count, each once
        ({"frequency_penalty": 0.5}, [3.0, 3.0, -1.5, 1.0, -2.0]),  # generated tokens count as often as they occur
        (
            {
                "repetition_penalty": 2.0,
                "presence_penalty": -1.0,
                "frequency_penalty": 0.25,
                "logit_bias": LogitBias.of({1: 1.0}),
            },
            [1.5, 2.5 + 1.0 - 0.5, -2.0 + 1.0 - 0.25, 0.5, -4.0],
        ),
    ],
    ids=str,
)
def test_penalties(params: dict[str, Any], expected: list[float]) -> None:
    logits, prompt = [3.0, 4.0, -1.0, 1.0, -2.0], [0, 3, 3, 4]
    assert edited(logits, prompt, [1, 2, 1], (), params) == pytest.approx(expected)
    assert edited(logits, prompt, [1], (2, 1), params) == pytest.approx(expected), "drafts count like generated tokens"


def edited(
    logits: list[float], prompt: list[int], generated: list[int], ahead: tuple[int, ...], params: dict[str, Any]
) -> list[float]:
    """Return the logits after all edits, measured through the sampler's choices.

    For each token, bisection finds the logit with which an additional token without edits starts to win.
    """
    found = []
    for token_id in range(len(logits)):
        low, high = -20.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            alone = [logit if i == token_id else -100.0 for i, logit in enumerate(logits)]
            row = SamplingRow(request(prompt, generated, temperature=0, **params), ahead)
            low, high = (middle, high) if token_of([*alone, middle], row) == token_id else (low, middle)
        found.append(low)
    return found


def test_notes_follow_guesses_that_come_and_go() -> None:
    generator = torch.Generator().manual_seed(3)
    params = {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    asked = request(prompt=[1, 2, 3, 2], **params)
    for step in range(200):
        logits = torch.randn(1, 12, generator=generator)
        guesses = torch.randint(12, (int(torch.randint(5, (), generator=generator)),), generator=generator).tolist()
        for ahead in (guesses[:1], guesses, guesses[:2], [*guesses[:1], 7], []):
            fresh = request(asked.token_ids[:4], asked.token_ids[4:], **params)
            assert tokens_of(logits, SamplingRow(asked, tuple(ahead))) == tokens_of(
                logits, SamplingRow(fresh, tuple(ahead))
            )
        if step % 3 == 0:  # some drafts are accepted
            asked.token_ids += guesses[:2]
        asked.token_ids += [int(token) for token in tokens_of(logits, SamplingRow(asked)) if token is not None]


# Independence of the other rows


def company(num_rows: int, vocab_size: int) -> tuple[torch.Tensor, list[SamplingRow]]:
    kinds: list[dict[str, Any]] = [{"temperature": 0}, *KINDS, {"repetition_penalty": 1.2, "frequency_penalty": 0.3}]
    kinds += [
        {"logit_bias": LogitBias.of({1: 2.0, 0: -2.0}), "presence_penalty": 1.0},
        {"min_tokens": 50, "logprobs": 5},
    ]
    generator = torch.Generator().manual_seed(vocab_size)
    rows = []
    for i in range(num_rows):
        tokens = torch.randint(vocab_size, (6,), generator=generator).tolist()
        asked = request(tokens[:2], tokens[2:5], seed=i, stop_ids={0}, **kinds[i % len(kinds)])
        rows.append(SamplingRow(asked, tuple(tokens[5 : 5 + i % 2])))
    return 3 * torch.randn(num_rows, vocab_size, generator=generator), rows


@pytest.mark.parametrize("vocab_size", [50, 1000, 8192, 40_001])
def test_a_row_does_not_depend_on_its_company(vocab_size: int) -> None:
    logits, rows = company(32, vocab_size)
    together = SAMPLER.sample(logits, rows)
    assert together == [SAMPLER.sample(logits[i : i + 1], [rows[i]])[0] for i in range(32)]
    assert together[::-1] == SAMPLER.sample(logits.flip(0), rows[::-1])
    params = [row.request.params for row in rows]
    weights = target_weights(logits, params)
    for i in range(32):
        assert torch.equal(weights[i], target_weights(logits[i : i + 1], [params[i]])[0])


def test_logits_are_left_as_they_were() -> None:
    logits, rows = company(32, 1000)
    before = logits.clone()
    SAMPLER.sample(logits, rows)
    assert torch.equal(logits, before)


# Logarithms of probabilities


def test_logprobs_are_the_models_own() -> None:
    logits = [0.0, 3.0, 1.0, 3.0, 2.0]
    asked = request(temperature=0.5, logit_bias=LogitBias.of({0: 100.0}), logprobs=3)
    [sampled] = SAMPLER.sample(torch.tensor([logits]), [SamplingRow(asked)])
    total = math.log(sum(map(math.exp, logits)))
    assert sampled is not None
    assert sampled.logprob is not None
    assert sampled.token_id == sampled.logprob.token_id == 0
    assert sampled.logprob.logprob == pytest.approx(0.0 - total)
    assert sampled.logprob.rank == 5
    assert [token_id for token_id, _ in sampled.logprob.top] == [1, 3, 4]
    assert [logprob for _, logprob in sampled.logprob.top] == pytest.approx([3 - total, 3 - total, 2 - total])


def test_logprobs_only_for_those_who_asked_and_as_many_as_they_asked_for() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(3, -1).contiguous()
    rows = [SamplingRow(request(temperature=0, logprobs=n)) for n in (None, 0, 9)]
    nothing, own, every = SAMPLER.sample(logits, rows)
    assert nothing is not None and own is not None and every is not None  # noqa: PT018
    assert nothing.logprob is None
    assert own.logprob is not None and own.logprob.top == ()  # noqa: PT018
    assert every.logprob is not None and len(every.logprob.top) == 3  # noqa: PT018
    assert all(sampled and sampled.logprob is None for sampled in SAMPLER.sample(logits, rows, with_logprobs=False))


def test_logprobs_of_given_tokens() -> None:
    logits = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, found in enumerate(token_logprobs(logits, range(7), num_top=4)):
        order = expected[row].argsort(descending=True).tolist()
        assert found.logprob == pytest.approx(expected[row, row].item(), abs=1e-5)
        assert found.rank == 1 + order.index(row)
        assert [token_id for token_id, _ in found.top] == order[:4]


def test_a_released_request_starts_anew() -> None:
    asked = request(temperature=0, presence_penalty=1.0, generated=[2])
    assert token_of([0.0, 0.5, 1.0], asked) == 1
    assert asked.sampling_state is not None
    SAMPLER.release(asked)
    assert asked.sampling_state is None
    assert token_of([0.0, 0.5, 1.0], asked) == 1
