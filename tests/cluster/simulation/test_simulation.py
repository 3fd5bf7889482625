"""Test that the invariants hold in ten thousand simulated fleets, and that the simulation finds planted bugs."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import pytest

from cluster.control.leader.lease_keeper import MAX_TURN_S
from cluster.control.leader.reconciler import ControllerTiming, Reconciler
from cluster.control.registry_store import LEASE_TTL_S
from cluster.placement.migration import Home, Target
from cluster.placement.plan import Plan
from cluster.simulation import runner, virtual_time
from cluster.simulation.large_fleet import FleetSize, LargeWorld
from cluster.simulation.runner import run_scenario
from cluster.simulation.simulated_fleet import Scenario, SimFleet
from cluster.simulation.world import World
from cluster.topology import Placement, Shard

ROOT = Path(__file__).parents[3]
NUM_FLEETS = 10_000
MAX_SEEDS = 200  # Number of seeds within which a planted bug must be found.


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.simulation", *arguments]
    env = os.environ | {"NUMBA_CACHE_DIR": numba.config.CACHE_DIR}  # the planner that other tests have compiled
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.serial
@pytest.mark.timeout(900)
def test_ten_thousand_fleets_survive() -> None:
    done = simulate("--seeds", str(NUM_FLEETS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{NUM_FLEETS} fleets.* 0 fleets failed", done.stdout, re.DOTALL), done.stdout


def test_a_fleet_lives_the_same_life_again() -> None:
    lives = [simulate("--seed", "7", "--faults", "4", "--trace").stdout for _ in range(2)]
    events = [[line for line in life.splitlines() if "hours" not in line] for life in lives]
    assert events[0] == events[1]
    assert len(events[0]) > 5


@pytest.fixture
def silent_warnings() -> Iterator[None]:
    runner.silence_warnings()
    yield
    logging.disable(logging.NOTSET)


class DropsBeforeDrain(Reconciler):
    """A `DropsBeforeDrain` is a faulty controller: it drops experts although backbones may use an older epoch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.published.is_drained = lambda followed: True  # type: ignore[method-assign]


class PublishesBeforeLoad(Reconciler):
    """A `PublishesBeforeLoad` is a faulty controller: it publishes the target before shards have loaded the experts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        publish = self.published.publish

        async def publish_target(target: Target, gains: Mapping[int, int]) -> None:
            await publish(self.plans.target or target, gains)

        self.published.publish = publish_target  # type: ignore[method-assign]


class NeverRepairs(Reconciler):
    """A `NeverRepairs` is a faulty controller: it loads no experts once a placement is published."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        start_loads = self.work.start_loads

        def start_first_loads(known: Mapping[str, Shard], homes: Iterable[Home]) -> None:
            if self.placement is None:
                start_loads(known, homes)

        self.work.start_loads = start_first_loads  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (Scenario(0, controller=DropsBeforeDrain), r"drop expert .* for which b\d counts on it"),
        (Scenario(0, controller=PublishesBeforeLoad), r"moves expert .* no home has it"),
        (Scenario(0, controller=NeverRepairs), r"did not come to rest"),
        (
            Scenario(0, num_faults=8, is_fenced=False, is_about_leaders=True),
            r"drop expert|moves expert|was published after",
        ),
    ],
    ids=["drop before drain", "publish before load", "no repair", "no fencing"],
)
def test_a_planted_bug_is_found(broken: Scenario, found: str, silent_warnings: None) -> None:
    for seed in range(MAX_SEEDS):
        error = run_scenario(replace(broken, seed=seed)).error
        if error is not None and re.search(found, error):
            return
    pytest.fail(f"{MAX_SEEDS} fleets did not show it")


class SlowToPlan(SimFleet):
    """A `SlowToPlan` is a fleet in which making a plan takes longer than a controller's lease lasts."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.tokens: set[int] = set()

    async def plan(self, alive: Sequence[Shard], placement: Placement | None) -> Plan:
        self.tokens.add(self.store.registry.fencing)
        await asyncio.sleep(2 * LEASE_TTL_S)
        self.tokens.add(self.store.registry.fencing)
        return await super().plan(alive, placement)


def test_a_leader_that_plans_for_long_stays_the_leader() -> None:
    fleet = SlowToPlan(Scenario(seed=0, num_faults=0))
    outcome = virtual_time.run(World(fleet).run())
    assert outcome.error is None
    assert fleet.published is not None
    assert len(fleet.tokens) == 1


def test_a_leader_that_is_stuck_is_replaced() -> None:
    stuck: list[str] = []

    class Stuck(Reconciler):
        async def turn(self) -> None:
            await super().turn()
            if self.is_leader and not stuck:
                stuck.append(self.owner)
                await asyncio.sleep(1e9)

    fleet = SimFleet(Scenario(seed=1, num_faults=0, controller=Stuck))

    async def live() -> None:
        for name in ("c0", "c1"):
            fleet.start_controller(name)
        for _ in range(fleet.num_shards):
            fleet.start_shard("n0")
        await asyncio.sleep(MAX_TURN_S / 2)
        assert stuck
        assert fleet.published is None
        await asyncio.sleep(MAX_TURN_S / 2 + 3 * LEASE_TTL_S)
        assert fleet.published is not None

    virtual_time.run(live())


@pytest.mark.parametrize("hop_s", [0.6, 1.5])
def test_shards_that_answer_late_get_a_placement(hop_s: float) -> None:
    """Check a fleet on a busy machine, where each answer takes longer than the leader usually waits for answers."""
    fleet = SimFleet(Scenario(seed=1, num_faults=0))
    assert hop_s > ControllerTiming().answer_s
    fleet.network.hop_s = lambda: hop_s  # type: ignore[method-assign]

    async def live() -> None:
        fleet.start_controller("c0")
        for _ in range(fleet.num_shards):
            fleet.start_shard("n0")
        await asyncio.sleep(60)
        assert fleet.published is not None

    virtual_time.run(live())


def test_a_larger_fleet_lives_and_its_decisions_are_timed() -> None:
    world = LargeWorld(
        FleetSize(num_shards=24, num_experts=32, num_layers=3, top_k=4), seed=0, num_faults=2, has_trace=False
    )
    outcome = virtual_time.run(world.run())
    assert outcome.error is None
    assert world.fleet.published is not None
    assert len(world.fleet.published.shard_ids) >= 23
    assert world.times.plans_s
    assert max(world.times.turns_s) >= max(world.times.plans_s)
