from __future__ import annotations

import threading

import numpy as np
import pytest

from cluster.load import LoadCounter, decayed_rate, expected_load


def test_counts_are_taken_once() -> None:
    counter = LoadCounter({0: 4, 7: 2})
    counter.add(0, np.array([[0, 1], [1, 3]]))
    assert {layer: counts.tolist() for layer, counts in counter.take().items()} == {0: [1, 2, 0, 1]}
    assert counter.take() == {}


def test_what_was_not_sent_comes_back() -> None:
    counter = LoadCounter({0: 2}, max_merges=2)
    counter.add(0, [0, 0, 1])
    for _ in range(2):
        counter.merge(counter.take())
    counter.add(0, [1])
    taken = counter.take()
    assert taken[0].tolist() == [2, 2]
    counter.merge(taken)
    assert counter.take() == {}
    assert counter.num_dropped == 4
    counter.mark_sent()
    counter.merge(taken)
    assert counter.take()[0].tolist() == [2, 2]


def test_threads_lose_no_pick() -> None:
    counter = LoadCounter({0: 8})
    total = np.zeros(8, np.int64)

    def add() -> None:
        for _ in range(500):
            counter.add(0, [1, 2])

    adders = [threading.Thread(target=add) for _ in range(4)]
    for thread in adders:
        thread.start()
    while any(thread.is_alive() for thread in adders):
        total += counter.take().get(0, 0)
    total += counter.take().get(0, 0)
    assert total.tolist() == [0, 2000, 2000, 0, 0, 0, 0, 0]


def test_an_unknown_expert_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="layer 0 has no expert 9"):
        LoadCounter({0: 4}).add(0, [9])


def test_half_lives() -> None:
    counts_WE = np.array([[10, 0], [0, 10]])  # The first window is an hour old, the second window is new.
    assert decayed_rate(counts_WE, [3600, 0], 10, half_life_s=3600).tolist() == pytest.approx([1 / 3, 2 / 3])
    load = expected_load(counts_WE, [3600, 0], 10)
    assert load.short_E.tolist() == pytest.approx([0, 1], abs=1e-6)
    assert load.long_E.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_a_steady_load_is_its_own_average() -> None:
    load = expected_load(np.full((20, 3), 50), [30 * age for age in range(20)], 30)
    assert np.allclose(load.short_E, 50 / 30)
    assert np.allclose(load.long_E, 50 / 30)


def test_few_samples_are_believed_less_than_many() -> None:
    """Check that a doubled load counts as a change if there are many picks, and as noise if there are few picks."""
    rng = np.random.default_rng(0)
    ages_s = [30.0 * age for age in range(240)]

    def mean_of_doubled(picks: float) -> float:
        rates_WE = np.full((240, 200), picks)
        rates_WE[:8, :100] *= 2
        load = expected_load(rng.poisson(rates_WE), ages_s, 30)
        assert (np.minimum(load.short_E, load.long_E) - 1e-9 <= load.mean_E).all()
        assert (load.mean_E <= np.maximum(load.short_E, load.long_E) + 1e-9).all()
        return float((load.mean_E - load.long_E)[:100].mean() / (load.short_E - load.long_E)[:100].mean())

    assert mean_of_doubled(1000.0) > 0.99
    assert mean_of_doubled(0.1) < 0.7


def test_a_steady_load_varies_less_than_one_that_swings() -> None:
    rng = np.random.default_rng(0)
    ages_s = [30.0 * age for age in range(120)]
    swing_W = np.where(np.arange(120) % 2, 300.0, 100.0)
    rates_WE = np.stack([np.full(120, 200.0), swing_W], axis=1).repeat(50, axis=1)
    load = expected_load(rng.poisson(rates_WE), ages_s, 30)
    assert load.std_E[50:].mean() == pytest.approx(100 / 30, rel=0.1)
    assert load.std_E[:50].mean() < 0.2 * load.std_E[50:].mean()


def test_no_load_at_all() -> None:
    load = expected_load(np.zeros((4, 3), np.int64), [90, 60, 30, 0], 30)
    assert load.mean_E.tolist() == load.std_E.tolist() == [0, 0, 0]
