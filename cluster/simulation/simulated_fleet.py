"""The `SimFleet` holds a simulated fleet's shards, controllers, backbones and store, and starts and ends them.

All decisions are made by the real code: planner, migration, reconciler, follower and the layer call's state machine.
Only the parts that have a socket or a device are simulated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from cluster.control.leader.reconciler import ControllerTiming, Reconciler
from cluster.control.registry_store import StoreUnavailable
from cluster.load import ExpectedLoad
from cluster.placement.migration import Limits
from cluster.placement.plan import Plan, PlanPolicy
from cluster.placement.planner import plan
from cluster.simulation.simulated_backbone import SimBackbone
from cluster.simulation.simulated_network import SimNetwork
from cluster.simulation.simulated_process import InvariantViolated, SimProcess
from cluster.simulation.simulated_shards import BeforeDrop, OnDrop, RemoteShards, SimShard
from cluster.simulation.simulated_store import RemoteStore, SimStore, now
from cluster.topology import LayerSpec, Placement, Shard

MODEL, POOL = "simulated", "pool"
HEARTBEAT_S = 1.0
EXPERT_BYTES = 1 << 20
LIMITS = Limits(bytes_in_flight=3 * EXPERT_BYTES)
# With this policy a small gain is enough for a plan, so that many experts move.
RESTLESS = PlanPolicy(rows_per_step=2.0, risk=0.0, stay_s=1e6, min_gain=0.0, good_enough=0.999, aim=1.0)

# The callback receives the old placement or None, and the new placement.
OnPublish = Callable[[Placement | None, Placement], None]


@dataclass(frozen=True)
class Scenario:
    """A `Scenario` says what happens to a simulated fleet.

    Tests plant bugs in the fleet with `controller` and `is_fenced`.

    - `seed`: the seed of every random decision.
    - `num_faults`: how many faults happen.
    - `controller`: the class of the fleet's controllers.
    - `is_fenced`: if False, the store and the shards obey a leader that has been replaced.
    - `is_about_leaders`: if True, leaders may be stopped at the moment when they order a shard to drop experts.
    - `has_trace`: if True, every event of the simulation is printed.
    """

    seed: int
    num_faults: int = 3
    controller: type[Reconciler] = Reconciler
    is_fenced: bool = True
    is_about_leaders: bool = False
    has_trace: bool = False


class SimFleet:
    """A `SimFleet` consists of shards on nodes, controllers, backbones and a store; a seed fixes all random decisions.

    Three callbacks report what happens:

    - `on_publish`: a placement was stored.
    - `before_drop`: a controller is about to order a shard to drop experts.
    - `on_drop`: a shard has dropped experts.
    """

    limits = LIMITS
    forgetful_share = 0.3  # Share of plans that ignore the running placement; other plans move only few experts.

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = rng = Random(scenario.seed)
        self.network = SimNetwork(Random(scenario.seed + 1))
        self.store = SimStore(scenario.is_fenced)
        self.store.on_publish = self._publish
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
        self.num_epochs = 0
        self.error: str | None = None  # The first failure, or None.
        self.on_publish: OnPublish = lambda *_: None
        self.on_drop: OnDrop = lambda *_: None
        self.before_drop: BeforeDrop = lambda *_: None
        self._num_started = 0
        self._tasks: dict[SimProcess, list[asyncio.Task[Any]]] = {}

    def set_budget(self) -> None:
        """Set the shards' memory budget, so that the fleet has room for two homes of every expert and some more."""
        whole = sum(spec.num_experts * spec.expert_bytes for spec in self.layers)
        self.budget = min(whole, int(2.3 * whole / self.num_shards) + 2 * EXPERT_BYTES)

    @property
    def time(self) -> float:
        """Return the virtual seconds since the simulation began."""
        return asyncio.get_running_loop().time()

    def trace(self, event: str) -> None:
        """Print an event with its time, if the scenario asks for a trace."""
        if self.scenario.has_trace:
            print(f"{self.time:8.3f}  {event}")

    def fail(self, reason: str) -> None:
        """Record `reason` as the fleet's error, unless the fleet has an error already."""
        if self.error is None:
            self.error = f"at {self.time:.3f} s: {reason}"
            self.trace(f"BROKEN {reason}")

    def fail_for_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Record an error that no task has caught; the event loop calls this method as its exception handler."""
        error = context.get("exception")
        self.fail(str(error) if isinstance(error, InvariantViolated) else f"{context['message']}: {error!r}")

    # Starting parts

    def start(self) -> None:
        """Start the shards, two controllers and two backbones."""
        for i in range(self.num_shards):
            self.start_shard(self.nodes[i % len(self.nodes)])
        for name in ("c0", "c1"):
            self.start_controller(name)
        for name in ("b0", "b1"):
            self.start_backbone(name)

    def start_shard(self, node: str) -> SimShard:
        """Start a new, empty shard on a node."""
        self._num_started += 1
        id = f"s{self._num_started:02}"
        incarnation = f"i{self._num_started}"
        record = Shard(id, f"{id}:1", node, POOL, "cpu", incarnation, self.budget, host_budget=self.host_budget)
        shard = self.shards[id] = SimShard(record, self.layers, 0.01, self.scenario.is_fenced)
        self.start_task(shard, self._send_heartbeats(shard))
        return shard

    async def _send_heartbeats(self, shard: SimShard) -> None:
        store = RemoteStore(shard, self.store, self.network)
        while True:
            await shard.wait_until_running()
            with suppress(StoreUnavailable):
                await store.heartbeat(shard.record)
            if shard.used_bytes > self.budget:
                self.fail(f"{shard.name} holds {shard.used_bytes} bytes of {self.budget}")
            await asyncio.sleep(HEARTBEAT_S)

    def start_controller(self, name: str) -> None:
        """Start a controller, which takes the place of a dead controller of the same name."""
        process = self.controllers[name] = SimProcess(name)
        store = RemoteStore(process, self.store, self.network)
        remote = RemoteShards(process, self.shards, self.network, self._drop)
        remote.before_drop = self.before_drop
        timing = ControllerTiming(plan_every_s=3.0, failure_pause_s=3.0)
        controller = self.scenario.controller(
            name, MODEL, self.layers, {POOL: self.num_shards}, store, remote, self.plan, now, timing, self.limits
        )
        self.start_task(process, controller.run())

    def start_backbone(self, name: str) -> None:
        """Start a backbone, which makes layer calls from now on."""
        rng = Random(self.random.random())
        backbone = SimBackbone(name, MODEL, self.layers, self.shards, self.store, self.network, rng)
        self.backbones.append(backbone)
        self.start_task(backbone, backbone.run())

    def start_task(self, process: SimProcess, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task that is cancelled when `process` is killed; an error in the task fails the fleet."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._end_task)
        self._tasks.setdefault(process, []).append(task)

    def _end_task(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self.fail(str(error) if isinstance(error, InvariantViolated) else repr(error))

    # Ending parts

    def kill(self, process: SimProcess) -> None:
        """End a process at once."""
        self.trace(f"{process.name} is killed")
        process.is_up, process.died_at = False, self.time
        process.resume()
        for task in self._tasks.pop(process, []):
            task.cancel()

    def kill_all(self) -> None:
        """End every process that has running tasks."""
        for process in list(self._tasks):
            self.kill(process)

    def kill_shard(self, shard: SimShard) -> None:
        """End a shard, which breaks every backbone's connection to the shard."""
        self.kill(shard)
        for backbone in self.backbones:
            backbone.lose(shard)

    async def stop(self, process: SimProcess, seconds: float) -> None:
        """Stop `process` for some seconds, then resume `process`."""
        self.trace(f"{process.name} is stopped for {seconds:.1f} s")
        process.stop()
        await asyncio.sleep(seconds)
        if process.is_up:
            self.trace(f"{process.name} goes on")
        process.resume()

    # Load and plans

    async def plan(self, alive: Sequence[Shard], placement: Placement | None) -> Plan:
        """Plan with the real planner; some plans ignore the running placement, so that many experts move."""
        loads = {layer: ExpectedLoad.steady(popularity) for layer, popularity in self.popularity.items()}
        forgets = self.random.random() < self.forgetful_share
        return plan(self.layers, alive, None if forgets else placement, loads, self.policy)

    def shift_popularity(self) -> None:
        """Draw a new popularity for each expert."""
        for spec in self.layers:
            self.popularity[spec.layer] = [self.random.lognormvariate(0.0, 1.1) for _ in range(spec.num_experts)]

    async def keep_shifting_popularity(self) -> None:
        """Draw a new popularity for each expert every few seconds until cancelled."""
        while True:
            self.shift_popularity()
            await asyncio.sleep(self.random.uniform(1.0, 4.0))

    def _publish(self, placement: Placement) -> None:
        before, self.published = self.published, placement
        self.num_epochs += 1
        self.trace(f"epoch {placement.epoch % 10**7} is published")
        self.on_publish(before, placement)

    def _drop(self, shard: SimShard, dropped: set[tuple[int, int, str]], by: str) -> None:
        self.trace(f"{shard.name} drops {sorted(dropped)} for {by}")
        self.on_drop(shard, dropped, by)
