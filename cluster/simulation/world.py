"""A fleet's life under a virtual clock, with every kind of failure, and what must hold all along.

`python -m cluster.simulation --seeds 1000` runs a thousand fleets; a seed that fails prints the command that repeats
it, and `--trace` tells its story. Planner, migration, controller, follower and the clients' state machine are the ones
that serve; the rest is `cluster.simulation.simulated_parts` and `cluster.simulation.simulated_backbone`. After the way FoundationDB and TigerBeetle
are tested.

What must hold: no placement is published that leaves an expert without a live home; no expert is dropped where the
placement, or that of a backbone that is up to date, names the shard as its home; epochs do not go backwards; every pick
of every call counts exactly once; no count of expert load is lost; no shard exceeds its budget; a call takes at most
`MAX_CALL_S`; and when failures have ended, the fleet comes to rest within `MAX_REST_S`: full cover, every shard holding
what the placement says and nothing else, every backbone on that placement.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

from cluster.control.leader.reconciler import ControllerTiming, Reconciler
from cluster.control.registry_store import StoreUnavailable
from cluster.load import ExpectedLoad
from cluster.placement.migration import Limits
from cluster.placement.plan import Plan, PlanPolicy
from cluster.placement.planner import plan
from cluster.simulation import virtual_time
from cluster.simulation.simulated_backbone import SimBackbone
from cluster.simulation.simulated_parts import (
    HEARTBEAT_S,
    Broken,
    RemoteShards,
    RemoteStore,
    SimNetwork,
    SimProcess,
    SimShard,
    SimStore,
    now,
)
from cluster.topology import Experts, LayerSpec, Placement, Shard

MODEL, POOL = "simulated", "pool"
CALM_S, FAULTS_S = 1.5, 5.0  # without failures at first, then with some
MAX_CALL_S = 20.0
MAX_REST_S = 40.0
UNSEEN_S = 1.5
MAX_LEAVE_S = 30.0  # as in services/expert/drain.py
EXPERT_BYTES = 1 << 20
LIMITS = Limits(bytes_in_flight=3 * EXPERT_BYTES)
# Plans for little gain, so that much is moved.
RESTLESS = PlanPolicy(rows_per_step=2.0, risk=0.0, stay_s=1e6, min_gain=0.0, good_enough=0.999, aim=1.0)

Key = tuple[int, int]  # layer, expert
Faults = Sequence[tuple[int, Callable[[], Coroutine[Any, Any, None]]]]


@dataclass(frozen=True)
class Scenario:
    """What happens to a fleet; tests plant bugs by another controller, or shards that obey anyone."""

    seed: int
    num_faults: int = 3
    controller: type[Reconciler] = Reconciler
    is_fenced: bool = True
    is_about_leaders: bool = False  # then one may be stopped at the moment when it has something dropped
    has_trace: bool = False


@dataclass(frozen=True)
class SimulationResult:
    seed: int
    error: str | None
    num_calls: int
    slowest_call_s: float
    num_epochs: int
    virtual_s: float


class World:
    """One fleet: shards on nodes, two controllers, backbones and a store."""

    limits = LIMITS
    forgetful_share = 0.3  # of plans that forget what runs, so that there is much to do: the planner moves little

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = rng = Random(scenario.seed)
        self.network = SimNetwork(Random(scenario.seed + 1))
        self.store = SimStore(scenario.is_fenced)
        self.store.on_publish = self.on_publish
        self.layers = [LayerSpec(layer, rng.choice((4, 6, 8)), EXPERT_BYTES, 2) for layer in range(rng.choice((1, 2)))]
        self.num_shards = rng.choice((3, 4, 5))
        self.nodes = [f"n{i}" for i in range(rng.choice((1, 2, 3)))]
        self.host_budget = rng.choice((0, 100 * EXPERT_BYTES))
        self.set_budget()
        self.popularity: dict[int, list[float]] = {}
        self.policy = replace(RESTLESS, is_device_cover=rng.random() < 0.7)
        self.shards: dict[str, SimShard] = {}
        self.controllers: dict[str, SimProcess] = {}
        self.backbones: list[SimBackbone] = []
        self.published: Placement | None = None
        self.error: str | None = None
        self.is_failing = True
        self.num_epochs = 0
        self._num_started = 0
        self._tasks: dict[SimProcess, list[asyncio.Task[Any]]] = {}

    def set_budget(self) -> None:
        """Room for two homes of everything, and some more."""
        whole = sum(spec.num_experts * spec.expert_bytes for spec in self.layers)
        self.budget = min(whole, int(2.3 * whole / self.num_shards) + 2 * EXPERT_BYTES)

    async def run(self) -> SimulationResult:
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        for i in range(self.num_shards):
            self.start_shard(self.nodes[i % len(self.nodes)])
        for name in ("c0", "c1"):
            self.start_controller(name)
        for name in ("b0", "b1"):
            self.start_backbone(name)
        shifting = asyncio.ensure_future(self._keep_shifting())
        await self.calm()
        await asyncio.gather(*(self._fault() for _ in range(self.scenario.num_faults)))
        shifting.cancel()
        self.is_failing = False
        ended_at = self.time
        while self.error is None and (unrest := self.unrest()) is not None:
            if self.time - ended_at > MAX_REST_S:
                self.fail(f"the fleet did not come to rest: {unrest}")
            await asyncio.sleep(0.5)
        self._check_loads()
        slowest = max(backbone.slowest_call_s for backbone in self.backbones)
        if slowest > MAX_CALL_S:
            self.fail(f"a call took {slowest:.1f} s")
        num_calls = sum(backbone.num_calls for backbone in self.backbones)
        for process in list(self._tasks):
            self._kill(process)
        return SimulationResult(self.scenario.seed, self.error, num_calls, slowest, self.num_epochs, self.time)

    async def calm(self) -> None:
        """Before the first failure, which may come before anything is placed."""
        await asyncio.sleep(CALM_S)

    @property
    def time(self) -> float:
        return asyncio.get_running_loop().time()

    def trace(self, event: str) -> None:
        if self.scenario.has_trace:
            print(f"{self.time:8.3f}  {event}")

    def fail(self, reason: str) -> None:
        if self.error is None:
            self.error = f"at {self.time:.3f} s: {reason}"
            self.trace(f"BROKEN {reason}")

    def _on_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.fail(str(error) if isinstance(error, Broken) else f"{context['message']}: {error!r}")

    # What there is

    def start_shard(self, node: str) -> SimShard:
        self._num_started += 1
        id = f"s{self._num_started:02}"
        start = f"i{self._num_started}"
        record = Shard(id, f"{id}:1", node, POOL, "cpu", start, self.budget, host_budget=self.host_budget)
        shard = self.shards[id] = SimShard(record, self.layers, 0.01, self.scenario.is_fenced)
        self._start(shard, self._beat(shard))
        return shard

    async def _beat(self, shard: SimShard) -> None:
        store = RemoteStore(shard, self.store, self.network)
        while True:
            await shard.runs()
            with suppress(StoreUnavailable):
                await store.heartbeat(shard.record)
            if shard.used_bytes > self.budget:
                self.fail(f"{shard.name} holds {shard.used_bytes} bytes of {self.budget}")
            await asyncio.sleep(HEARTBEAT_S)

    def start_controller(self, name: str) -> None:
        process = self.controllers[name] = SimProcess(name)
        store = RemoteStore(process, self.store, self.network)
        remote = RemoteShards(process, self.shards, self.network, self.on_drop)
        if self.scenario.is_about_leaders:
            remote.before_drop = self._maybe_stop
        timing = ControllerTiming(plan_every_s=3.0, failure_pause_s=3.0)
        controller = self.scenario.controller(
            name, MODEL, self.layers, {POOL: self.num_shards}, store, remote, self.plan, now, timing, self.limits
        )
        self._start(process, controller.run())

    def start_backbone(self, name: str) -> None:
        rng = Random(self.random.random())
        backbone = SimBackbone(name, MODEL, self.layers, self.shards, self.store, self.network, rng)
        self.backbones.append(backbone)
        self._start(backbone, backbone.run())

    def _start(self, process: SimProcess, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._on_end)
        self._tasks.setdefault(process, []).append(task)

    def _on_end(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self.fail(str(error) if isinstance(error, Broken) else repr(error))

    async def plan(self, alive: Sequence[Shard], placement: Placement | None) -> Plan:
        loads = {layer: ExpectedLoad.steady(popularity) for layer, popularity in self.popularity.items()}
        forgets = self.random.random() < self.forgetful_share
        return plan(self.layers, alive, None if forgets else placement, loads, self.policy)

    def _shift(self) -> None:
        """Other experts are popular from now on."""
        for spec in self.layers:
            self.popularity[spec.layer] = [self.random.lognormvariate(0.0, 1.1) for _ in range(spec.num_experts)]

    async def _keep_shifting(self) -> None:
        while True:
            self._shift()
            await asyncio.sleep(self.random.uniform(1.0, 4.0))

    # Failures

    def faults(self) -> Faults:
        """What may happen, and how often."""
        if self.scenario.is_about_leaders:
            return (1, self._drain), (1, self._grow)
        return (
            (4, self._kill_shard),
            (3, self._stop_shard),
            (3, self._kill_controller),
            (2, self._stop_controller),
            (1, self._stop_backbone),
            (1, self._kill_store),
            (1, self._stop_store),
            (2, self._wipe_store),
            (2, self._bad_network),
            (2, self._cut),
            (2, self._drain),
            (1, self._grow),
            (1, self._slow_shard),
            (1, self._corrupt_shard),
        )

    async def _fault(self) -> None:
        await asyncio.sleep(self.random.uniform(0, FAULTS_S))
        faults = self.faults()
        (fault,) = self.random.choices([fault for _, fault in faults], [weight for weight, _ in faults])
        await fault()

    def _kill(self, process: SimProcess) -> None:
        self.trace(f"{process.name} is killed")
        process.is_up, process.died_at = False, self.time
        process.resume()
        for task in self._tasks.pop(process, []):
            task.cancel()

    async def _stop(self, process: SimProcess, seconds: float) -> None:
        self.trace(f"{process.name} is stopped for {seconds:.1f} s")
        process.stop()
        await asyncio.sleep(seconds)
        if process.is_up:
            self.trace(f"{process.name} goes on")
        process.resume()

    def _some_shard(self) -> SimShard:
        """Of a fleet that has enough of them, or it is given one more."""
        live = [shard for shard in self.shards.values() if shard.is_up]
        return self.random.choice(live) if len(live) >= 3 else self.start_shard(self.random.choice(self.nodes))

    def _remove(self, shard: SimShard) -> None:
        self._kill(shard)
        for backbone in self.backbones:
            backbone.lose(shard)

    async def _kill_shard(self) -> None:
        shard = self._some_shard()
        self._remove(shard)
        await asyncio.sleep(self.random.uniform(0.3, 2.0))
        self.trace(f"{self.start_shard(shard.base.node).name} starts")

    async def _stop_shard(self) -> None:
        await self._stop(self._some_shard(), self.random.uniform(0.3, 8.0))

    async def _kill_controller(self) -> None:
        name = self.random.choice(sorted(self.controllers))
        self._kill(self.controllers[name])
        await asyncio.sleep(self.random.uniform(0.1, 3.0))
        if not self.controllers[name].is_up:
            self.start_controller(name)

    def _maybe_stop(self, process: SimProcess, experts: Experts) -> None:
        """Another leads for a while, and for it a home of what is about to be dropped dies."""
        if (
            self.is_failing
            and not process.is_stopped
            and self.random.random() < 0.5
            and self.published is not None
            and experts
        ):
            process.stop()
            self._start(process, self._stop(process, self.random.uniform(5.0, 8.0)))
            layer = self.random.choice(sorted(experts))
            homes = self.published.all_homes(layer)[self.random.choice(experts[layer])]
            if homes and self.shards[homes[0]].is_up:
                self._remove(self.shards[homes[0]])
                asyncio.get_running_loop().call_later(9.0, self.start_shard, self.nodes[0])

    async def _stop_controller(self) -> None:
        name = self.random.choice(sorted(self.controllers))
        await self._stop(self.controllers[name], self.random.uniform(0.5, 8.0))

    async def _stop_backbone(self) -> None:
        await self._stop(self.random.choice(self.backbones), self.random.uniform(0.5, 5.0))

    async def _kill_store(self) -> None:
        self.trace("the store is killed")
        self.store.process.is_up = False
        await asyncio.sleep(self.random.uniform(0.2, 5.0))
        if self.random.random() < 0.5:
            self.store.wipe()
        self.trace("the store is up again")
        self.store.process.is_up = True

    async def _stop_store(self) -> None:
        await self._stop(self.store.process, self.random.uniform(0.5, 5.0))

    async def _wipe_store(self) -> None:
        self.trace("the store loses everything")
        self.store.wipe()

    async def _bad_network(self) -> None:
        self.network.loss, self.network.repeats = self.random.uniform(0, 0.1), self.random.uniform(0, 0.1)
        self.trace(f"the network loses {self.network.loss:.0%}, repeats {self.network.repeats:.0%}")
        await asyncio.sleep(self.random.uniform(0.5, 4.0))
        self.network.loss = self.network.repeats = 0.0

    async def _cut(self) -> None:
        names = [*self.shards, *self.controllers, "b0", "b1", "store"]
        pair = frozenset(self.random.sample(sorted(names), 2))
        self.trace(f"{sorted(pair)} do not hear each other")
        self.network.cut.add(pair)
        await asyncio.sleep(self.random.uniform(0.5, 6.0))
        self.network.cut.discard(pair)

    async def _drain(self) -> None:
        """A shard leaves as it does when its pool shrinks, and another comes, so that there is room again."""
        shard = self._some_shard()
        self.trace(f"{shard.name} drains")
        self.start_shard(shard.base.node)
        shard.is_draining = True
        leaves_at = self.time + MAX_LEAVE_S
        while shard.is_up and self._names(shard.name) and self.time < leaves_at:
            await asyncio.sleep(0.5)
        if shard.is_up:
            self._remove(shard)

    def _names(self, shard_id: str) -> bool:
        return self.published is not None and shard_id in self.published.shard_ids

    async def _grow(self) -> None:
        self.trace(f"{self.start_shard(self.random.choice(self.nodes)).name} is new")

    async def _slow_shard(self) -> None:
        shard = self._some_shard()
        self.trace(f"{shard.name} is 20 times slower")
        shard.slowness = 20.0
        await asyncio.sleep(self.random.uniform(1.0, 5.0))
        shard.slowness = 1.0

    async def _corrupt_shard(self) -> None:
        shard = self._some_shard()
        self.trace(f"{shard.name} answers corrupt bytes")
        shard.is_corrupt = True
        await asyncio.sleep(self.random.uniform(1.0, 5.0))
        shard.is_corrupt = False

    # What must hold

    def _is_served(self, ids: Sequence[str], key: Key) -> bool:
        """Whether one of these shards has the expert; a death less than `UNSEEN_S` ago nobody can have known of."""
        shards = [self.shards[id] for id in ids if id in self.shards]
        return any((one.is_up or self.time - one.died_at < UNSEEN_S) and one.has(*key) for one in shards)

    def on_publish(self, placement: Placement) -> None:
        """After a placement was stored."""
        before, self.published = self.published, placement
        self.num_epochs += 1
        self.trace(f"epoch {placement.epoch % 10**7} is published")
        if before is None:
            return
        if placement.epoch < before.epoch and not self.store.was_wiped:
            self.fail(f"epoch {placement.epoch} was published after {before.epoch}")
        self.store.was_wiped = False
        if placement.epoch <= before.epoch:
            return
        for layer in placement.homes:
            for expert, ids in enumerate(placement.all_homes(layer)):
                old = before.all_homes(layer)[expert]
                if ids != old and self._is_served(old, (layer, expert)) and not self._is_served(ids, (layer, expert)):
                    self.fail(
                        f"epoch {placement.epoch} moves expert {layer}/{expert} from {old} to {ids}: no home has it"
                    )

    def on_drop(self, shard: SimShard, dropped: set[tuple[int, int, str]], by: str) -> None:
        """After a shard has let experts go."""
        self.trace(f"{shard.name} drops {sorted(dropped)} for {by}")
        frames = [(backbone.name, backbone.follower.placement) for backbone in self._up_to_date()]
        is_there = self.published is not None and self.store.registry.known_epoch == self.published.epoch
        for name, placement in [("the placement", self.published if is_there else None), *frames]:
            if placement is None:
                continue  # nobody knows of one
            for layer, expert, _ in sorted(dropped):
                if shard.name in placement.all_homes(layer)[expert]:
                    self.fail(f"{by} has {shard.name} drop expert {layer}/{expert}, for which {name} counts on it")

    def _up_to_date(self) -> list[SimBackbone]:
        """Backbones that the store knows as alive; others have been cut off, and wait when they come back."""
        known = self.store.registry.known_followers()
        return [backbone for backbone in self.backbones if backbone.name in known and not backbone.is_stopped]

    def _check_loads(self) -> None:
        kept = sum(self.store.loads.values())
        for backbone in self.backbones:
            kept += sum(int(counts.sum()) for counts in backbone.counter.take().values()) + backbone.counter.num_dropped
            kept += backbone.num_in_flight
        counted = sum(backbone.num_counted for backbone in self.backbones)
        if kept < counted:
            self.fail(f"{counted} picks were counted, but {kept} are left")

    def unrest(self) -> str | None:
        """Why the fleet has not come to rest, or None."""
        placement = self.published
        if placement is None:
            return "nothing is published"
        if self.store.registry.known_epoch != placement.epoch:
            return "the store has another placement"
        live = {id: shard for id, shard in self.shards.items() if shard.is_up}
        for backbone in self.backbones:
            if backbone.follower.epoch != placement.epoch:
                return f"{backbone.name} follows epoch {backbone.follower.epoch}"
            if late := [call for call in backbone.open_calls if self.time - call.started_at > 1.0]:
                return f"{backbone.name} waits for {len(late)} calls"
        if placement.cover(live) < 2:
            return f"cover is {placement.cover(live)}"
        for id, shard in live.items():
            if shard.record.held_digest != placement.digest_of(id):
                return f"{id} holds {sorted(shard.held)}, not what epoch {placement.epoch} says"
        return None


def run_scenario(scenario: Scenario) -> SimulationResult:
    """One fleet from its start to its rest."""
    return virtual_time.run(World(scenario).run())


def run_seeds(
    seeds: Sequence[int], num_processes: int, run: Callable[[int], SimulationResult]
) -> Iterator[SimulationResult]:
    """Every seed's outcome, in order."""
    with ProcessPoolExecutor(num_processes, initializer=quiet) as pool:
        yield from pool.map(run, seeds, chunksize=20)


def fix_hashes() -> None:
    """Starts the program anew where sets of strings have an order of chance: it is part of a fleet's life."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})


def quiet() -> None:
    """What the controller warns of is what is being done to it."""
    logging.disable(logging.ERROR)


def repeat_command(seed: int, num_faults: int) -> str:
    return f"python -m cluster.simulation --seed {seed} --faults {num_faults} --trace"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many fleets")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="one fleet only")
    parser.add_argument("--faults", type=int, default=3, help="failures in each life")
    parser.add_argument("--trace", action="store_true", help="tell what happens")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    fix_hashes()
    seeds = range(args.first, args.first + args.seeds) if args.seed is None else [args.seed]
    started, failed, calls, slowest, epochs, lived = time.perf_counter(), 0, 0, 0.0, 0, 0.0
    run = partial(_run, num_faults=args.faults, has_trace=args.trace)
    quiet()
    for outcome in run_seeds(seeds, args.processes, run) if len(seeds) > 1 else map(run, seeds):
        calls, epochs, lived = calls + outcome.num_calls, epochs + outcome.num_epochs, lived + outcome.virtual_s
        slowest = max(slowest, outcome.slowest_call_s)
        if outcome.error is not None:
            failed += 1
            print(f"seed {outcome.seed}: {outcome.error}\n  {repeat_command(outcome.seed, args.faults)}", flush=True)
    took = time.perf_counter() - started
    print(f"{len(seeds)} fleets, {lived / 3600:.1f} hours of their lives in {took:.0f} s: {calls} calls, the slowest")
    print(f"{slowest:.1f} s; {epochs} epochs; {failed} fleets failed.")
    sys.exit(1 if failed else 0)


def _run(seed: int, num_faults: int, has_trace: bool) -> SimulationResult:
    return run_scenario(Scenario(seed, num_faults, has_trace=has_trace))
