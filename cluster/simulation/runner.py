"""Run many simulated fleets, each from its own seed, and report the fleets in which an invariant did not hold.

`python -m cluster.simulation --seeds 1000` runs a thousand fleets. If a fleet fails, the runner prints the command that
simulates this fleet again. The option `--trace` prints the events of each fleet.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from cluster.simulation import virtual_time
from cluster.simulation.simulated_fleet import Scenario, SimFleet
from cluster.simulation.world import SimulationResult, World


def run_scenario(scenario: Scenario) -> SimulationResult:
    """Simulate the fleet of `scenario` from its start until it is at rest, and return the result."""
    return virtual_time.run(World(SimFleet(scenario)).run())


def run_seeds(
    seeds: Sequence[int], num_processes: int, run: Callable[[int], SimulationResult]
) -> Iterator[SimulationResult]:
    """Yield the result of `run` for every seed, in the order of `seeds`; `num_processes` processes share the work."""
    with ProcessPoolExecutor(num_processes, initializer=silence_warnings) as pool:
        yield from pool.map(run, seeds, chunksize=20)


def fix_hash_seed() -> None:
    """Restart this program with a fixed hash seed if it has no fixed hash seed.

    The order of a set of strings depends on the hash seed, and a simulation depends on the order of its sets.
    """
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})


def silence_warnings() -> None:
    """Disable all log messages below CRITICAL, because controllers warn about every simulated fault."""
    logging.disable(logging.ERROR)


def repeat_command(seed: int, num_faults: int) -> str:
    """Return the command that simulates the fleet of `seed` again and prints its events."""
    return f"python -m cluster.simulation --seed {seed} --faults {num_faults} --trace"


def main() -> None:
    """Run the command line; exit with 1 if an invariant did not hold in at least one fleet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="Number of fleets to run.")
    parser.add_argument("--first", type=int, default=0, help="First seed; the other seeds are the numbers after it.")
    parser.add_argument("--seed", type=int, help="Run only the fleet of this seed.")
    parser.add_argument("--faults", type=int, default=3, help="Number of faults that happen to each fleet.")
    parser.add_argument("--trace", action="store_true", help="Print the events of each fleet.")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="Number of processes.")
    args = parser.parse_args()
    fix_hash_seed()
    seeds = range(args.first, args.first + args.seeds) if args.seed is None else [args.seed]
    started, failed, calls, slowest, epochs, lived = time.perf_counter(), 0, 0, 0.0, 0, 0.0
    run = partial(_run_seed, num_faults=args.faults, has_trace=args.trace)
    silence_warnings()
    for result in run_seeds(seeds, args.processes, run) if len(seeds) > 1 else map(run, seeds):
        calls, epochs, lived = calls + result.num_calls, epochs + result.num_epochs, lived + result.virtual_s
        slowest = max(slowest, result.slowest_call_s)
        if result.error is not None:
            failed += 1
            print(f"seed {result.seed}: {result.error}\n  {repeat_command(result.seed, args.faults)}", flush=True)
    took = time.perf_counter() - started
    print(f"{len(seeds)} fleets, {lived / 3600:.1f} virtual hours in {took:.0f} s: {calls} calls, the slowest")
    print(f"{slowest:.1f} s; {epochs} epochs; {failed} fleets failed.")
    sys.exit(1 if failed else 0)


def _run_seed(seed: int, num_faults: int, has_trace: bool) -> SimulationResult:
    return run_scenario(Scenario(seed, num_faults, has_trace=has_trace))
