from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from cluster.load import ExpectedLoad
from cluster.placement import planner
from cluster.placement.plan import Plan, PlanPolicy
from cluster.placement.planner import plan
from cluster.topology import CostModel, LayerSpec, Placement, Shard
from tests.cluster.fleet import make_layers, make_shard
from tests.cluster.placement.split_oracle import least_maximum

SIZE = 2**20
# Maximum ratio of a plan's time to the time of the best placement. The fleets are very small: one expert is a fifth of
# the load.
WITHIN = 1.1
ROWS_ONLY = CostModel(0.0, 0.0, 1.0)
ALL_DEVICES = PlanPolicy(headroom=0)


def make_fleet(num: int, slots: float = 100, nodes: int = 1, host_slots: int = 10**6) -> list[Shard]:
    return [
        replace(
            make_shard(i, f"node{i % nodes}", int(slots * SIZE)), host_budget=host_slots * SIZE, cost_model=ROWS_ONLY
        )
        for i in range(num)
    ]  # fmt: skip


def skewed(layers: Sequence[LayerSpec], seed: int = 0, sigma: float = 1.1) -> dict[int, ExpectedLoad]:
    rng = np.random.default_rng(seed)
    return {spec.layer: ExpectedLoad.steady(rng.lognormal(0, sigma, spec.num_experts)) for spec in layers}


def drifted(load: Mapping[int, ExpectedLoad], seed: int, drift: float = 0.3) -> dict[int, ExpectedLoad]:
    rng = np.random.default_rng(seed)
    return {
        layer: ExpectedLoad.steady(one.mean_E * np.exp(drift * rng.normal(size=len(one.mean_E))))
        for layer, one in load.items()
    }


def running(planned: Plan) -> Placement:
    return Placement(1, planned.homes, {}, "", planned.standby)


def check(planned: Plan, layers: Sequence[LayerSpec], shards: Sequence[Shard], headroom: int = 0) -> None:
    """Check that a plan uses known shards, has no home twice and keeps all budgets, and that blast radii are 0."""
    placement = running(planned)  # A placement asserts that no expert has the same home twice.
    specs = {spec.layer: spec for spec in layers}
    shard_of = {shard.id: shard for shard in shards}
    assert set(placement.shard_ids) <= shard_of.keys()
    for id, shard in shard_of.items():
        experts = placement.experts_of(id)
        used = sum(specs[layer].on_device(shard.device) * len(ids) for layer, ids in experts.items())
        assert used <= shard.memory_budget - headroom
    assert max(planned.blast_radius_after.values()) == 0 or len(shards) == 1


def test_moves_lead_from_the_running_placement_to_the_plan() -> None:
    layers = make_layers(3, 64, SIZE)
    shards = make_fleet(8, slots=30, nodes=2)
    load = skewed(layers)
    before = plan(layers, shards, None, load, ALL_DEVICES)
    after = plan(layers, shards[1:], running(before), drifted(load, 1, 0.6), ALL_DEVICES)
    assert any(move.kind == "drop" for move in after.moves)
    held = {("device", la, e, id) for la, homes in before.homes.items() for e, ids in enumerate(homes) for id in ids}
    held |= {
        ("standby", la, e, id) for la, homes in before.standby.items() for e, ids in enumerate(homes) for id in ids
    }
    held = {home for home in held if home[3] != shards[0].id}
    for move in after.moves:
        key = (move.tier, move.layer, move.expert, move.shard_id)
        assert (key in held) == (move.kind == "drop")
        (held.discard if move.kind == "drop" else held.add)(key)
    target = {("device", la, e, id) for la, homes in after.homes.items() for e, ids in enumerate(homes) for id in ids}
    target |= {
        ("standby", la, e, id) for la, homes in after.standby.items() for e, ids in enumerate(homes) for id in ids
    }
    assert held == target
    kinds = [move.kind for move in after.moves]
    assert kinds == sorted(kinds)
    assert after.num_bytes == sum(move.bytes for move in after.moves)


@pytest.mark.parametrize("num_gpus", [0, 2, 4])
def test_experts_may_take_more_memory_on_a_gpu(num_gpus: int) -> None:
    """Check a model of two layers in NVFP4 and one in bf16, whose experts are all widened on GPUs."""
    on_gpu, host = {"cuda": 4 * SIZE}, {"cuda": SIZE + 512}
    layers = [LayerSpec(layer, 32, SIZE, 4, on_gpu, host) for layer in (0, 1)]
    layers.append(LayerSpec(2, 32, 4 * SIZE, 4, on_gpu, {"cuda": 4 * SIZE + 512}))
    fleet = make_fleet(num_gpus + 2, slots=150)
    shards = [replace(shard, device="cuda" if i < num_gpus else "cpu") for i, shard in enumerate(fleet)]
    load = skewed(layers)
    before = plan(layers, shards, None, load, ALL_DEVICES)
    check(before, layers, shards)
    after = plan(layers, shards, running(before), drifted(load, 1, 0.6), ALL_DEVICES)
    check(after, layers, shards)
    assert after.cover_after == 2
    counts = [sum(map(len, running(before).experts_of(shard.id).values())) for shard in shards]
    assert all(count <= 150 // 4 for count in counts[:num_gpus]), "an expert takes four times its stored bytes"


@pytest.mark.parametrize("seed", range(30))
def test_what_holds_for_every_plan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = [LayerSpec(3 * i, int(rng.integers(8, 48)), int(rng.integers(1, 5)) * SIZE // 2, 4) for i in range(4)]
    num_shards, nodes = int(rng.integers(3, 9)), int(rng.integers(1, 4))
    needed = sum(spec.num_experts * spec.expert_bytes for spec in layers)
    parts = rng.dirichlet(np.full(num_shards, 5.0)) * needed * rng.uniform(1.3, 2.5)
    shards = [
        replace(
            make_shard(i, f"node{i % nodes}", int(part)),
            host_budget=int(rng.uniform(0.2, 2) * needed / num_shards),
            cost_model=CostModel(50.0, float(rng.uniform(50, 200)), float(rng.uniform(5, 20))),
        )
        for i, part in enumerate(parts)
    ]  # fmt: skip
    load = skewed(layers, seed)
    first = plan(layers, shards, None, load)
    check(first, layers, shards)
    assert first.cover_after == 2
    node_of = {shard.id: shard.node for shard in shards}
    placement = running(first)
    for layer in placement.homes:
        assert all(placement.homes[layer])
    load = drifted(load, seed + 100)
    second = plan(layers, shards, placement, load)
    check(second, layers, shards)
    assert second.predicted_s_after <= second.predicted_s_before * (1 + 1e-9)
    if nodes > 1 and all(shard.host_budget > needed for shard in shards):
        for layer in second.homes:
            assert all(len({node_of[id] for id in ids}) > 1 for ids in running(second).all_homes(layer))
    third = plan(layers, shards, running(second), load)
    assert third.moves == (), third.describe()
    assert plan(layers, shards[::-1], placement, load) == second


@pytest.mark.parametrize("nodes", [2, 3])
def test_homes_are_on_two_nodes(nodes: int) -> None:
    layers = make_layers(2, 48, SIZE)
    shards = make_fleet(6, slots=18, nodes=nodes)
    node_of = {shard.id: shard.node for shard in shards}
    load = skewed(layers)
    planned = plan(layers, shards, None, load, ALL_DEVICES)
    for seed in range(4):
        placement = running(planned)
        for layer in placement.homes:
            assert all(len({node_of[id] for id in ids}) > 1 for ids in placement.all_homes(layer))
        load = drifted(load, seed, 0.6)
        planned = plan(layers, shards, placement, load, ALL_DEVICES)
    assert any("Time:" in reason for reason in planned.reasons)


def tiny_optimum(weights: Sequence[float], num_shards: int, slots: int) -> float:
    """Return the lowest load that the most loaded shard can have if every expert has one home or more.

    The function tries all placements with at most `slots` homes on each shard.
    """
    choices = [c for n in range(1, num_shards + 1) for c in itertools.combinations(range(num_shards), n)]
    best = np.inf
    for homes in itertools.product(choices, repeat=len(weights)):
        held = np.bincount([home for expert_homes in homes for home in expert_homes], minlength=num_shards)
        if held.max() <= slots:
            best = min(best, least_maximum(homes, np.array(weights)[:, None], num_shards))
    return float(best)


@pytest.mark.parametrize("seed", range(12))
def test_tiny_fleets_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0, 1.1, 5)
    layers = [LayerSpec(0, 5, SIZE, 1)]
    shards = make_fleet(3, slots=2)
    policy = PlanPolicy(headroom=0, aim=1.0, good_enough=1.0, min_gain=0.0, bytes_per_s=1e18, rows_per_step=1000)
    load = {0: ExpectedLoad.steady(weights)}
    best_s = tiny_optimum(weights, 3, 2) / weights.sum() * policy.rows_per_step * 1e-6
    first = plan(layers, shards, None, load, policy)
    in_order = Placement(1, {0: (("s00",), ("s00",), ("s01",), ("s01",), ("s02",))}, {})
    improved = plan(layers, shards, in_order, load, policy)
    for planned in (first, improved):
        assert best_s * 0.999 <= planned.predicted_s_after <= best_s * WITHIN
    assert improved.predicted_s_after <= improved.predicted_s_before


@pytest.mark.parametrize("seed", range(4))
def test_predicted_times_are_those_of_the_linear_programme(seed: int) -> None:
    layers = [LayerSpec(0, 64, SIZE, 1)]
    shards = make_fleet(8, slots=10)
    load = skewed(layers, seed)
    planned = plan(layers, shards, None, load, ALL_DEVICES)
    for step in range(3):
        mean_E = load[0].mean_E
        homes = [[int(id[1:]) for id in ids] for ids in planned.homes[0]]
        best_s = least_maximum(homes, mean_E[:, None], 8) / mean_E.sum() * ALL_DEVICES.rows_per_step * 1e-6
        assert best_s * 0.999 <= planned.predicted_s_after <= best_s * 1.003
        assert planned.predicted_s_after * 8 >= ALL_DEVICES.rows_per_step * 1e-6  # The mean time is a lower bound.
        load = drifted(load, step)
        planned = plan(layers, shards, running(planned), load, ALL_DEVICES)


def test_the_cost_model_counts() -> None:
    """Check that a shard which is twice as fast gets twice as many rows."""
    layers = make_layers(1, 64, SIZE)
    shards = [
        replace(shard, cost_model=CostModel(0.0, 0.0, 0.5 if i == 0 else 1.0))
        for i, shard in enumerate(make_fleet(4, 40))
    ]
    load = {0: ExpectedLoad.steady(np.ones(64))}
    planned = plan(layers, shards, None, load, ALL_DEVICES)
    assert planned.predicted_s_after == pytest.approx(ALL_DEVICES.rows_per_step * 4 / 5 * 1e-6, rel=0.02)


def test_a_lost_shard_costs_no_cover_and_the_rest_stays_where_it_is() -> None:
    layers = make_layers(4, 64, SIZE)
    shards = make_fleet(8, slots=40)
    load = skewed(layers)
    before = plan(layers, shards, None, load)
    assert max(before.blast_radius_before.values()) == 0  # No shard holds an expert yet, so no expert can be lost.
    after = plan(layers, shards[:3] + shards[4:], running(before), load, PlanPolicy(min_gain=1.0))
    assert (after.cover_before, after.cover_after) == (1, 2)
    assert max(after.blast_radius_before.values()) > 0
    assert max(after.blast_radius_after.values()) == 0
    lost = sum(len(experts) for experts in running(before).experts_of("s03").values())
    lost += sum(len(experts) for experts in running(before).standby_of("s03").values())
    assert after.num_bytes <= lost * SIZE
    lost_homes = [(la, e) for la, homes in before.homes.items() for e, ids in enumerate(homes) if ids == ("s03",)]
    assert lost_homes
    assert all(set(after.homes[layer][expert]) & set(before.standby[layer][expert]) for layer, expert in lost_homes)
    assert "Cover: 0 of 256 experts have no live home" in after.describe()


def test_cover_is_repaired_whatever_it_costs() -> None:
    layers = make_layers(2, 32, SIZE)
    shards = make_fleet(4, slots=40)
    load = skewed(layers)
    before = plan(layers, shards, None, load)
    costly = PlanPolicy(bytes_per_s=1.0)
    after = plan(layers, shards[1:], running(before), load, costly)
    assert after.cover_after == 2
    assert after.cost_s > 1e6


def test_experts_without_any_home_come_first() -> None:
    layers = make_layers(1, 16, SIZE)
    shards = make_fleet(3, slots=20)
    homes = tuple(("gone",) if expert in (3, 5) else ("s00",) for expert in range(16))
    load = {0: ExpectedLoad.steady(np.where(np.arange(16) == 5, 9.0, 1.0))}
    planned = plan(layers, shards, Placement(1, {0: homes}, {}), load)
    assert next(move.expert for move in planned.moves if move.reason == "the expert has no live home or standby") == 5
    assert {move.expert for move in planned.moves[:2]} <= {3, 5}
    assert planned.cover_before == 0
    assert planned.cover_after == 2


def test_a_draining_shard_is_left() -> None:
    layers = make_layers(3, 32, SIZE)
    shards = make_fleet(5, slots=60)
    load = skewed(layers)
    before = plan(layers, shards, None, load)
    shards[2] = replace(shards[2], draining=True)
    after = plan(layers, shards, running(before), load)
    assert "s02" not in running(after).shard_ids
    assert after.cover_after == 2
    assert {move.reason for move in after.moves if move.shard_id == "s02"} == {"the shard drains"}


def test_a_draining_shard_keeps_what_nobody_has_room_for() -> None:
    layers = make_layers(1, 16, SIZE)
    shards = make_fleet(3, slots=6)
    load = skewed(layers)
    before = plan(layers, shards, None, load, ALL_DEVICES)
    shards[2] = replace(shards[2], draining=True)
    after = plan(layers, shards, running(before), load, ALL_DEVICES)
    check(after, layers, shards)
    assert all(after.homes[0])
    assert len(running(after).experts_of("s02")[0]) == 4
    assert any("4 experts stay on draining shards" in reason for reason in after.reasons)
    assert plan(layers, shards, running(after), load, ALL_DEVICES).moves == ()


def test_without_device_memory_the_coldest_stand_by() -> None:
    layers = make_layers(1, 16, SIZE)
    load = skewed(layers)
    planned = plan(layers, make_fleet(3, slots=4), None, load, ALL_DEVICES)
    without_home = [expert for expert, ids in enumerate(planned.homes[0]) if not ids]
    assert sorted(without_home) == sorted(np.argsort(load[0].mean_E)[:4].tolist())
    assert all(len(planned.standby[0][expert]) == 2 for expert in without_home)
    assert any("no device has room" in reason for reason in planned.reasons)


def test_cold_experts_make_way() -> None:
    layers = make_layers(1, 16, SIZE)
    shards = make_fleet(4, slots=4)
    load = {0: ExpectedLoad.steady(np.where(np.arange(16) < 2, 50.0, np.where(np.arange(16) < 12, 1.0, 0.001)))}
    homes = tuple((f"s{expert % 4:02}",) for expert in range(16))
    policy = PlanPolicy(headroom=0, cold_below=0.01, bytes_per_s=1e12)
    kept = plan(layers, shards, Placement(1, {0: homes}, {}), load, replace(policy, cold_below=0.0))
    freed = plan(layers, shards, Placement(1, {0: homes}, {}), load, policy)
    assert all(kept.homes[0])
    without_home = [expert for expert, ids in enumerate(freed.homes[0]) if not ids]
    assert without_home
    assert min(without_home) >= 12
    assert freed.predicted_s_after < 0.8 * kept.predicted_s_after
    assert freed.cover_after == 2


def test_a_new_shard_gets_the_hottest_experts() -> None:
    layers = make_layers(6, 64, SIZE)
    shards = make_fleet(5, slots=96)
    load = skewed(layers)
    before = plan(layers, shards[:4], None, load)
    after = plan(layers, shards, running(before), load)
    held = running(after).experts_of("s04")
    assert set(held) == set(range(6))
    for layer, experts in held.items():
        assert load[layer].mean_E[experts].mean() > 2 * load[layer].mean_E.mean()
    assert after.predicted_s_after < 0.9 * after.predicted_s_before
    assert plan(layers, shards, running(after), load).moves == ()


def test_budgets_that_shrank_are_kept() -> None:
    layers = make_layers(2, 32, SIZE)
    before = plan(layers, make_fleet(4, slots=40), None, skewed(layers))
    smaller = make_fleet(4, slots=20)
    after = plan(layers, smaller, running(before), skewed(layers))
    check(after, layers, smaller)
    assert after.cover_after == 2
    assert all(after.homes[layer][expert] for layer in range(2) for expert in range(32))


def test_headroom_stays_free() -> None:
    layers = make_layers(2, 32, SIZE)
    shards = make_fleet(4, slots=30)
    check(plan(layers, shards, None, skewed(layers)), layers, shards, headroom=SIZE)
    tight = make_fleet(4, slots=16)
    assert all(plan(layers, tight, None, skewed(layers)).homes[0])


def test_what_is_not_worth_its_bytes_is_refused() -> None:
    layers = make_layers(2, 64, SIZE)
    shards = make_fleet(8, slots=18)
    load = skewed(layers)
    before = plan(layers, shards, None, load, ALL_DEVICES)
    load = drifted(load, 3, 0.6)
    worthwhile = plan(layers, shards, running(before), load, ALL_DEVICES)
    assert worthwhile.is_worth_it
    assert worthwhile.num_bytes > 0
    assert worthwhile.predicted_s_after < worthwhile.predicted_s_before
    costly = plan(layers, shards, running(before), load, replace(ALL_DEVICES, bytes_per_s=1e3))
    assert costly.moves == ()
    assert costly.homes == before.homes
    picky = plan(layers, shards, running(before), load, replace(ALL_DEVICES, min_gain=0.9))
    assert not picky.is_worth_it
    assert picky.moves == ()
    assert any("Refused" in reason and "not worth moving for" in reason for reason in picky.reasons)


def test_a_small_drift_moves_nothing() -> None:
    layers = make_layers(4, 256, SIZE)
    shards = make_fleet(32, slots=36)
    load = skewed(layers)
    before = plan(layers, shards, None, load, ALL_DEVICES)
    assert plan(layers, shards, running(before), drifted(load, 0, 0.02), ALL_DEVICES).moves == ()


def test_host_memory_that_is_full_is_followed_by_disk() -> None:
    layers = make_layers(1, 32, SIZE)
    shards = make_fleet(4, slots=8, host_slots=2)
    planned = plan(layers, shards, None, skewed(layers), ALL_DEVICES)
    assert planned.cover_after == 2
    assert any("24.0 MiB of standbys do not fit into host memory" in reason for reason in planned.reasons)


def test_no_shard_has_far_more_on_disk_than_others() -> None:
    layers, shards = make_layers(3, 64, SIZE), make_fleet(8, 33, host_slots=0)
    first = plan(layers, shards, None, skewed(layers))
    counts = Counter(id for homes in first.standby.values() for ids in homes for id in ids)
    assert sum(counts.values()) > 100
    assert max(counts.values()) <= 2 * min(counts[shard.id] for shard in shards)


def test_a_home_that_gives_way_stands_by_where_it_was() -> None:
    layers = make_layers(1, 64, SIZE)
    shards = make_fleet(8, slots=9)
    load = skewed(layers)
    before = plan(layers, shards, None, load, ALL_DEVICES)
    after = plan(layers, shards, running(before), drifted(load, 4, 0.8), ALL_DEVICES)
    demoted = [move for move in after.moves if move.kind == "add" and move.tier == "standby" and not move.bytes]
    assert demoted
    assert all(move.shard_id in before.homes[0][move.expert] for move in demoted)


def test_one_shard() -> None:
    planned = plan(make_layers(), make_fleet(1), None, {})
    assert planned.cover_after == 1
    assert "One shard cannot give an expert two homes: start another shard." in planned.reasons


def test_bad_input_is_a_sentence() -> None:
    layers = make_layers(1, 8, SIZE)
    with pytest.raises(ValueError, match="There is no shard to place experts on"):
        plan(layers, [make_shard(0, draining=True)], None, {})
    with pytest.raises(ValueError, match="The load of layer 0 has 3 entries"):
        plan(layers, make_fleet(2), None, {0: ExpectedLoad.steady([1.0, 2.0, 3.0])})
    with pytest.raises(ValueError, match=r"The load of layer 0 has 8 entries, the least -1\.0"):
        plan(layers, make_fleet(2), None, {0: ExpectedLoad.steady([-1.0] + [1.0] * 7)})
    with pytest.raises(ValueError, match="The placement has 2 experts in layer 0, but the model has 8"):
        plan(layers, make_fleet(2), Placement(1, {0: (("s00",), ("s01",))}, {}), {})


def test_layers_at_once_are_planned_like_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, shards = make_layers(planner.MANY_LAYERS, 64, SIZE), make_fleet(8, slots=9 * planner.MANY_LAYERS)
    load, eager = skewed(layers), PlanPolicy(headroom=0, min_gain=0.0, stay_s=1e9)
    before, later = plan(layers, shards, None, load, eager), drifted(load, 1)
    at_once = plan(layers, shards, running(before), later, eager)
    assert at_once.homes != before.homes
    monkeypatch.setattr(planner, "MANY_LAYERS", len(layers) + 1)
    assert plan(layers, shards, running(before), later, eager) == at_once
