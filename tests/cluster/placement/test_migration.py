"""The tests run migration rounds on a simple fleet, in which each shard is the set of experts that it holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.placement.migration import (
    DEVICE,
    STANDBY,
    Holding,
    Home,
    Limits,
    Target,
    by_shard,
    leftovers,
    next_round,
    next_target,
)
from cluster.topology import LayerSpec, Placement, Shard
from tests.cluster.fleet import make_shard

BYTES = 100
LAYERS = [LayerSpec(0, 4, BYTES, 2)]


def target_of(homes: str, standby: str = "") -> Target:
    """Return the target that two texts describe: '01 12' puts expert 0 on s00 and s01, and expert 1 on s01 and s02."""

    def rows(text: str) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(f"s0{digit}" for digit in ids.strip("-")) for ids in text.split())

    return Target({0: rows(homes)}, {0: rows(standby)} if standby else {})


def published(target: Target, epoch: int = 1) -> Placement:
    return Placement(epoch, target.homes, {0: 0}, standby=target.standby)


def holdings(target: Target, *dead: int, num_shards: int = 4) -> dict[str, Holding]:
    """Return the holdings of shards that hold exactly what `target` says; the shards in `dead` are left out."""
    held: dict[str, set[tuple[int, int, str]]] = {f"s0{i}": set() for i in range(num_shards) if i not in dead}
    for home in target.all_homes():
        if home.shard_id in held:
            held[home.shard_id].add((home.layer, home.expert, home.tier))
    return {id: holding(experts) for id, experts in held.items()}


def holding(experts: set[tuple[int, int, str]]) -> Holding:
    return Holding(frozenset(experts), BYTES * sum(tier == DEVICE for _, _, tier in experts))


def shards(budget: int = 400, num_shards: int = 4) -> list[Shard]:
    return [make_shard(i, memory_budget=budget) for i in range(num_shards)]


def test_nothing_to_do_is_nothing() -> None:
    target = target_of("01 12 23 30")
    round_ = next_round(LAYERS, target, published(target), shards(), holdings(target))
    assert (round_.loads, round_.num_left) == (frozenset(), 0)
    assert next_target(target, published(target), round_, holdings(target)) is None
    assert leftovers(published(target), target, holdings(target))[0] == set()


def test_a_move_is_published_only_when_it_is_loaded_and_then_the_old_home_goes() -> None:
    before, target = target_of("01 12 23 30"), target_of("21 12 23 30")
    round_ = next_round(LAYERS, target, published(before), shards(), holdings(before))
    assert round_.loads == {Home(0, 0, "s02")}
    assert next_target(target, published(before), round_.without(round_.loads), holdings(before)) is None
    held = holdings(before)
    held["s02"] = holding({*held["s02"].experts, (0, 0, DEVICE)})
    after = next_target(target, published(before), round_, held)
    assert after == target
    assert leftovers(published(before), target, held)[0] == set()  # The published epoch still names the old home.
    assert leftovers(published(after), target, held)[0] == {Home(0, 0, "s00")}


def test_the_home_of_a_dead_shard_stays_named_until_it_is_replaced() -> None:
    before, target = target_of("01 12 23 30"), target_of("21 12 32 23")
    held = holdings(before, 0)
    round_ = next_round(LAYERS, target, published(before), shards()[1:], held)
    assert round_.loads == {Home(0, 0, "s02"), Home(0, 3, "s02")}
    half = round_.without([Home(0, 3, "s02")])
    held["s02"] = holding({*held["s02"].experts, (0, 0, DEVICE)})
    after = next_target(target, published(before), half, held)
    assert after is not None
    assert after.homes[0] == (("s02", "s01"), ("s01", "s02"), ("s03", "s02"), ("s03", "s00"))


def test_experts_with_fewest_homes_come_first() -> None:
    before, target = target_of("0 12 23 31"), target_of("01 12 23 31")
    larger_target = target_of("01 102 23 31")
    round_ = next_round(LAYERS, larger_target, published(before), shards(), holdings(before), Limits(bytes_in_flight=1))
    assert Home(0, 0, "s01") in round_.loads
    one_shard = target_of("02 12 23 312")
    round_ = next_round(LAYERS, one_shard, published(before), shards(), holdings(before), Limits(bytes_in_flight=1))
    assert round_.loads == {Home(0, 0, "s02")}
    assert round_.num_left == 1
    assert target != before


def test_bytes_in_flight_and_memory_bound_a_round() -> None:
    before, target = target_of("0 0 0 0"), target_of("01 01 01 01")
    for limit, expected in ((1, 1), (BYTES, 1), (2 * BYTES, 2), (3 * BYTES + 1, 3), (1 << 20, 4)):
        round_ = next_round(LAYERS, target, published(before), shards(), holdings(before), Limits(limit))
        assert (len(round_.loads), round_.num_left) == (expected, 4 - expected)
    round_ = next_round(LAYERS, target, published(before), shards(budget=400)[:1] + shards(250)[1:], holdings(before))
    assert len(round_.loads) == 2
    first = next_round(LAYERS, target, None, shards(), holdings(target_of("- - - -")), Limits(1))
    assert len(first.loads) == 8  # Nothing is published, so loading disturbs no request.


def test_memory_is_counted_as_the_device_of_a_shard_counts_it() -> None:
    """Check that a round fills a GPU by its slots, while the limit in flight is in bytes of the network."""
    layers = [LayerSpec(0, 4, BYTES, 2, device_bytes={"cuda": 3 * BYTES})]
    before, target = target_of("0 0 0 0"), target_of("01 01 01 01")
    on_gpu = [replace(shard, device="cuda") for shard in shards(budget=6 * BYTES)]
    held = holdings(before) | {"s00": Holding(holdings(before)["s00"].experts, 6 * BYTES)}
    limits = Limits(bytes_in_flight=4 * BYTES)
    round_ = next_round(layers, target, published(before), on_gpu, held, limits)
    assert (len(round_.loads), round_.num_left) == (2, 2)
    assert next_round(layers, target, published(before), shards(budget=6 * BYTES), held, limits).num_left == 0


def test_the_first_placement_is_published_when_it_is_complete() -> None:
    target = target_of("01 12 23 30")
    empty = holdings(target_of("- - - -"))
    round_ = next_round(LAYERS, target, None, shards(), empty)
    assert next_target(target, None, round_.without([Home(0, 0, "s00")]), empty) is None
    assert next_target(target, None, round_, empty) == target


def test_a_full_fleet_gives_up_one_second_home_to_make_room() -> None:
    before, target = target_of("01 01 23 23"), target_of("21 01 03 23")
    full = [make_shard(i, memory_budget=2 * BYTES) for i in range(4)]
    round_ = next_round(LAYERS, target, published(before), full, holdings(before))
    assert (round_.loads, round_.num_left) == (frozenset(), 2)
    after = next_target(target, published(before), round_, holdings(before))
    assert after is not None
    gave_up_first, gave_up_third = (
        (("s01",), *before.homes[0][1:]),
        (*before.homes[0][:2], ("s03",), before.homes[0][3]),
    )
    assert after.homes[0] in (gave_up_first, gave_up_third)


def test_a_home_that_goes_down_stands_by_before_it_leaves_the_device() -> None:
    before, target = target_of("01 12 23 30"), target_of("0 12 23 30", "1 - - -")
    held = holdings(before)
    round_ = next_round(LAYERS, target, published(before), shards(), held)
    assert not round_.loads  # s01 holds the expert already.
    assert leftovers(published(before), target, held)[1] == set()
    after = next_target(target, published(before), round_, held)
    assert after == target
    assert leftovers(published(after), target, held)[0] == set()
    assert leftovers(published(after), target, held)[1] == {Home(0, 0, "s01", STANDBY)}


def test_what_nobody_named_is_loaded_again_to_hear_who_leads() -> None:
    before, target = target_of("01 12 23 30"), target_of("01 12 23 30", "2 - - -")
    held = holdings(before)
    held["s02"] = holding({*held["s02"].experts, (0, 0, DEVICE)})  # An earlier leader left this home behind.
    round_ = next_round(LAYERS, target, published(before), shards(), held)
    assert round_.loads == {Home(0, 0, "s02", STANDBY)}
    assert next_target(target, published(before), round_.without(round_.loads), held) is None


def test_homes_by_shard() -> None:
    homes = {Home(1, 3, "b"), Home(0, 2, "b"), Home(1, 1, "b"), Home(0, 0, "a", STANDBY)}
    assert by_shard(homes, DEVICE) == {"b": {0: [2], 1: [1, 3]}}
    assert by_shard(homes, STANDBY) == {"a": {0: [0]}}


def random_target(rng: random.Random, num_shards: int, alive: list[int], num_experts: int, max_homes: int) -> Target:
    """Return random homes for all experts on the shards in `alive`, 2 to `max_homes` homes for each expert.

    With two homes each, the average shard would hold 2E/S experts (E experts, S shards), rounded up here. A shard that
    already holds more than this number gets no third or later home.
    """
    most = -(-2 * num_experts // len(alive)) + 1
    taken = dict.fromkeys(alive, 0)
    rows = []
    for _ in range(num_experts):
        free = sorted(alive, key=lambda shard: (taken[shard] >= most, rng.random()))
        chosen = free[: rng.randint(2, max_homes)]
        chosen = [shard for i, shard in enumerate(chosen) if i < 2 or taken[shard] < most]
        for shard in chosen:
            taken[shard] += 1
        rows.append(tuple(f"s0{shard}" for shard in chosen))
    return Target({0: tuple(rows)}, {})


def walk(seed: int) -> Iterator[int]:
    """Migrate from one random placement to another while loads fail at random; yield the cover after each round."""
    rng = random.Random(seed)
    num_experts, num_shards = rng.randint(2, 8), rng.randint(3, 5)
    layers = [LayerSpec(0, num_experts, BYTES, 1)]
    everyone = list(range(num_shards))
    before = random_target(rng, num_shards, everyone, num_experts, 2)
    target = random_target(rng, num_shards, everyone, num_experts, 3)
    used = [held.used_bytes for one in (before, target) for held in holdings(one, num_shards=num_shards).values()]
    fleet = [make_shard(i, memory_budget=max(used) + BYTES * rng.randint(0, 2)) for i in range(num_shards)]
    placement, held = published(before), holdings(before, num_shards=num_shards)
    for epoch in range(2, 200):
        round_ = next_round(layers, target, placement, fleet, held, Limits(rng.choice((1, 200, 1 << 20))))
        done = round_.without([home for home in round_.loads if rng.random() < 0.3])
        for home in done.loads:
            held[home.shard_id] = holding({*held[home.shard_id].experts, (home.layer, home.expert, home.tier)})
        assert all(held[shard.id].used_bytes <= shard.memory_budget for shard in fleet)
        if after := next_target(target, placement, done, held):
            placement = published(after, epoch)
        for home in leftovers(placement, target, held)[0]:
            held[home.shard_id] = holding({*held[home.shard_id].experts} - {(home.layer, home.expert, home.tier)})
        live = [
            sum(Home(0, expert, id) in {Home(*one[:2], id, one[2]) for one in held[id].experts} for id in ids)
            for expert, ids in enumerate(placement.homes[0])
        ]
        yield min(live)
        if Target.of(placement) == target:
            return
    raise AssertionError("the migration does not reach its target in 198 rounds")


@pytest.mark.parametrize("seed", range(300))
def test_every_walk_arrives_and_leaves_no_expert_alone(seed: int) -> None:
    covers = list(walk(seed))
    assert min(covers) >= 1
    assert covers[-1] >= 2
