"""The `World` simulates a fleet under a virtual clock: the fleet starts, suffers faults, and must come to rest.

FoundationDB and TigerBeetle are tested in the same way. A seed determines every random decision, so that a simulation
that failed can be repeated. `cluster.simulation.runner` runs simulations from the command line, and
`cluster.simulation.invariants` lists what must hold.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cluster.simulation.faults import Faults
from cluster.simulation.invariants import Invariants
from cluster.simulation.simulated_fleet import SimFleet

CALM_S = 1.5  # Seconds without faults at the start. Some fleets publish no placement in this time.


@dataclass(frozen=True)
class SimulationResult:
    """A `SimulationResult` describes one simulation; `error` names the invariant that did not hold, or is None."""

    seed: int
    error: str | None
    num_calls: int
    slowest_call_s: float
    num_epochs: int
    virtual_s: float


class World:
    """A `World` is a fleet with the faults that it suffers and the invariants that must hold in the fleet."""

    def __init__(self, fleet: SimFleet, faults: Faults | None = None) -> None:
        self.fleet = fleet
        self.faults = faults or Faults(fleet)
        self.invariants = Invariants(fleet)

    async def run(self) -> SimulationResult:
        """Run the fleet from its start until the fleet is at rest, and return the result."""
        fleet, invariants = self.fleet, self.invariants
        asyncio.get_running_loop().set_exception_handler(fleet.fail_for_error)
        fleet.start()
        shifting = asyncio.ensure_future(fleet.keep_shifting_popularity())
        await self.wait_for_calm()
        await self.faults.happen()
        shifting.cancel()
        await invariants.wait_for_rest()
        invariants.check_loads()
        invariants.check_calls()
        num_calls = sum(backbone.num_calls for backbone in fleet.backbones)
        fleet.kill_all()
        seed = fleet.scenario.seed
        return SimulationResult(seed, fleet.error, num_calls, invariants.slowest_call_s, fleet.num_epochs, fleet.time)

    async def wait_for_calm(self) -> None:
        """Wait at the start of the simulation until faults may begin."""
        await asyncio.sleep(CALM_S)
