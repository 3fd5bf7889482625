from __future__ import annotations

import numpy as np
import pytest

from cluster.first_placement import first_placement
from cluster.topology import LayerSpec, Placement
from tests.cluster.fleet import balancedness, make_layers, make_shard, shard_loads

SKEW = 1.1  # of a lognormal popularity that looks like the published traces


def skewed_load(num_layers: int, num_experts: int) -> dict[int, list[float]]:
    rng = np.random.default_rng(0)
    return {layer: rng.lognormal(0, SKEW, num_experts).tolist() for layer in range(num_layers)}


@pytest.mark.parametrize("num_shards", [2, 3, 5, 8])
def test_every_expert_has_two_homes_and_every_shard_an_even_part(num_shards: int) -> None:
    shards = [make_shard(i) for i in range(num_shards)]
    load = skewed_load(3, 64)
    homes = first_placement(make_layers(3, 64), shards, load)
    placement = Placement(1, homes, {})
    assert placement.cover() == 2
    for layer in range(3):
        num_held = [len(placement.experts_of(shard.id)[layer]) for shard in shards]
        assert max(num_held) - min(num_held) <= 1
        assert balancedness(shard_loads(homes[layer], load[layer], placement.shard_ids)) > 0.97


def test_the_order_of_the_shards_does_not_matter() -> None:
    shards = [make_shard(i) for i in range(5)]
    load = skewed_load(3, 32)
    assert first_placement(make_layers(), shards, load) == first_placement(make_layers(), shards[::-1], load)


@pytest.mark.parametrize("nodes", ["ab", "aab", "aaab", "aabbc", "abcabcab"])
def test_homes_are_on_different_nodes(nodes: str) -> None:
    shards = [make_shard(i, node) for i, node in enumerate(nodes)]
    node_of = {shard.id: shard.node for shard in shards}
    for homes in first_placement(make_layers(), shards).values():
        assert all(len({node_of[id] for id in ids}) == 2 for ids in homes)


def test_cover_on_shards_comes_before_nodes_without_memory() -> None:
    small = make_shard(2, "b", memory_budget=500)
    homes = first_placement(make_layers(1), [make_shard(0, "a"), make_shard(1, "a"), small])
    placement = Placement(1, homes, {})
    assert placement.cover() == 2
    assert len(placement.experts_of(small.id)[0]) == 5


def test_one_shard_gives_one_home() -> None:
    placement = Placement(1, first_placement(make_layers(), [make_shard(0)]), {})
    assert placement.cover() == 1
    assert first_placement(make_layers(), [make_shard(0), make_shard(1, draining=True)])[0][0] == ("s00",)


def test_budgets_are_filled_to_the_last_byte() -> None:
    layers = make_layers(6, 32, 100)
    homes = first_placement(layers, [make_shard(i, memory_budget=12_800) for i in range(3)], skewed_load(6, 32))
    assert Placement(1, homes, {}).cover() == 2
    with pytest.raises(ValueError, match=r"need 38,400 bytes, but the 3 shards have room for 38,397"):
        first_placement(layers, [make_shard(i, memory_budget=12_799) for i in range(3)])


@pytest.mark.parametrize("seed", range(20))
def test_budgets_hold_for_uneven_fleets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = [LayerSpec(layer, 24, int(rng.integers(50, 200)), 2) for layer in range(4)]
    needed = 2 * sum(spec.num_experts * spec.expert_bytes for spec in layers)
    budgets = (rng.dirichlet(np.ones(6) * 4) * needed * 1.6).astype(int).tolist()
    shards = [make_shard(i, f"node{i % 3}", budget) for i, budget in enumerate(budgets)]
    placement = Placement(1, first_placement(layers, shards, skewed_load(4, 24)), {})
    assert placement.cover() == 2
    for shard in shards:
        used = sum(
            len(experts) * layers[layer].expert_bytes for layer, experts in placement.experts_of(shard.id).items()
        )
        assert used <= shard.memory_budget


def test_a_large_model_is_planned_quickly_and_well() -> None:
    layers = make_layers(40, 512, 11_000_000)
    shards = [make_shard(i, f"node{i // 8}", 10**12) for i in range(32)]
    load = skewed_load(40, 512)
    homes = first_placement(layers, shards, load)
    ids = [shard.id for shard in shards]
    assert np.mean([balancedness(shard_loads(homes[layer], load[layer], ids)) for layer in range(40)]) > 0.97


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="There is no shard to place experts on"):
        first_placement(make_layers(), [])
    with pytest.raises(ValueError, match="The load of layer 0 has 3 entries"):
        first_placement(make_layers(), [make_shard(0)], {0: [1.0, 2.0, 3.0]})


def test_balancedness() -> None:
    assert balancedness([2.0, 2.0]) == 1.0
    assert balancedness([3.0, 1.0]) == pytest.approx(2 / 3)
    assert balancedness([0.0, 0.0]) == balancedness([]) == 1.0
