"""Test the decisions on pool sizes, the prediction of busy shares, and the minimum size of a pool for its memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.control.scaling import (
    BusyShare,
    PendingChange,
    PoolPolicy,
    PoolState,
    busy_shares,
    desired_shards,
    min_shards_for_cover,
    predicted_share,
)
from cluster.cost_fit import RowsPerCall
from cluster.load import ExpectedLoad
from cluster.placement.plan import PlanPolicy
from cluster.placement.planner import plan
from cluster.topology import CostModel, Placement, Shard
from tests.cluster.fleet import make_layers, make_shard

POLICY = PoolPolicy(min_shards=2, max_shards=8, target_busy=0.6, slack=0.2)


def even_pool(num_shards: int, work: float, calls: float = 0.0, **options: object) -> PoolState:
    """Return a pool of `size` equally busy shards; `work` is the sum of the `work` shares of all shards."""
    shares = {f"s{i}": BusyShare(calls, work / num_shards) for i in range(num_shards)}
    pool = PoolState(num_shards, shares, min_for_cover=2)
    return replace(pool, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pool", "shards", "why"),
    [
        (even_pool(3, 1.5), 3, "busy for 50%"),  # Between the boundaries the size stays.
        (even_pool(3, 2.0), 4, "at a size of 3 the slowest is predicted to be busy for 67%"),
        (even_pool(3, 4.0), 7, "the goal is 60%"),  # A pool grows by several shards at a time.
        (even_pool(3, 90.0), 8, "busy for 3000%"),
        (even_pool(6, 0.0), 5, "with one shard less"),  # A pool shrinks by one shard at a time.
        (even_pool(2, 0.0), 2, "busy for 0%"),  # A pool does not shrink below its bounds.
        (
            even_pool(4, 0.0, min_for_cover=4),
            4,
            "busy for 0%",
        ),  # A pool keeps every expert twice.
        (even_pool(4, 0.0, is_settled=False), 4, "once the moves under way are done"),
        (even_pool(4, 0.0, min_for_cover=6), 6, "from 6 to 8 are possible"),
        (even_pool(4, 0.0, min_for_cover=20), 8, "from 8 to 8 are possible"),
        (even_pool(3, 0.9, calls=0.4), 5, "busy for 70%"),  # More shards do not reduce the cost of calls.
        (even_pool(3, 90.0, ordered=4), 4, "an operator ordered 4"),  # An order wins over the load.
        (even_pool(6, 1.0, ordered=2), 5, "an operator ordered 2"),  # An order removes one shard at a time, too.
        (even_pool(6, 1.0, ordered=2, is_settled=False), 6, "once the moves"),
        (even_pool(3, 1.0, ordered=20), 8, "an operator ordered 20; from 2 to 8 are possible"),
        (even_pool(4, 1.0, ordered=1, min_for_cover=4), 4, "an operator ordered 1; from 4 to 8 are possible"),
        (
            replace(even_pool(3, 1.5), size=4),
            4,
            "busy for 38%",
        ),  # One of four shards is dead, and the pool does not shrink because of that.
    ],
)
def test_decisions(pool: PoolState, shards: int, why: str) -> None:
    decision = desired_shards(pool, POLICY)
    assert decision.shards == shards, decision
    assert why in decision.why
    assert decision.is_ordered == (pool.ordered is not None)


def test_an_uneven_pool_goes_by_its_slowest_shard() -> None:
    uneven = {"a": BusyShare(0, 0.78), "b": BusyShare(0, 0.4), "c": BusyShare(0, 0.3)}
    assert predicted_share(uneven.values(), 3) == pytest.approx(0.78)
    assert desired_shards(PoolState(3, uneven, 2), POLICY).shards == 4
    new = {**uneven, "d": BusyShare(), "e": BusyShare()}  # Shards without work must not make the pool grow.
    assert predicted_share(new.values(), 5) == pytest.approx(0.78 * 3 / 5)
    assert desired_shards(PoolState(5, new, 2), POLICY).shards == 5


@pytest.mark.parametrize("seed", range(50))
def test_more_load_never_means_fewer_shards(seed: int) -> None:
    draw = np.random.default_rng(seed)
    size, num_live = draw.integers(2, 9), draw.integers(1, 9)
    works, calls = draw.lognormal(-1.5, 1.0, num_live), float(draw.uniform(0, 0.7))
    fewest, is_settled = int(draw.integers(1, 9)), bool(draw.integers(2))
    sizes = [
        desired_shards(
            PoolState(
                int(size),
                {str(i): BusyShare(calls * factor, float(work * factor)) for i, work in enumerate(works)},
                fewest,
                is_settled,
            ),
            POLICY,
        ).shards
        for factor in np.geomspace(0.01, 100, 200)
    ]
    assert sizes == sorted(sizes)
    assert min(fewest, 8) <= max(sizes) <= 8
    assert min(sizes) >= min(int(size) - 1, 8)


@pytest.mark.parametrize("seed", range(50))
def test_a_steady_load_settles_and_stays_even_where_it_trembles(seed: int) -> None:
    """Check that a pool of any size changes in one direction only and then stays, under a load that varies by 10 %."""
    draw = np.random.default_rng(seed)
    work, size, sizes = float(draw.uniform(0, 6)), int(draw.integers(2, 9)), list[int]()
    for _ in range(60):
        size = desired_shards(even_pool(size, work * draw.uniform(0.9, 1.0), calls=0.05), POLICY).shards
        sizes.append(size)
    steps = np.diff(sizes)
    assert (steps >= 0).all() or (steps <= 0).all()
    assert len(set(sizes[30:])) == 1


def test_a_change_must_be_pending_for_its_delay() -> None:
    policy = replace(POLICY, upscale_delay_s=5.0, downscale_delay_s=60.0)
    pending = PendingChange().updated(1, 100.0)
    assert not pending.updated(1, 104.0).is_due(104.0, policy)
    assert pending.updated(1, 105.0).is_due(105.0, policy)
    assert not pending.updated(0, 103.0).updated(1, 104.0).is_due(106.0, policy)  # The delay restarts.
    down = pending.updated(-1, 106.0)
    assert not down.is_due(165.0, policy)
    assert down.is_due(166.0, policy)
    assert not PendingChange().is_due(1e9, policy)


# The predicted share --------------------------------------------------------------------------------------------------


def fleet_of(num_shards: int, rows_per_call: float = 8.0, row_us: float = 20_000.0) -> list[Shard]:
    pace = CostModel(call_us=50.0, weight_us_per_mib=1e5, row_us_per_mib=row_us)
    return [replace(make_shard(i), cost_model=pace, rows_per_call=rows_per_call) for i in range(num_shards)]


def placed(shards: list[Shard]) -> Placement:
    made = plan(make_layers(), shards, None, {})
    return Placement(1, made.homes, {}, standby=made.standby)


def load_of(rows_per_s: float) -> dict[int, ExpectedLoad]:
    return {layer: ExpectedLoad.steady(np.full(32, rows_per_s * 4 / 32)) for layer in range(3)}


def test_the_share_is_what_the_planner_predicts_for_a_step_times_the_steps() -> None:
    shards = fleet_of(4)
    placement, load, policy = placed(shards), load_of(800.0), PlanPolicy(rows_per_step=8.0)
    per_step = plan(make_layers(), shards, placement, load, policy).predicted_s_before
    shares = busy_shares(make_layers(), shards, placement, load, PlanPolicy())  # The shards report 8 rows per call.
    assert max(share.total for share in shares.values()) == pytest.approx(100 * per_step, rel=0.02)
    assert shares["s00"].calls == pytest.approx(3 * 100 * 50e-6)


def test_no_load_means_no_work_and_draining_shards_are_left_out() -> None:
    shards = fleet_of(4)
    placement = placed(shards)
    idle = busy_shares(make_layers(), shards, placement, {}, PlanPolicy())
    assert {share.total for share in idle.values()} == {0.0}
    leaving = [replace(shards[0], draining=True), *shards[1:]]
    assert "s00" not in busy_shares(make_layers(), leaving, placement, load_of(100.0), PlanPolicy())


def test_a_shard_without_experts_is_not_called() -> None:
    shards = fleet_of(5)
    shares = busy_shares(make_layers(), shards, placed(shards[:4]), load_of(800.0), PlanPolicy())
    assert shares["s04"] == BusyShare()
    assert min(shares[f"s0{i}"].work for i in range(4)) > 0


def test_pools_side_by_side_decide_by_their_own_shards() -> None:
    """Check that only the pool with the lower target grows if there are two pools.

    The CPU pool is ten times slower than the GPU pool. The planner divides the rows so that the pools end together.
    """
    fast = [replace(shard, pool="experts-gpu", device="cuda") for shard in fleet_of(4)[:2]]
    slow = [
        replace(s, pool="experts-cpu", cost_model=replace(s.cost_model, row_us_per_mib=200_000.0))
        for s in fleet_of(4)[2:]
    ]
    shards = [*fast, *slow]
    shares = busy_shares(make_layers(), shards, placed(shards), load_of(4000.0), PlanPolicy())
    gpu, cpu = ({s.id: shares[s.id] for s in pool} for pool in (fast, slow))
    level = predicted_share(cpu.values(), 2)
    assert desired_shards(PoolState(2, gpu, 2), replace(POLICY, target_busy=1.5 * level)).shards == 2
    assert desired_shards(PoolState(2, cpu, 2), replace(POLICY, target_busy=0.8 * level)).shards > 2


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "host_budget", "num_others", "expected"),
    [
        (100 * 97, 0, 0, 2),  # Two shards that hold every expert and have room for one more.
        (100 * 96, 0, 0, 3),  # Without room for one more expert two shards do not suffice.
        (100 * 49, 0, 0, 4),
        (100 * 49, 0, 2, 2),  # The other pool's two shards hold one home of every expert.
        (100 * 97, 0, 4, 1),  # The other pool holds every expert twice.
        (100 * 49, 100 * 48, 0, 2),  # The second homes are in host memory.
        (100 * 25, 10**9, 0, 4),  # One home of every expert must be on a device.
        (100, 0, 0, 1),
    ],
)
def test_every_expert_keeps_two_homes(budget: int, host_budget: int, num_others: int, expected: int) -> None:
    pool = [replace(make_shard(i, memory_budget=budget), host_budget=host_budget) for i in range(3)]
    others = [make_shard(10 + i, memory_budget=budget) for i in range(num_others)]
    assert min_shards_for_cover(make_layers(), pool, others) == expected


def test_every_expert_keeps_two_homes_where_it_takes_more_memory() -> None:
    """Check a pool on GPUs, where an expert takes twice its stored bytes, beside a pool on CPUs."""
    layers = [replace(spec, device_bytes={"cuda": 200}, host_bytes={"cuda": 150}) for spec in make_layers()]
    gpus = [replace(make_shard(i, memory_budget=200 * 49), device="cuda") for i in range(3)]
    cpus = [make_shard(10 + i, memory_budget=100 * 49) for i in range(2)]
    assert [min_shards_for_cover(layers, gpus, others) for others in ([], cpus)] == [4, 2]
    assert min_shards_for_cover(layers, cpus, gpus[:2]) == 2
    with_hosts = [replace(gpu, host_budget=150 * 48) for gpu in gpus]
    assert min_shards_for_cover(layers, with_hosts, []) == 2


def test_the_mean_rows_of_a_call_follow_the_load() -> None:
    rows = RowsPerCall()
    assert rows.observe(0, 0) == 0.0
    assert rows.observe(100, 400) == 4.0
    assert 4.0 < rows.observe(100, 800) < 8.0
    for _ in range(50):
        rows.observe(200, 1600)
    assert rows.mean == pytest.approx(8.0, rel=0.01)
    assert rows.observe(0, 0) == rows.mean
