from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.load import ExpectedLoad
from cluster.placement import expert_groups
from cluster.placement.plan import Plan, PlanPolicy
from cluster.placement.planner import plan
from cluster.topology import CostModel, Homes, LayerSpec, Placement, Shard
from tests.cluster.fleet import make_shard

SIZE = 2**20
PLAIN = PlanPolicy(headroom=0)
TOGETHER = replace(PLAIN, keep_groups=True)
NUM_EXPERTS, NUM_GROUPS, TOP_GROUPS, TOP_K = 64, 8, 4, 8
LAYERS = [LayerSpec(0, NUM_EXPERTS, SIZE, TOP_K, num_groups=NUM_GROUPS, top_groups=TOP_GROUPS)]


def make_fleet(num: int, slots: float, nodes: int = 1) -> list[Shard]:
    return [
        replace(
            make_shard(i, f"node{i % nodes}", int(slots * SIZE)), host_budget=10**12, cost_model=CostModel(0.0, 0.0, 1)
        )
        for i in range(num)
    ]


def skewed(seed: int, sigma: float = 1.1) -> dict[int, ExpectedLoad]:
    return {0: ExpectedLoad.steady(np.random.default_rng(seed).lognormal(0, sigma, NUM_EXPERTS))}


def running(planned: Plan) -> Placement:
    return Placement(1, planned.homes, {}, "", planned.standby)


def draw_picks(num_rows: int, seed: int = 0) -> np.ndarray:
    """Return the experts that DeepSeek-V3's router picks for `num_rows` random rows, [rows, TOP_K].

    A row uses the groups with the largest sums of the two best scores, and in these groups the experts with the best
    scores.
    """
    scores = np.random.default_rng(seed).random((num_rows, NUM_GROUPS, NUM_EXPERTS // NUM_GROUPS))
    two_best = np.sort(scores, axis=2)[:, :, -2:].sum(axis=2)
    worst = np.argsort(two_best, axis=1)[:, : NUM_GROUPS - TOP_GROUPS]
    np.put_along_axis(scores, worst[:, :, None], -1.0, axis=1)
    return np.argsort(-scores.reshape(num_rows, NUM_EXPERTS), axis=1)[:, :TOP_K]


def measured_shards(homes: Homes, picks: np.ndarray) -> float:
    """Return the mean number of shards that compute a row's picks if each expert has only its first home."""
    return float(np.mean([len({homes[expert][0] for expert in row}) for row in picks.tolist()]))


def expected_shards(homes: Homes) -> float:
    """Return the planner's estimate of the number of shards that compute a token's experts."""
    ids = sorted({id for of in homes for id in of})
    homes_EH = np.full((len(homes), max(map(len, homes))), -1, np.int64)
    for expert, of in enumerate(homes):
        homes_EH[expert, : len(of)] = [ids.index(id) for id in of]
    routing = (NUM_EXPERTS // NUM_GROUPS, TOP_GROUPS / NUM_GROUPS, TOP_K / TOP_GROUPS)
    return float(expert_groups.shards_per_token(homes_EH, np.array([len(of) for of in homes]), routing, len(ids)))


def num_moved(before: Plan, after: Plan) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(before.homes[0], after.homes[0], strict=True))


def test_a_group_on_each_shard_is_what_equal_loads_lead_to() -> None:
    homes = plan(LAYERS, make_fleet(8, slots=8), None, {}, TOGETHER).homes[0]
    assert all(len(set(homes[8 * group : 8 * group + 8])) == 1 for group in range(8))
    picks = draw_picks(2000)
    spread = plan(LAYERS, make_fleet(8, slots=8), None, {}, PLAIN).homes[0]
    assert measured_shards(homes, picks) <= 4
    assert measured_shards(spread, picks) > 4.8
    assert expected_shards(homes) == pytest.approx(measured_shards(homes, picks), abs=0.1)


@pytest.mark.parametrize("num_shards", [2, 3, 5, 7, 11, 19])
@pytest.mark.parametrize("copies", [1.0, 1.2, 2.0])
def test_tokens_go_to_fewer_shards_and_the_balance_stays_within_its_bound(num_shards: int, copies: float) -> None:
    shards = make_fleet(num_shards, slots=-(-NUM_EXPERTS * copies // num_shards), nodes=3)
    for seed in range(3):
        load = skewed(seed)
        plain, together = (plan(LAYERS, shards, None, load, policy) for policy in (PLAIN, TOGETHER))
        assert expected_shards(together.homes[0]) <= expected_shards(plain.homes[0])
        assert together.predicted_s_after <= plain.predicted_s_after / TOGETHER.good_enough * (1 + 1e-3)
        assert together.cover_after == 2
        for shard in shards:
            assert len(running(together).experts_of(shard.id).get(0, ())) * SIZE <= shard.memory_budget
        assert plan(LAYERS, shards[::-1], None, load, TOGETHER) == together


@pytest.mark.parametrize("seed", range(30))
def test_any_fleet(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_shards, nodes = int(rng.integers(2, 12)), int(rng.integers(1, 4))
    shards = [
        replace(
            make_shard(i, f"node{i % nodes}", int(rng.integers(NUM_EXPERTS // num_shards + 1, NUM_EXPERTS) * SIZE)),
            host_budget=int(rng.integers(0, NUM_EXPERTS) * SIZE),
            cost_model=CostModel(50.0, float(rng.uniform(50, 200)), float(rng.uniform(5, 20))),
        )
        for i in range(num_shards)
    ]
    budget = {shard.id: shard.memory_budget for shard in shards}
    load, before = skewed(seed), None
    for turn in range(3):
        if turn == 2 and num_shards > 2:
            shards = shards[1:]
        placement = running(before) if before else None
        plain, after = (plan(LAYERS, shards, placement, load, policy) for policy in (PLAIN, TOGETHER))
        for id in running(after).shard_ids:
            assert len(running(after).experts_of(id).get(0, ())) * SIZE <= budget[id]
        assert (sum(map(bool, after.homes[0])), after.cover_after) == (
            sum(map(bool, plain.homes[0])),
            plain.cover_after,
        )
        if before:
            most = TOGETHER.max_regrouped * NUM_EXPERTS
            assert after.num_bytes <= plain.num_bytes + 2 * most * SIZE
        before, load = after, skewed(seed + 100 + turn)


def test_homes_stay_on_two_nodes() -> None:
    shards = make_fleet(6, slots=24, nodes=2)
    node_of = {shard.id: shard.node for shard in shards}
    planned = plan(LAYERS, shards, None, skewed(0), TOGETHER)
    for seed in range(3):
        assert all(len({node_of[id] for id in ids}) == 2 for ids in running(planned).all_homes(0))
        planned = plan(LAYERS, shards, running(planned), skewed(seed), TOGETHER)


def test_a_running_fleet_is_grouped_step_by_step() -> None:
    shards, load = make_fleet(7, slots=10), skewed(0, 0.3)
    # Expert 0 to 63 in turn on the shards, so that all groups are on all shards.
    homes = tuple((f"s{expert % 7:02}",) for expert in range(NUM_EXPERTS))
    placement = Placement(1, {0: homes}, {})
    policy = replace(TOGETHER, min_gain=0.0, group_stay_s=1e9)
    before = plan(LAYERS, shards, placement, load, PLAIN)
    start, num_plans = expected_shards(before.homes[0]), 0
    while True:
        after = plan(LAYERS, shards, running(before), load, policy)
        if after.moves == ():
            break
        num_plans += 1
        assert num_moved(before, after) <= 2 + policy.max_regrouped * NUM_EXPERTS
        assert expected_shards(after.homes[0]) < expected_shards(before.homes[0])
        assert after.predicted_s_after <= max(before.predicted_s_after, 0) / policy.good_enough
        before = after
    assert num_plans > 5
    assert expected_shards(before.homes[0]) < start - 0.3


def test_moves_that_cost_more_than_they_save_are_not_made() -> None:
    shards = make_fleet(8, slots=8)
    homes = tuple((f"s{expert % 8:02}",) for expert in range(NUM_EXPERTS))
    placement = Placement(1, {0: homes}, {}, standby={0: tuple((f"s{(e + 1) % 8:02}",) for e in range(NUM_EXPERTS))})
    assert plan(LAYERS, shards, placement, {}, replace(TOGETHER, bytes_per_s=1.0)).moves == ()
    refused = plan(LAYERS, shards, placement, {}, replace(TOGETHER, min_gain=0.5))
    assert refused.moves == ()
    assert any("moves for groups of experts would save" in reason for reason in refused.reasons)
    made = plan(LAYERS, shards, placement, {}, replace(TOGETHER, min_gain=0.0))
    assert made.moves
    assert any("moves bring the experts of groups together" in reason for reason in made.reasons)


def test_layers_without_groups_and_routers_that_use_all_groups_are_planned_as_ever() -> None:
    shards = make_fleet(8, slots=10)
    for groups in ({}, {"num_groups": 8, "top_groups": 8}):
        layers = [LayerSpec(0, NUM_EXPERTS, SIZE, TOP_K, **groups)]
        assert plan(layers, shards, None, skewed(0), TOGETHER) == plan(layers, shards, None, skewed(0), PLAIN)


def test_a_step_changes_the_estimate_as_predicted() -> None:
    """Check that `gather` makes the steps that lower the estimate, and nothing else, against moves tried one by one."""
    rng = np.random.default_rng(0)
    homes_EH = rng.permuted(np.tile(np.arange(4), (NUM_EXPERTS, 1)), axis=1)[:, :1].copy()
    routing = (NUM_EXPERTS // NUM_GROUPS, TOP_GROUPS / NUM_GROUPS, TOP_K / TOP_GROUPS)
    num_E, ones_EC = np.ones(NUM_EXPERTS, np.int64), np.ones((NUM_EXPERTS, 2))
    none_EJ, zero_E = np.full((NUM_EXPERTS, 1), -1), np.zeros(NUM_EXPERTS, np.int64)
    cost_SP, slots_S = np.tile([0.0, 0.0, 1.0], (4, 1)), np.full(4, NUM_EXPERTS)

    def estimate(homes: np.ndarray) -> float:
        return float(expert_groups.shards_per_token(homes, num_E, routing, 4))

    def best_move() -> float:
        best = np.inf
        for expert in range(NUM_EXPERTS):
            for to in range(4):
                trial = homes_EH.copy()
                trial[expert, 0] = to
                best = min(best, estimate(trial))
        return float(best)

    expected = best_move()
    moved = expert_groups.gather(
        ones_EC, cost_SP, homes_EH, num_E, none_EJ, zero_E, slots_S, none_EJ[:, 0], 0.0, np.zeros(4, np.int64), routing,
        1e9, 1e-6, 1,
    )  # fmt: skip
    assert moved == 1
    assert estimate(homes_EH) == pytest.approx(expected)
