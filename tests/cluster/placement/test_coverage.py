"""The tests compare the array computations of coverage with simple loops."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cluster.placement.coverage import CoverageReport, HotExpert, PlacementArrays, Repair, balancedness
from cluster.topology import Homes, Placement

IDS = ("a", "b", "c", "d")


def random_placement(seed: int) -> Placement:
    draw = random.Random(seed)

    def homes(num_experts: int, least: int, most: int) -> Homes:
        return tuple(tuple(draw.sample(IDS[:2], draw.randint(least, most))) for _ in range(num_experts))

    standby = tuple(tuple(draw.sample(IDS[2:], draw.randint(0, 2))) for _ in range(5))
    return Placement(1, {3: homes(5, 1, 2), 7: homes(4, 1, 2)}, {}, standby={3: standby})


@pytest.mark.parametrize("seed", range(20))
def test_arrays_say_what_loops_say(seed: int) -> None:
    placement, draw = random_placement(seed), np.random.default_rng(seed)
    rates = {3: draw.random(5), 7: draw.random(4)}
    live = set(random.Random(seed).sample(IDS, 3))
    arrays = PlacementArrays(placement)
    report = CoverageReport(arrays, live)
    lost, loads, num_below = dict.fromkeys(placement.shard_ids, 0.0), np.zeros((2, len(placement.shard_ids))), 0
    missing = 0
    for place, layer in enumerate((3, 7)):
        for expert, ids in enumerate(placement.all_homes(layer)):
            live_ids = [id for id in ids if id in live]
            num_below += len(live_ids) < 2
            missing += max(0, 2 - len(live_ids))
            if len(live_ids) == 1:
                lost[live_ids[0]] += rates[layer][expert]
            for id in placement.homes[layer][expert]:
                share = rates[layer][expert] / len(placement.homes[layer][expert])
                loads[place, placement.shard_ids.index(id)] += share
    total = sum(float(rate.sum()) for rate in rates.values())
    rate_E = arrays.rates(rates)
    assert (len(report.below_cover), report.num_missing) == (num_below, missing)
    assert report.blast_radius(rate_E) == pytest.approx({id: rate / total for id, rate in lost.items()})
    np.testing.assert_allclose(arrays.loads(rate_E), loads)
    np.testing.assert_allclose(balancedness(loads), loads.mean(axis=1) / loads.max(axis=1))


def test_the_hottest_are_named_and_the_unused_are_not() -> None:
    arrays = PlacementArrays(Placement(1, {2: (("a",), ("a",)), 5: (("a",), ("a",), ("a",))}, {}))
    rate_E = arrays.rates({2: np.array([1.0, 0.0]), 5: np.array([0.0, 4.0, 1.0])})
    assert arrays.hottest(rate_E, 2) == [HotExpert(5, 1, 4.0), HotExpert(2, 0, 1.0)]
    assert arrays.hottest(rate_E, 99) == [HotExpert(5, 1, 4.0), HotExpert(2, 0, 1.0), HotExpert(5, 2, 1.0)]
    assert arrays.hottest(arrays.rates({}), 3) == []


def test_before_anything_is_picked_every_expert_counts_the_same() -> None:
    arrays = PlacementArrays(Placement(1, {0: (("a",), ("a", "b"), ("b",), ("b",))}, {}))
    assert CoverageReport(arrays, ["a", "b"]).blast_radius(arrays.rates({})) == {"a": 0.25, "b": 0.5}
    assert balancedness(arrays.loads(arrays.rates({}))).tolist() == [1.0]


def test_a_repair_is_timed_from_the_first_loss_to_full_cover() -> None:
    repair = Repair().note(False, 1.0)
    assert repair == Repair()
    assert repair.seconds_left(1.0, 4.0) is None
    repair = repair.note(True, 10.0).note(True, 12.0)
    assert repair.below_since == 10.0
    assert [repair.seconds_left(now, 4.0) for now in (12.0, 20.0)] == [2.0, 0.0]
    assert repair.note(False, 13.5) == Repair(None, 3.5, 1)
