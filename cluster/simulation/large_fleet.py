"""Run one large fleet under the virtual clock, and measure the real seconds that the controllers take to decide.

`python -m cluster.simulation.large_fleet` simulates 1,000 shards with 88 layers of 512 experts, and takes several
minutes. When every shard holds its experts, the faults begin: shards and controllers die, shards drain, and new shards
start. The parts of the fleet and the invariants come from `cluster.simulation.world`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
import types
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cluster.control.leader.reconciler import Reconciler
from cluster.placement.migration import Limits
from cluster.placement.plan import Plan, PlanPolicy
from cluster.simulation import virtual_time
from cluster.simulation.faults import Fault, Faults
from cluster.simulation.runner import fix_hash_seed, silence_warnings
from cluster.simulation.simulated_fleet import EXPERT_BYTES, Scenario, SimFleet
from cluster.simulation.world import World
from cluster.topology import LayerSpec, Placement, Shard

SHARDS_OF_NODE = 8  # Shards that run on one node.
MIN_COMPUTING_S = 0.001  # Seconds. A turn that computes for a shorter time had nothing to do and is not counted.


@dataclass(frozen=True)
class FleetSize:
    """A `FleetSize` gives the numbers of shards, experts and layers of a fleet; `num_experts` is per layer."""

    num_shards: int = 1000
    num_experts: int = 512
    num_layers: int = 88
    top_k: int = 22


@dataclass
class DecisionTimes:
    """A `DecisionTimes` holds the real seconds of each plan and of each turn; a turn's time includes its plan."""

    plans_s: list[float] = field(default_factory=list)
    turns_s: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        parts = (
            f"{len(times)} {what}, median {statistics.median(times):.2f} s, at most {max(times):.2f} s"
            for what, times in (("plans", self.plans_s), ("turns with something to do", self.turns_s))
            if times
        )
        return "; ".join(parts)


def timed_reconciler(times: DecisionTimes) -> type[Reconciler]:
    """Return a subclass of `Reconciler` that records in `times` how long each turn computes."""

    class TimedReconciler(Reconciler):
        """A `TimedReconciler` is a `Reconciler` that measures how long each turn computes."""

        async def turn(self) -> None:
            computed_s = await _computing_s(super().turn())
            if computed_s > MIN_COMPUTING_S:
                times.turns_s.append(computed_s)

    return TimedReconciler


@types.coroutine
def _computing_s(work: Coroutine[Any, Any, None]) -> Generator[Any, Any, float]:
    """Await `work` and return the real seconds that `work` computed; the time of other tasks does not count."""
    took_s, step = 0.0, partial(work.send, None)
    while True:
        started = time.perf_counter()
        try:
            awaited = step()
        except StopIteration:
            return took_s + time.perf_counter() - started
        took_s += time.perf_counter() - started
        try:
            step = partial(work.send, (yield awaited))
        except BaseException as error:
            step = partial(work.throw, error)


class LargeFleet(SimFleet):
    """A `LargeFleet` is a `SimFleet` of a given size, with device memory for two homes of every expert."""

    forgetful_share = 0.0
    limits = Limits()

    def __init__(self, size: FleetSize, scenario: Scenario, times: DecisionTimes) -> None:
        super().__init__(scenario)
        self.times = times
        experts = (size.num_experts, EXPERT_BYTES, size.top_k)
        self.layers = [LayerSpec(layer, *experts) for layer in range(size.num_layers)]
        self.num_shards, self.host_budget = size.num_shards, 0
        self.nodes = [f"n{i}" for i in range(max(2, size.num_shards // SHARDS_OF_NODE))]
        self.set_budget()
        self.policy = PlanPolicy()

    async def keep_shifting_popularity(self) -> None:
        """Draw the popularity once, so that only faults give the planner a reason to move experts."""
        self.shift_popularity()

    async def plan(self, alive: Sequence[Shard], placement: Placement | None) -> Plan:
        """Plan as `SimFleet.plan` does, and record the real seconds that the planner took."""
        started = time.perf_counter()
        made = await super().plan(alive, placement)
        self.times.plans_s.append(time.perf_counter() - started)
        return made


class LargeFleetFaults(Faults):
    """The `LargeFleetFaults` are the faults that change the fleet, because every change makes the leader plan again."""

    def weighted(self) -> Sequence[tuple[int, Fault]]:
        """Return, for each fault that may happen, the pair (relative frequency, fault)."""
        return (2, self.kill_shard), (1, self.kill_controller), (1, self.drain_shard), (1, self.add_shard)


class LargeWorld(World):
    """A `LargeWorld` runs a `LargeFleet` and measures the real time that the controllers' decisions take."""

    def __init__(self, size: FleetSize, seed: int, num_faults: int, has_trace: bool) -> None:
        self.times = DecisionTimes()
        scenario = Scenario(seed, num_faults, controller=timed_reconciler(self.times), has_trace=has_trace)
        fleet = LargeFleet(size, scenario, self.times)
        super().__init__(fleet, LargeFleetFaults(fleet))

    async def wait_for_calm(self) -> None:
        """Wait until the first placement is published and every shard holds its experts of this placement."""
        while self.fleet.error is None and self.invariants.unrest() is not None:
            await asyncio.sleep(0.5)
        self.fleet.trace("all is placed")


def main() -> None:
    """Run the command line; exit with 1 if an invariant did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("shards", 1000), ("experts", 512), ("layers", 88)):
        help_text = f"Number of {name}{' per layer' if name == 'experts' else ''}."
        parser.add_argument(f"--{name}", type=int, default=default, help=help_text)
    parser.add_argument("--seed", type=int, default=0, help="Seed of all random decisions.")
    parser.add_argument("--faults", type=int, default=4, help="Number of faults that happen to the fleet.")
    parser.add_argument("--trace", action="store_true", help="Print the events of the fleet.")
    args = parser.parse_args()
    fix_hash_seed()
    silence_warnings()
    world = LargeWorld(FleetSize(args.shards, args.experts, args.layers), args.seed, args.faults, args.trace)
    started = time.perf_counter()
    result = virtual_time.run(world.run())
    took_s = time.perf_counter() - started
    print(f"{result.virtual_s:.0f} virtual s in {took_s:.0f} s: {result.num_epochs} epochs, {result.num_calls}")
    print(f"calls, the slowest {result.slowest_call_s:.1f} s. {world.times}.")
    print(result.error or "All invariants held.")
    sys.exit(1 if result.error else 0)


if __name__ == "__main__":
    main()
