from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.topology import CostModel, Placement, Shard, held_digest
from tests.cluster.fleet import make_shard

PLACEMENT = Placement(7, {1: (("a", "b"), ("b", "c")), 4: (("c", "a"), ("a",))}, {1: -3, 4: 2})
STANDBY = Placement(8, {1: (("a",), ())}, {1: 0}, standby={1: (("b",), ("b", "a"))})


def test_a_placement_survives_json() -> None:
    assert Placement.from_json(PLACEMENT.to_json()) == PLACEMENT
    assert Placement.from_json(Placement(1, {}, {}).to_json()) == Placement(1, {}, {})
    assert Placement.from_json(STANDBY.to_json()) == STANDBY


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"epoch":1,"shards":[],"homes":{"1":[[0]]},"gains":{}}', "null"])
def test_a_broken_placement_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="stored placement is not a JSON object with the keys epoch"):
        Placement.from_json(text)


def test_experts_of_a_shard_and_cover() -> None:
    assert PLACEMENT.experts_of("a") == {1: [0], 4: [0, 1]}
    assert PLACEMENT.experts_of("b") == {1: [0, 1]}
    assert PLACEMENT.experts_of("nobody") == {}
    assert PLACEMENT.cover() == 1
    assert PLACEMENT.cover(live={"b", "c"}) == 0
    assert PLACEMENT.shard_ids == ("a", "b", "c")


def test_standing_by_is_cover() -> None:
    assert STANDBY.all_homes(1) == (("a", "b"), ("b", "a"))
    assert (STANDBY.experts_of("a"), STANDBY.standby_of("a")) == ({1: [0]}, {1: [1]})
    assert (STANDBY.cover(), STANDBY.cover(live={"a"}), STANDBY.shard_ids) == (2, 1, ("a", "b"))
    assert STANDBY.digest_of("a") == held_digest({1: [0]}, {1: [1]}) != held_digest({1: [0, 1]})


def test_an_expert_has_no_home_twice() -> None:
    for homes, standby in (((("a", "a"),), {}), ((("a",),), {0: (("a",),)})):
        with pytest.raises(AssertionError):
            Placement(1, {0: homes}, {}, standby=standby)


@pytest.mark.parametrize("draining", [False, True])
def test_a_shard_survives_its_record(draining: bool) -> None:
    cost_model = CostModel(12.5, 0.1, 3e-7)
    shard = replace(
        make_shard(1), held_digest="abc", num_held=12, queue_depth=3, draining=draining, cost_model=cost_model
    )
    assert Shard.from_record(shard.to_record()) == shard


def test_a_broken_record_names_the_field() -> None:
    record = make_shard(1).to_record()
    with pytest.raises(ValueError, match="has no field 'endpoint'"):
        Shard.from_record({name: value for name, value in record.items() if name != "endpoint"})
    with pytest.raises(ValueError, match="'num_held' of a shard record is '-1'"):
        Shard.from_record(record | {"num_held": "-1"})
    with pytest.raises(ValueError, match="'call_us' of a shard record is 'nan', but it must be a number from 0 up"):
        Shard.from_record(record | {"call_us": "nan"})


def test_the_digest_names_a_set_of_experts() -> None:
    digest = held_digest({1: [3, 2], 5: [0]})
    assert digest == held_digest({5: (0,), 1: {2, 3}}) == held_digest({1: [2, 3], 5: [0], 6: []})
    assert digest != held_digest({1: [3], 5: [0]})
