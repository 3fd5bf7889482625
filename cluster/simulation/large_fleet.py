"""One large fleet's life under the virtual clock, and the real seconds that its controller takes to decide.

`python -m cluster.simulation.large_fleet` has 1,000 shards with 88 layers of 512 experts, and takes several minutes. Once all
is placed, shards and controllers die, shards drain and shards come. What is run and what must hold are those of
`cluster.simulation.world`.
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
from cluster.simulation.world import EXPERT_BYTES, Faults, Scenario, World, fix_hashes, quiet
from cluster.topology import LayerSpec, Placement, Shard

SHARDS_OF_NODE = 8
LOOK_S = 0.001  # of computing; a turn that does no more had nothing to do


@dataclass(frozen=True)
class Size:
    """Of a fleet; experts are those of a layer."""

    num_shards: int = 1000
    num_experts: int = 512
    num_layers: int = 88
    top_k: int = 22


@dataclass
class Decisions:
    """How long plans took, and turns of the controllers, plans included, in real seconds."""

    plans_s: list[float] = field(default_factory=list)
    turns_s: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        told = (
            f"{len(times)} {what}, median {statistics.median(times):.2f} s, at most {max(times):.2f} s"
            for what, times in (("plans", self.plans_s), ("turns with something to do", self.turns_s))
            if times
        )
        return "; ".join(told)


def timed(decisions: Decisions) -> type[Reconciler]:
    """A controller that notes how long its turns compute."""

    class TimedReconciler(Reconciler):
        async def turn(self) -> None:
            computed_s = await _computing(super().turn())
            if computed_s > LOOK_S:
                decisions.turns_s.append(computed_s)

    return TimedReconciler


@types.coroutine
def _computing(work: Coroutine[Any, Any, None]) -> Generator[Any, Any, float]:
    """Does the work, and tells the real seconds it took apart from those in which others ran."""
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


class LargeWorld(World):
    """A fleet of a given size, with room for two homes of everything on devices."""

    forgetful_share = 0.0
    limits = Limits()

    def __init__(self, size: Size, seed: int, num_faults: int, has_trace: bool) -> None:
        self.decisions = Decisions()
        super().__init__(Scenario(seed, num_faults, controller=timed(self.decisions), has_trace=has_trace))
        experts = (size.num_experts, EXPERT_BYTES, size.top_k)
        self.layers = [LayerSpec(layer, *experts) for layer in range(size.num_layers)]
        self.num_shards, self.host_budget = size.num_shards, 0
        self.nodes = [f"n{i}" for i in range(max(2, size.num_shards // SHARDS_OF_NODE))]
        self.set_budget()
        self.policy = PlanPolicy()

    async def _keep_shifting(self) -> None:
        """Experts stay as popular as they are: what is to be moved is for the failures to say."""
        self._shift()

    async def calm(self) -> None:
        """Until all is placed."""
        while self.error is None and self.unrest() is not None:
            await asyncio.sleep(0.5)
        self.trace("all is placed")

    def faults(self) -> Faults:
        return (2, self._kill_shard), (1, self._kill_controller), (1, self._drain), (1, self._grow)

    async def plan(self, alive: Sequence[Shard], placement: Placement | None) -> Plan:
        started = time.perf_counter()
        made = await super().plan(alive, placement)
        self.decisions.plans_s.append(time.perf_counter() - started)
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("shards", 1000), ("experts", 512), ("layers", 88)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=4, help="failures in its life")
    parser.add_argument("--trace", action="store_true", help="tell what happens")
    args = parser.parse_args()
    fix_hashes()
    quiet()
    world = LargeWorld(Size(args.shards, args.experts, args.layers), args.seed, args.faults, args.trace)
    started = time.perf_counter()
    outcome = virtual_time.run(world.run())
    took_s = time.perf_counter() - started
    print(f"{outcome.virtual_s:.0f} s of its life in {took_s:.0f} s: {outcome.num_epochs} epochs, {outcome.num_calls}")
    print(f"calls, the slowest {outcome.slowest_call_s:.1f} s. {world.decisions}.")
    print(outcome.error or "All that must hold held.")
    sys.exit(1 if outcome.error else 0)


if __name__ == "__main__":
    main()
