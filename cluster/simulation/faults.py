"""The `Faults` kill and stop the processes of a simulated fleet, break its network, and add and drain shards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from cluster.simulation.simulated_fleet import SimFleet
from cluster.simulation.simulated_process import SimProcess
from cluster.simulation.simulated_shards import SimShard
from cluster.topology import Experts

FAULTS_S = 5.0  # Seconds within which all faults begin.
MAX_DRAIN_S = 30.0  # Seconds after which a draining shard ends in any case, as in services/expert/drain.py.
MIN_LIVE_SHARDS = 3  # If fewer shards are alive, a fault that needs a shard gets a new shard.

Fault = Callable[[], Coroutine[Any, Any, None]]


class Faults:
    """The `Faults` of a fleet are drawn with the fleet's random numbers, so that the seed determines the faults."""

    def __init__(self, fleet: SimFleet) -> None:
        self.fleet, self.random = fleet, fleet.random
        self.are_over = False
        if fleet.scenario.is_about_leaders:
            fleet.before_drop = self._stop_some_leaders

    def weighted(self) -> Sequence[tuple[int, Fault]]:
        """Return, for each fault that may happen, the pair (relative frequency, fault)."""
        if self.fleet.scenario.is_about_leaders:
            return (1, self.drain_shard), (1, self.add_shard)
        return (
            (4, self.kill_shard),
            (3, self.stop_shard),
            (3, self.kill_controller),
            (2, self.stop_controller),
            (1, self.stop_backbone),
            (1, self.kill_store),
            (1, self.stop_store),
            (2, self.wipe_store),
            (2, self.degrade_network),
            (2, self.cut_network),
            (2, self.drain_shard),
            (1, self.add_shard),
            (1, self.slow_shard),
            (1, self.corrupt_shard),
        )

    async def happen(self) -> None:
        """Let all faults of the scenario happen, and return when the last fault has ended."""
        await asyncio.gather(*(self._happen_once() for _ in range(self.fleet.scenario.num_faults)))
        self.are_over = True

    async def _happen_once(self) -> None:
        await asyncio.sleep(self.random.uniform(0, FAULTS_S))
        faults = self.weighted()
        (fault,) = self.random.choices([fault for _, fault in faults], [weight for weight, _ in faults])
        await fault()

    # Shards

    def _draw_shard(self) -> SimShard:
        """Draw a live shard at random, or start a new shard if fewer than `MIN_LIVE_SHARDS` shards are alive."""
        live = [shard for shard in self.fleet.shards.values() if shard.is_up]
        if len(live) >= MIN_LIVE_SHARDS:
            return self.random.choice(live)
        return self.fleet.start_shard(self.random.choice(self.fleet.nodes))

    async def kill_shard(self) -> None:
        """Kill a shard, and start another shard on the same node after a while."""
        shard = self._draw_shard()
        self.fleet.kill_shard(shard)
        await asyncio.sleep(self.random.uniform(0.3, 2.0))
        self.fleet.trace(f"{self.fleet.start_shard(shard.base.node).name} starts")

    async def stop_shard(self) -> None:
        """Stop a shard for a while."""
        await self.fleet.stop(self._draw_shard(), self.random.uniform(0.3, 8.0))

    async def slow_shard(self) -> None:
        """Make a shard slow for a while."""
        shard = self._draw_shard()
        self.fleet.trace(f"{shard.name} is 20 times slower")
        shard.slowness = 20.0
        await asyncio.sleep(self.random.uniform(1.0, 5.0))
        shard.slowness = 1.0

    async def corrupt_shard(self) -> None:
        """Make a shard answer with wrong checksums for a while."""
        shard = self._draw_shard()
        self.fleet.trace(f"{shard.name} answers corrupt bytes")
        shard.is_corrupt = True
        await asyncio.sleep(self.random.uniform(1.0, 5.0))
        shard.is_corrupt = False

    async def drain_shard(self) -> None:
        """Drain a shard as a shrinking pool does, and start another shard to make room for the experts."""
        shard = self._draw_shard()
        self.fleet.trace(f"{shard.name} drains")
        self.fleet.start_shard(shard.base.node)
        shard.is_draining = True
        ends_at = self.fleet.time + MAX_DRAIN_S
        while shard.is_up and self._is_placed(shard.name) and self.fleet.time < ends_at:
            await asyncio.sleep(0.5)
        if shard.is_up:
            self.fleet.kill_shard(shard)

    def _is_placed(self, shard_id: str) -> bool:
        return self.fleet.published is not None and shard_id in self.fleet.published.shard_ids

    async def add_shard(self) -> None:
        """Start one more shard on a node that is drawn at random."""
        self.fleet.trace(f"{self.fleet.start_shard(self.random.choice(self.fleet.nodes)).name} is new")

    # Controllers and backbones

    async def kill_controller(self) -> None:
        """Kill a controller, and start a controller of the same name after a while."""
        name = self.random.choice(sorted(self.fleet.controllers))
        self.fleet.kill(self.fleet.controllers[name])
        await asyncio.sleep(self.random.uniform(0.1, 3.0))
        if not self.fleet.controllers[name].is_up:
            self.fleet.start_controller(name)

    async def stop_controller(self) -> None:
        """Stop a controller for a while."""
        name = self.random.choice(sorted(self.fleet.controllers))
        await self.fleet.stop(self.fleet.controllers[name], self.random.uniform(0.5, 8.0))

    def _stop_some_leaders(self, process: SimProcess, experts: Experts) -> None:
        """With probability 1/2, stop a leader that is about to drop `experts`, and kill a home of one of these experts.

        Another controller then leads and relies on the remaining homes. When the old leader resumes, its order to drop
        experts would remove a home that is now needed. The shard must refuse this order.
        """
        fleet = self.fleet
        if (
            not self.are_over
            and not process.is_stopped
            and self.random.random() < 0.5
            and fleet.published is not None
            and experts
        ):
            process.stop()
            fleet.start_task(process, fleet.stop(process, self.random.uniform(5.0, 8.0)))
            layer = self.random.choice(sorted(experts))
            homes = fleet.published.all_homes(layer)[self.random.choice(experts[layer])]
            if homes and fleet.shards[homes[0]].is_up:
                fleet.kill_shard(fleet.shards[homes[0]])
                asyncio.get_running_loop().call_later(9.0, fleet.start_shard, fleet.nodes[0])

    async def stop_backbone(self) -> None:
        """Stop a backbone for a while."""
        await self.fleet.stop(self.random.choice(self.fleet.backbones), self.random.uniform(0.5, 5.0))

    # Store and network

    async def kill_store(self) -> None:
        """Kill the store, and start the store again after a while; with probability 1/2 the store is then empty."""
        store = self.fleet.store
        self.fleet.trace("the store is killed")
        store.process.is_up = False
        await asyncio.sleep(self.random.uniform(0.2, 5.0))
        if self.random.random() < 0.5:
            store.wipe()
        self.fleet.trace("the store is up again")
        store.process.is_up = True

    async def stop_store(self) -> None:
        """Stop the store for a while, so that no process gets an answer from the store."""
        await self.fleet.stop(self.fleet.store.process, self.random.uniform(0.5, 5.0))

    async def wipe_store(self) -> None:
        """Make the store lose its data."""
        self.fleet.trace("the store loses everything")
        self.fleet.store.wipe()

    async def degrade_network(self) -> None:
        """Make the network lose and repeat messages for a while."""
        network = self.fleet.network
        network.loss, network.repeats = self.random.uniform(0, 0.1), self.random.uniform(0, 0.1)
        self.fleet.trace(f"the network loses {network.loss:.0%}, repeats {network.repeats:.0%}")
        await asyncio.sleep(self.random.uniform(0.5, 4.0))
        network.loss = network.repeats = 0.0

    async def cut_network(self) -> None:
        """Cut the network between two processes for a while."""
        names = [*self.fleet.shards, *self.fleet.controllers, "b0", "b1", "store"]
        pair = frozenset(self.random.sample(sorted(names), 2))
        self.fleet.trace(f"{sorted(pair)} do not hear each other")
        self.fleet.network.cut.add(pair)
        await asyncio.sleep(self.random.uniform(0.5, 6.0))
        self.fleet.network.cut.discard(pair)
