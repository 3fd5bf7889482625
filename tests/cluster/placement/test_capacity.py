from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.placement.capacity import check_capacity
from cluster.placement.planner import plan
from cluster.topology import Placement
from tests.cluster.fleet import make_layers, make_shard


def test_two_homes_fit_to_the_last_byte() -> None:
    layers = make_layers(6, 32, 100)
    check_capacity(layers, [make_shard(i, memory_budget=12_800) for i in range(3)], 2)
    with pytest.raises(ValueError, match=r"192 experts with 2 homes each need 38,400 bytes, but .* room for 38,100"):
        check_capacity(layers, [make_shard(i, memory_budget=12_799) for i in range(3)], 2)


def test_the_second_home_may_be_in_host_memory_but_not_the_first() -> None:
    layers = make_layers(6, 32, 100)
    check_capacity(layers, [make_shard(i, memory_budget=6_400, host_budget=6_400) for i in range(3)], 2)
    with pytest.raises(ValueError, match=r"need 19,200 bytes on devices, but the 3 shards have room for 18,900"):
        check_capacity(layers, [make_shard(i, memory_budget=6_399, host_budget=99_999) for i in range(3)], 2)


def test_one_large_shard_does_not_make_up_for_a_second() -> None:
    layers = make_layers(6, 32, 100)
    with pytest.raises(ValueError, match=r"need 38,400 bytes, but the 2 shards have room for 29,200"):
        check_capacity(layers, [make_shard(0, memory_budget=99_999), make_shard(1, memory_budget=10_000)], 2)


def test_one_shard_has_one_home_of_each() -> None:
    check_capacity(make_layers(6, 32, 100), [make_shard(0, memory_budget=19_200)], 2)


def test_where_there_is_some_more_room_the_planner_finds_two_homes() -> None:
    layers = make_layers(6, 32, 100)
    shards = [make_shard(i, memory_budget=14_080) for i in range(3)]
    check_capacity(layers, shards, 2)
    made = plan(layers, shards, None, {})
    assert Placement(1, made.homes, made.standby).cover() == 2


def test_an_expert_may_take_more_memory_on_a_gpu() -> None:
    """Check experts of 100 bytes that take 400 bytes on a GPU and 110 bytes as standbys there."""
    wide = {"device_bytes": {"cuda": 400}, "host_bytes": {"cuda": 110}}
    layers = [replace(spec, **wide) for spec in make_layers(6, 32, 100)]
    gpus = [replace(make_shard(i, memory_budget=25_600, host_budget=7_040), device="cuda:0") for i in range(3)]
    check_capacity(layers, gpus, 2)
    with pytest.raises(ValueError, match=r"need 76,800 bytes on devices, but the 3 shards have room for 75,600"):
        check_capacity(layers, [replace(gpu, memory_budget=25_599) for gpu in gpus], 2)
    with pytest.raises(ValueError, match=r"need 153,600 bytes, but the 3 shards have room for 152,4"):
        check_capacity(layers, [replace(gpu, host_budget=7_039) for gpu in gpus], 2)
    check_capacity(layers, [*gpus[:2], make_shard(2, memory_budget=19_200)], 2)
    with pytest.raises(ValueError, match=r"need 153,600 bytes, but the 3 shards have room for 15"):
        check_capacity(layers, [*gpus[:2], make_shard(2, memory_budget=12_000)], 2)
