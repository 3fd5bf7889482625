import itertools
import random
from collections.abc import Sequence

import pytest

from services.engine.drafting.draft_depth import (
    NO_DRAFTS_YET,
    PRIOR_COST,
    PROBE_AFTER,
    PROBE_LEN,
    REQUEST_KEPT,
    Acceptance,
    DraftingState,
    StepCost,
    StepShape,
    choose_depths,
)

Weights = tuple[float, float, float, float]
CHEAP_DRAFTS: Weights = (20e-3, 1e-3, 1e-3, 0.2e-3)
DEAR_DRAFTS: Weights = (5e-3, 4e-3, 6e-3, 1e-3)


def seconds_of(weights: Weights, shape: StepShape) -> float:
    return sum(w * f for w, f in zip(weights, shape.features, strict=True))


# Acceptance -----------------------------------------------------------------------------------------------------------


def test_acceptance_counts_drafts_only_up_to_the_first_wrong_one() -> None:
    seen = Acceptance().observe(3, 1, kept=1.0).observe(3, 3, kept=1.0).observe(1, 0, kept=1.0)
    assert seen.tried == (3, 2, 1)
    assert seen.accepted == (2, 1, 1)


def test_acceptance_follows_what_happens_now_and_starts_from_the_prior() -> None:
    assert NO_DRAFTS_YET.rates([0.5, 0.25]) == (0.5, 0.25)
    seen = NO_DRAFTS_YET
    for _ in range(100):
        seen = seen.observe(2, 2, REQUEST_KEPT)
    assert min(seen.rates([0.5, 0.5])) > 0.9
    for _ in range(150):
        seen = seen.observe(2, 0, REQUEST_KEPT)
    assert seen.rates([0.5, 0.5])[0] < 0.1


# Cost -----------------------------------------------------------------------------------------------------------------


def test_cost_is_learnt_from_steps_of_different_shapes() -> None:
    rng, cost = random.Random(0), StepCost.unknown()
    assert cost.weights == PRIOR_COST
    for _ in range(300):
        depth, count = rng.randrange(4), rng.randint(1, 8)
        shape = StepShape(rng.randint(count, 5 * count), depth, depth * count)
        cost = cost.observe(shape, seconds_of(DEAR_DRAFTS, shape) * rng.uniform(0.9, 1.1))
    for shape in (StepShape(1), StepShape(8, 1, 2), StepShape(20, 3, 12)):
        assert seconds_of(cost.weights, shape) == pytest.approx(seconds_of(DEAR_DRAFTS, shape), rel=0.15)


def test_cost_of_what_never_varies_is_right_on_the_whole() -> None:
    cost, shape = StepCost.unknown(), StepShape(3, 2, 2)
    for _ in range(50):
        cost = cost.observe(shape, 0.03)
    assert seconds_of(cost.weights, shape) == pytest.approx(0.03, rel=0.01)
    assert min(cost.weights) > 0


# Choice ---------------------------------------------------------------------------------------------------------------


def tokens_per_second(rates: Sequence[Sequence[float]], weights: Weights, others: int, depths: Sequence[int]) -> float:
    tokens = float(len(rates))
    for of_request, depth in zip(rates, depths, strict=True):
        likely = 1.0
        for i in range(depth):
            likely *= of_request[i]
            tokens += likely
    shape = StepShape(len(rates) + others + sum(depths), max(depths), sum(depths))
    return tokens / seconds_of(weights, shape)


@pytest.mark.parametrize("seed", range(100))
def test_depths_are_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    rates = [[rng.random() for _ in range(3)] for _ in range(rng.randint(1, 4))]
    weights = (rng.random(), rng.random() / 4, rng.random() / 4, rng.random() / 8)
    most, others = [rng.randint(0, 3) for _ in rates], rng.choice([0, 0, 10])
    chosen = choose_depths(rates, weights, others, most)
    assert all(0 <= depth <= limit for depth, limit in zip(chosen, most, strict=True))
    best = max(
        tokens_per_second(rates, weights, others, depths)
        for depths in itertools.product(*(range(limit + 1) for limit in most))
    )
    assert tokens_per_second(rates, weights, others, chosen) == pytest.approx(best)


def test_each_request_gets_the_depth_that_its_own_acceptance_deserves() -> None:
    good, bad = choose_depths([[0.9] * 4, [0.1] * 4], CHEAP_DRAFTS, 0, [4, 4])
    assert good == 4
    assert bad < good


def test_a_larger_batch_drafts_less_where_rows_cost() -> None:
    weights, depths = (10e-3, 3e-3, 1e-3, 1e-3), []
    for size in (1, 4, 16, 64):
        depths.append(sum(choose_depths([[0.6] * 4] * size, weights, 0, [4] * size)) / size)
    assert depths == sorted(depths, reverse=True)
    assert depths[0] >= 1
    assert depths[-1] == 0


# The whole loop, with simulated step times ----------------------------------------------------------------------------


def run(weights: Weights, rates: Sequence[float], num_steps: int, max_depth: int = 4) -> tuple[float, list[int]]:
    """Simulate `num_steps` steps of one request.

    Return the tokens per second in the second half of the steps, and the draft depths of all steps.
    """
    rng, state, acceptance = random.Random(0), DraftingState(max_depth), NO_DRAFTS_YET
    num_drafts, depths, tokens, seconds = 0, list[int](), 0, 0.0
    for i in range(num_steps):
        [depth] = state.depths([acceptance], 0, [max_depth])
        state = state.chosen([depth])
        depths.append(depth)
        num_accepted = next((k for k in range(num_drafts) if rng.random() > rates[k]), num_drafts)
        if num_drafts:
            state = state.verified(num_drafts, num_accepted)
            acceptance = acceptance.observe(num_drafts, num_accepted, REQUEST_KEPT)
        shape = StepShape(1 + num_drafts, depth, depth)
        took = seconds_of(weights, shape) * rng.uniform(0.9, 1.1)
        # Simulate delays: other processes use the machine, too, and the first step and the first drafts take long.
        delay = 50 if not i or (depth and not any(depths[:-1])) else 3 if rng.random() < 0.05 else 1
        state = state.timed(shape, took * delay)
        if i >= num_steps // 2:
            tokens, seconds = tokens + 1 + num_accepted, seconds + took
        num_drafts = depth
    return tokens / seconds, depths


@pytest.mark.parametrize("rates", [[0.9] * 4, [0.7] * 4, [0.5] * 4, [0.2] * 4, [0.0] * 4, [0.9, 0.9, 0.1, 0.1]])
@pytest.mark.parametrize("weights", [CHEAP_DRAFTS, DEAR_DRAFTS, (10e-3, 4e-3, 1e-3, 1e-3)])
def test_speed_comes_close_to_the_best_depth_there_is(weights: Weights, rates: list[float]) -> None:
    best = max(tokens_per_second([rates], weights, 0, [depth]) for depth in range(5))
    assert run(weights, rates, 1500)[0] >= 0.93 * best


def test_drafting_that_does_not_pay_stops_and_is_tried_ever_more_rarely() -> None:
    _, depths = run(DEAR_DRAFTS, [0.1] * 4, 4000)
    assert sum(map(bool, depths[-2000:])) <= PROBE_LEN * (2000 / PROBE_AFTER[1] + 1)
    tried = [i for i, depth in enumerate(depths) if depth and i > 200]
    assert tried, "drafting must be tried again, because texts change"
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried) if later - earlier > 1]
    assert max(gaps) <= PROBE_AFTER[1] + 1


def test_no_drafts_where_they_are_turned_off() -> None:
    assert set(run(CHEAP_DRAFTS, [], 50, max_depth=0)[1]) == {0}


def test_depth_keeps_to_what_a_request_may_still_generate() -> None:
    assert DraftingState(4).depths([NO_DRAFTS_YET] * 3, 0, [0, 1, 9])[0] == 0
    assert DraftingState(4).depths([NO_DRAFTS_YET] * 3, 0, [0, 1, 9])[1] <= 1


def test_counts_by_position() -> None:
    state = DraftingState(4).verified(3, 1).verified(2, 2).verified(1, 0)
    assert state.drafted == (3, 2, 1)
    assert state.accepted == (2, 1, 0)
