"""The benchmark measures how failures of shards, stores, controllers and backbones affect running requests.

    python -m benchmarks.failures --trials 30

The benchmark starts `expertmesh up` with the demo model and three shards, and measures how many requests per second the
server can serve. Then the benchmark sends the same greedy and seeded requests at a steady rate again and again: first
in an undisturbed run without failures, and then in every trial. In a trial, a process fails at a random moment. Each
answer must have the same text and the same number of tokens as in the undisturbed run. A line of the table describes
one kind of failure:

- the number of requests, of failed requests and of requests with a different answer;
- the longest gap between two pieces of an answer: median and maximum of the trials, and maximum of the undisturbed run;
- the share of the undisturbed run's tokens that did not arrive in the seconds after the failure;
- the time until every expert had two live homes again;
- the time until as many shards and backbones ran as before. A new process first keeps one CPU core busy for several
  seconds, and then it must load experts or weights.

The benchmark kills and stops the server's processes from outside; the server has no code for this benchmark. To make a
shard 20 times slower, the benchmark stops the shard's process for 19 of every 20 ms. The shard that returns corrupt
bytes is a fourth shard, which joins the server only for the trials with corrupt bytes. Trials that kill a backbone use
a separate server with two backbones.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.corrupt_shard import CORRUPT_S
from benchmarks.load import closed_loop
from benchmarks.server import Server, new_client, server
from services.cli.drill.drill import Disturbance, Load, under_load
from services.cli.drill.load import RequestOutcome
from services.cli.drill.verdict import Verdict

NUM_SHARDS = 3
SECONDS = 12.0  # duration of the load in one trial
AT_S = (1.0, 4.0)  # earliest and latest failure, in seconds after the load's start
MAX_TOKENS = 48
LOAD_SHARE = 0.5  # request rate of a trial, divided by the highest rate that the server reached
STOP_S = 10.0
SLOW_S, SLOW_STEP_S = 6.0, 0.02
SHARD, CONTROLLER, STORE, BACKBONE = "experts-cpu", "controller", "-server", "backbone"
CORRUPT = "a shard that returns corrupt bytes for 6 s"
TIMEOUT_S = 120.0

FailureAction = Callable[["ServerProcesses"], Awaitable[None]]


@dataclass
class ServerProcesses:
    """`ServerProcesses` finds a server's processes by their kind and kills, stops or slows them."""

    server: Server
    random: random.Random
    corrupt: subprocess.Popen[bytes] | None = None
    num_killed: int = 0  # number of shards killed in the current trial

    async def pids_of(self, kind: str) -> list[int]:
        """Return the process ids of the server's processes whose name ends with `kind`."""
        # Another thread reads the names, because Linux may need a second to return the name of a process that starts.
        # If the event loop waited for a name, the client would notice answers too late.
        names = await asyncio.to_thread(self.server.processes)
        pids = sorted(pid for pid, name in names.items() if name.split(".")[0].endswith(kind))
        assert pids, f"no process of the server is called {kind}: {names}"
        return pids

    async def random_pid(self, kind: str) -> int:
        """Return the process id of a random process whose name ends with `kind`."""
        return self.random.choice(await self.pids_of(kind))

    async def store_url(self) -> str:
        """Read the store's address from the command line of the store's process, and return the Redis URL."""
        words = Path(f"/proc/{await self.random_pid(STORE)}/cmdline").read_bytes().decode().replace("\0", " ").split()
        return f"redis://{next(word for word in words if word.startswith('127.0.0.1:'))}/0"

    @asynccontextmanager
    async def with_corrupt_shard(self) -> AsyncIterator[None]:
        """Run a fourth shard during the block; SIGUSR1 makes the shard corrupt its replies.

        The block starts when the shard holds experts. After the block, the shard hands its experts over and stops.
        """
        command = [sys.executable, "-m", "benchmarks.corrupt_shard", await self.store_url()]
        self.corrupt = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            await wait_for_full_cover(self.server.url, NUM_SHARDS + 1)
            yield
        finally:
            self.corrupt.terminate()
            self.corrupt.wait()
            self.corrupt = None
            await wait_for_full_cover(self.server.url, NUM_SHARDS)

    async def kill(self, kind: str) -> None:
        self.num_killed += kind == SHARD
        os.kill(await self.random_pid(kind), signal.SIGKILL)

    async def stop(self, kind: str, seconds: float) -> None:
        pid = await self.random_pid(kind)
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)

    async def slow_down(self, kind: str) -> None:
        pid, stop_at = await self.random_pid(kind), time.monotonic() + SLOW_S
        while time.monotonic() < stop_at:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.95 * SLOW_STEP_S)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.05 * SLOW_STEP_S)


async def kill_shard(processes: ServerProcesses) -> None:
    await processes.kill(SHARD)


async def stop_shard(processes: ServerProcesses) -> None:
    await processes.stop(SHARD, STOP_S)


async def slow_shard(processes: ServerProcesses) -> None:
    await processes.slow_down(SHARD)


async def kill_store(processes: ServerProcesses) -> None:
    await processes.kill(STORE)  # the store restarts empty


async def stop_store(processes: ServerProcesses) -> None:
    await processes.stop(STORE, STOP_S)


async def kill_controller_in_a_migration(processes: ServerProcesses) -> None:
    """Kill a shard, and then kill the leader while the leader moves the homes of the lost shard to other shards.

    The leader starts this migration when the lost shard's heartbeat has expired.
    """
    await processes.kill(SHARD)
    await asyncio.sleep(processes.random.uniform(2.5, 4.0))
    leader = (await asyncio.to_thread(processes.server.status)).get("leader")
    os.kill(int(leader.split("-")[-2]) if leader else await processes.random_pid(CONTROLLER), signal.SIGKILL)


async def kill_shard_and_store(processes: ServerProcesses) -> None:
    await processes.kill(SHARD)
    await asyncio.sleep(processes.random.uniform(0.0, 1.0))
    await processes.kill(STORE)


async def corrupt_shard(processes: ServerProcesses) -> None:
    assert processes.corrupt is not None
    processes.corrupt.send_signal(signal.SIGUSR1)
    await asyncio.sleep(CORRUPT_S)


async def kill_backbone(processes: ServerProcesses) -> None:
    await processes.kill(BACKBONE)


async def stop_backbone(processes: ServerProcesses) -> None:
    await processes.stop(BACKBONE, STOP_S)


FAILURES: dict[str, FailureAction] = {
    "kill -9 of a shard": kill_shard,
    "SIGSTOP of a shard for 10 s": stop_shard,
    "a shard 20 times slower for 6 s": slow_shard,
    CORRUPT: corrupt_shard,
    "kill -9 of the store": kill_store,
    "SIGSTOP of the store for 10 s": stop_store,
    "kill -9 of the controller in a migration": kill_controller_in_a_migration,
    "kill -9 of a shard and of the store": kill_shard_and_store,
}


BACKBONE_FAILURES: dict[str, FailureAction] = {
    "kill -9 of one of two backbones": kill_backbone,
    "SIGSTOP of one of two backbones for 10 s": stop_backbone,
}


async def read_coverage(url: str) -> tuple[bool, frozenset[str]]:
    """Return the pair (True if every expert has two live homes, ids of the live shards).

    If the server gives no valid answer, the pair is False and an empty set.
    """
    async with new_client(5.0) as client:
        try:
            report = (await client.get(f"{url}/health/degraded")).json()
        except Exception:
            return False, frozenset()
    return report.get("status") == "covered", frozenset(report.get("blast_radius", ()))


async def wait_for_full_cover(url: str, num_shards: int) -> frozenset[str]:
    """Wait until `num_shards` shards run and every expert has two live homes; return the ids of the shards."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        is_covered, shards = await read_coverage(url)
        if is_covered and len(shards) == num_shards:
            return shards
        assert time.monotonic() < deadline, f"not every expert had two live homes on {num_shards} shards in time"
        await asyncio.sleep(0.2)


@dataclass
class RecoveryMonitor:
    """A `RecoveryMonitor` checks when a server has recovered from a failure."""

    processes: ServerProcesses
    shards: frozenset[str]  # ids of the shards before the failure
    num_backbones: int
    at: float = 0.0  # monotonic time of the failure
    is_done: bool = False  # True if the function that causes the failure has returned
    covered_s: float = 0.0  # seconds from the failure until an expert last had fewer than two live homes

    async def is_recovered(self) -> bool:
        """Return True if every expert has two live homes again and as many shards and backbones run as before.

        If some expert has fewer than two live homes, the method records the time in `covered_s`.
        """
        is_covered, shards = await read_coverage(self.processes.server.url)
        if not is_covered:
            self.covered_s = time.monotonic() - self.at
        is_noticed = len(self.shards - shards) >= self.processes.num_killed
        is_full = len(shards) >= len(self.shards) and len(await self.processes.pids_of(BACKBONE)) >= self.num_backbones
        is_over = self.is_done and is_noticed and is_covered and is_full
        return is_over and await self._are_backbones_up()

    async def _are_backbones_up(self) -> bool:
        async with new_client(5.0) as client:
            status = (await client.get(f"{self.processes.server.url}/status")).json()
        return sum(backbone["engine"]["is_healthy"] for backbone in status["backbones"]) >= self.num_backbones


async def measure_rate(url: str, bodies: list[dict[str, Any]]) -> float:
    """Send `bodies`, eight requests at a time; return the number of requests that the server completes per second."""
    started = time.monotonic()
    outcomes = await closed_loop(f"{url}/v1/completions", bodies, 8, 600.0)
    assert not any(outcome.error for outcome in outcomes), [outcome.error for outcome in outcomes if outcome.error]
    return len(outcomes) / (time.monotonic() - started)


def make_load(url: str, rate: float, seconds: float = SECONDS) -> Load:
    """Return a load of `rate` requests per second. Half of the requests sample with a seed, the others are greedy."""
    load = Load.of_sentences(url, rate, seconds, MAX_TOKENS)
    seeded = [
        {**body, "temperature": 0.8, "seed": number} if number % 2 else body for number, body in enumerate(load.bodies)
    ]
    return replace(load, bodies=tuple(seeded))


@dataclass(frozen=True)
class FailureTrial:
    """A `FailureTrial` is the result of one trial."""

    verdict: Verdict
    cover_s: float  # seconds from the failure until every expert had two live homes again
    recovered_s: float | None  # seconds until as many shards and backbones ran as before; None after the time limit


async def run_trial(
    processes: ServerProcesses, action: FailureAction, load: Load, undisturbed: list[RequestOutcome], num_backbones: int
) -> FailureTrial:
    tasks, processes.num_killed = [], 0
    shards = await wait_for_full_cover(processes.server.url, NUM_SHARDS + (processes.corrupt is not None))
    monitor = RecoveryMonitor(processes, shards, num_backbones)

    async def start_action() -> None:
        monitor.at = time.monotonic()
        tasks.append(asyncio.create_task(run_action()))

    async def run_action() -> None:
        try:
            await action(processes)
        finally:
            monitor.is_done = True

    disturbance = Disturbance(start_action, monitor.is_recovered, processes.random.uniform(*AT_S), TIMEOUT_S)
    verdict, recovered_s = await under_load(load, disturbance, undisturbed, window_s=SECONDS)
    await asyncio.gather(*tasks)
    return FailureTrial(verdict, monitor.covered_s, recovered_s)


def print_header(rate: float, cover: str = "full cover after, s") -> None:
    print(f"\n{rate:.2f} requests/s of {MAX_TOKENS} tokens, half of the largest rate that the server reached.\n")
    print("| failure | trials | requests | failed | different | longest gap, s: median / worst (undisturbed)", end="")
    print(f" | tokens missing | {cover}: median / worst | as before after, s |\n|" + "---|" * 9, flush=True)


def table_row(kind: str, trials: list[FailureTrial]) -> str:
    verdicts = [trial.verdict for trial in trials]
    num_requests = sum(verdict.num_requests for verdict in verdicts)
    failed, different = (sum(getattr(v, name) for v in verdicts) for name in ("num_failed", "num_different"))
    dip = statistics.median(verdict.dip for verdict in verdicts)
    gaps = [verdict.longest_gap_s for verdict in verdicts]
    gap = f"{statistics.median(gaps):.3f} / {max(gaps):.3f} ({verdicts[0].undisturbed_gap_s:.3f})"
    covered = [trial.cover_s for trial in trials]
    cover = f"{statistics.median(covered):.1f} / {max(covered):.1f}"
    took = [trial.recovered_s for trial in trials if trial.recovered_s is not None]
    whole = f"{statistics.median(took):.1f} / {max(took):.1f}" if len(took) == len(trials) else "not in time"
    numbers = f"{len(trials)} | {num_requests} | {failed} | {different}"
    return f"| {kind} | {numbers} | {gap} | {dip:+.1%} | {cover} | {whole} |"


async def run(started: Server, kinds: dict[str, FailureAction], num_trials: int, seed: int, num_backbones: int) -> None:
    processes = ServerProcesses(started, random.Random(seed))
    warm_up = make_load(started.url, 2.0)
    rate = LOAD_SHARE * await measure_rate(started.url, list(warm_up.bodies[:24]))
    load = make_load(started.url, rate)
    await wait_for_full_cover(started.url, NUM_SHARDS)
    undisturbed = await load.run()
    print_header(rate)

    async def repeat(kind: str, action: FailureAction) -> None:
        trials = []
        for _ in range(num_trials):
            trials.append(await run_trial(processes, action, load, undisturbed, num_backbones))
            if errors := trials[-1].verdict.errors:
                print(f"  {kind}: {errors}", flush=True)
        print(table_row(kind, trials), flush=True)

    for kind, action in kinds.items():
        if kind != CORRUPT:
            await repeat(kind, action)
            continue
        async with processes.with_corrupt_shard():
            await repeat(kind, action)
            num_corrupt = started.status()["traffic"]["num_corrupt"]
            assert num_corrupt >= num_trials, "the backbone sent no calls to the corrupt shard"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30, help="trials of each kind of failure")
    parser.add_argument("--kinds", default="", help="run only the kinds of failure whose names contain this text")
    parser.add_argument("--controllers", type=int, default=1, help="number of controllers, of which one leads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    groups = {num: select_kinds(kinds, args.kinds) for num, kinds in ((1, FAILURES), (2, BACKBONE_FAILURES))}
    if not any(groups.values()):
        parser.error(f"--kinds {args.kinds!r} matches none of: {', '.join(FAILURES | BACKBONE_FAILURES)}")
    for num_backbones, kinds in groups.items():
        if kinds:
            replicas = ("--backbones", str(num_backbones), "--controllers", str(args.controllers))
            with server("--shards", str(NUM_SHARDS), *replicas) as started:
                asyncio.run(run(started, kinds, args.trials, args.seed, num_backbones))


def select_kinds(kinds: dict[str, FailureAction], pattern: str) -> dict[str, FailureAction]:
    return {name: action for name, action in kinds.items() if pattern in name}


if __name__ == "__main__":
    main()
