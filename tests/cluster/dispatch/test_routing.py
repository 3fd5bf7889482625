"""These tests check the choice of homes, and compare the compiled function with its oracle in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.home_choice import CallCost, ShardCosts, assign_homes, choose_homes
from cluster.dispatch.routing import HomeTable, NoLiveHome
from tests.cluster.dispatch import slow_routing

NO_MESSAGES = CallCost(message=0.0)


def make_table(num_experts: int, num_shards: int, seed: int = 0) -> HomeTable:
    rng = np.random.default_rng(seed)
    return HomeTable([[f"s{i}" for i in rng.permutation(num_shards)[:2]] for _ in range(num_experts)])


@pytest.mark.parametrize("num_picks", [1, 64, 1000, 10_000])
def test_every_pick_goes_to_a_home_of_its_expert(num_picks: int) -> None:
    table = make_table(64, 5)
    expert_P = np.random.default_rng(1).integers(0, 64, num_picks)
    home_P = choose_homes(expert_P, table, {})
    assert home_P.shape == (num_picks,)
    assert all(home in table.homes[expert] for expert, home in zip(expert_P, home_P, strict=True))


def test_nothing_to_send() -> None:
    assert choose_homes(np.zeros(0, np.int64), make_table(8, 2), {}).shape == (0,)


def test_the_rows_of_an_expert_stay_together_while_they_are_few() -> None:
    table = make_table(32, 4)
    expert_P = np.repeat(np.arange(32), CallCost().max_piece)
    home_P = choose_homes(expert_P, table, {})
    assert len(set(zip(expert_P.tolist(), home_P.tolist(), strict=True))) == 32


def test_a_hot_expert_is_split_over_its_homes() -> None:
    home_P = choose_homes(np.zeros(1000, np.int64), HomeTable([["a", "b"]]), {})
    assert np.bincount(home_P).min() > 350


def test_rows_that_cost_nothing_have_homes_too() -> None:
    """Use a cost model whose cost per row is 0. The fit may give such a model after only a few calls."""
    table, expert_P = HomeTable([["a", "b"]]), np.zeros(100, np.int64)
    costs = ShardCosts(np.zeros(2), np.array([50.0, 10.0]), np.zeros(2), np.array([1.0, 60.0]), max_piece=10)
    assert set(assign_homes(expert_P, table, costs, np.zeros(2, np.bool_)).tolist()) == {0}  # all in one message


def test_distinct_experts_are_balanced() -> None:
    table = make_table(512, 8)
    expert_P = np.random.default_rng(1).integers(0, 512, 32 * 22)
    home_P = choose_homes(expert_P, table, {}, cost=NO_MESSAGES)
    pairs = set(zip(expert_P.tolist(), home_P.tolist(), strict=True))
    num_touched = np.bincount([home for _, home in pairs])
    assert num_touched.max() <= 1.05 * num_touched.mean()


def test_few_picks_need_few_messages() -> None:
    table = HomeTable([["a", "b"], ["b", "c"], ["c", "a"]])
    expert_P = np.array([0, 1, 2, 0])
    assert len(set(choose_homes(expert_P, table, {}).tolist())) == 2
    assert len(set(choose_homes(expert_P, table, {}, cost=NO_MESSAGES).tolist())) == 3


def test_a_busy_shard_is_avoided() -> None:
    table = HomeTable([["a", "b"]] * 4)
    home_P = choose_homes(np.arange(4), table, {"a": 10})
    assert [table.shard_ids[home] for home in home_P] == ["b"] * 4


def test_an_excluded_shard_gets_nothing() -> None:
    table = make_table(64, 5)
    home_P = choose_homes(np.arange(64), table, {}, excluded={"s1"})
    assert table.shard_ids.index("s1") not in home_P.tolist()


def test_experts_without_a_live_home_are_named() -> None:
    table = HomeTable([["a", "b"], ["b", "c"], ["a"]])
    with pytest.raises(NoLiveHome, match=r"experts \[0, 2\] have no live home") as caught:
        choose_homes(np.array([2, 0, 1]), table, {}, excluded={"a", "b"})
    assert caught.value.experts == (0, 2)
    choose_homes(np.array([1]), table, {}, excluded={"a", "b"})


@pytest.mark.parametrize("seed", range(20))
def test_the_compiled_choice_is_that_of_plain_python(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_shards = int(rng.integers(2, 9))
    table = make_table(64, num_shards, seed)
    depths = {id: int(rng.integers(0, 4)) for id in table.shard_ids}
    excluded = {table.shard_ids[0]} if seed % 2 else set()
    for num_picks in (1, 6, 100, 5000):
        expert_P = (64 * rng.random(num_picks) ** 3).astype(np.int32)  # some experts are hot
        if any({table.shard_ids[home] for home in table.homes[expert]} <= excluded for expert in expert_P.tolist()):
            continue
        chosen = choose_homes(expert_P, table, depths, excluded)
        expected = slow_routing.choose_homes(expert_P, table, depths, excluded, CallCost())
        assert chosen.tolist() == expected.tolist()
