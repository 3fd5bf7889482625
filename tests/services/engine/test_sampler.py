import numpy as np
import pytest
import torch

from services.engine.request import MAX_TOP_K, SamplingParams
from services.engine.sampler import Choice, sample, target_probs, uniform

GREEDY = SamplingParams(temperature=0)


def draw(logits: torch.Tensor, params: SamplingParams, num_draws: int) -> np.ndarray:
    tokens = sample(logits.expand(num_draws, -1), [Choice(params, seed=1, position=i) for i in range(num_draws)])
    return np.bincount(tokens, minlength=logits.shape[-1]) / num_draws


def test_greedy_takes_the_highest_and_the_lowest_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 1.0, 1.0, 5.0]])
    assert sample(logits, [Choice(GREEDY, 0, 0)] * 2) == [1, 0]


def test_forbidden_tokens_are_never_chosen() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]]).expand(2, -1)
    choices = [Choice(GREEDY, 0, 0, frozenset({1, 2})), Choice(GREEDY, 0, 0)]
    assert sample(logits, choices) == [3, 1]


@pytest.mark.parametrize("bad", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]], ids=str)
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_k=1)], ids=["greedy", "drawn"])
def test_no_token_is_chosen_from_a_row_that_allows_none_and_the_others_do_not_mind(
    bad: list[float], params: SamplingParams
) -> None:
    logits = torch.tensor([[0.0, 9.0], bad, [9.0, -torch.inf]])
    assert sample(logits, [Choice(params, 0, 0)] * 3) == [1, None, 0]


def test_a_top_k_above_the_vocabulary_is_all_of_it() -> None:
    logits = torch.tensor([[0.5, 2.0, 1.0]])
    everything = target_probs(logits, [SamplingParams(top_k=3)])
    assert torch.equal(target_probs(logits, [SamplingParams(top_k=MAX_TOP_K)]), everything)


def test_noise_is_a_function_of_seed_and_position() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    assert len({uniform(seed, position) for seed in (-1, 0, 1, 2**63 - 1) for position in range(100)}) == 400
    noise = np.array([uniform(5, position) for position in range(4000)])
    assert 0 <= noise.min() < 0.01 < 0.99 < noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.05


def test_a_row_does_not_depend_on_its_company() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 1000, generator=generator) * 3
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k) for t, p, k in [(1, 1, 0), (0.7, 0.9, 0), (1.3, 1, 40)] * 3
    ]
    choices = [Choice(p, seed=i, position=10 * i) for i, p in enumerate(params)]
    together = sample(logits, choices)
    assert together == [sample(logits[i : i + 1], [choices[i]])[0] for i in range(9)]
    assert together[::-1] == sample(logits.flip(0), choices[::-1])


def test_target_probs_apply_temperature_then_top_k_then_top_p() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    logits = probs.log()
    assert torch.allclose(target_probs(logits, [SamplingParams()]), probs)
    squared = probs**2 / (probs**2).sum()
    assert torch.allclose(target_probs(logits, [SamplingParams(temperature=0.5)]), squared)
    top_3 = target_probs(logits, [SamplingParams(top_k=3)])
    assert torch.allclose(top_3, torch.tensor([[0, 4 / 9, 2 / 9, 3 / 9]], dtype=torch.float64))
    # Of the three kept 4/9 and 3/9 reach 0.75; of all four they would not.
    nucleus = target_probs(logits, [SamplingParams(top_k=3, top_p=0.75)])
    assert torch.allclose(nucleus, torch.tensor([[0, 4 / 7, 0, 3 / 7]], dtype=torch.float64))
    assert target_probs(logits, [SamplingParams(top_p=1e-9)]).tolist() == [[0, 1, 0, 0]]
    assert target_probs(logits, [SamplingParams(temperature=1e-300)]).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.8), SamplingParams(top_k=3)]
)
def test_draws_follow_the_target_distribution(params: SamplingParams) -> None:
    logits = torch.tensor([[0.3, -1.0, 1.2, 0.0, 0.9]])
    expected = target_probs(logits, [params])[0].numpy()
    num_draws = 8000
    found = draw(logits, params, num_draws)
    assert not found[expected == 0].any()
    kept = expected > 0
    chi_squared = num_draws * (((found - expected) ** 2)[kept] / expected[kept]).sum()
    assert chi_squared < 18.5  # 4 degrees of freedom, 0.1 %
    biased = expected.copy()
    biased[2] += 0.1
    biased /= biased.sum()
    assert num_draws * (((found - biased) ** 2)[kept] / biased[kept]).sum() > 18.5, "the test would not see a bias"
