"""What failures of the expert tier cost requests that are under way: `python -m benchmarks.failures --trials 30`.

Starts `expertmesh up` with the demo model and three shards, measures its capacity, and then sends the same greedy and
seeded requests at a steady rate again and again: once undisturbed, and once for every trial, with something done to the
server at a random moment. Each answer's text and number of tokens are compared with those of the undisturbed run. A row
of the table is one kind of failure: requests, failed ones, different ones, the longest gap between two pieces of an
answer (median and worst of the trials, beside the worst of the undisturbed run), the part of the tokens that is missing
in the seconds after the failure, and the time until every expert had two live homes again.

Nothing in the server knows of this: processes are killed and stopped from outside. A shard is made 20 times slower by
stopping it for 19 of every 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.server import Server, new_client, server
from services.drill.drill import Disturbance, Load, under_load
from services.drill.load import Outcome, closed_loop
from services.drill.verdict import Verdict

NUM_SHARDS = 3
SECONDS = 12.0  # of load in a trial
AT_S = (1.0, 4.0)  # when something fails
MAX_TOKENS = 48
LOAD_SHARE = 0.5  # of what the server can do
STOP_S = 10.0
SLOW_S, SLOW_STEP_S = 6.0, 0.02
SHARD, CONTROLLER, STORE = "experts-cpu", "controller", "-server"

Deed = Callable[["Victims"], Awaitable[None]]


@dataclass
class Victims:
    """A server's processes, by what they are."""

    server: Server
    random: random.Random

    def one(self, kind: str) -> int:
        pids = sorted(pid for pid, name in self.server.processes().items() if name.split(".")[0].endswith(kind))
        assert pids, f"no process of the server is called {kind}: {self.server.processes()}"
        return self.random.choice(pids)

    def kill(self, kind: str) -> None:
        os.kill(self.one(kind), signal.SIGKILL)

    async def stop(self, kind: str, seconds: float) -> None:
        pid = self.one(kind)
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)

    async def slow_down(self, kind: str) -> None:
        pid, stop_at = self.one(kind), time.monotonic() + SLOW_S
        while time.monotonic() < stop_at:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.95 * SLOW_STEP_S)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.05 * SLOW_STEP_S)


async def kill_shard(victims: Victims) -> None:
    victims.kill(SHARD)


async def stop_shard(victims: Victims) -> None:
    await victims.stop(SHARD, STOP_S)


async def slow_shard(victims: Victims) -> None:
    await victims.slow_down(SHARD)


async def kill_store(victims: Victims) -> None:
    victims.kill(STORE)  # and it comes back empty


async def stop_store(victims: Victims) -> None:
    await victims.stop(STORE, STOP_S)


async def kill_controller_in_a_migration(victims: Victims) -> None:
    """The shard's homes are moved a heartbeat's time to live after its death."""
    victims.kill(SHARD)
    await asyncio.sleep(victims.random.uniform(2.5, 4.0))
    victims.kill(CONTROLLER)


async def kill_shard_and_store(victims: Victims) -> None:
    victims.kill(SHARD)
    await asyncio.sleep(victims.random.uniform(0.0, 1.0))
    victims.kill(STORE)


KINDS: dict[str, Deed] = {
    "kill -9 of a shard": kill_shard,
    "SIGSTOP of a shard for 10 s": stop_shard,
    "a shard 20 times slower for 6 s": slow_shard,
    "kill -9 of the store": kill_store,
    "SIGSTOP of the store for 10 s": stop_store,
    "kill -9 of the controller in a migration": kill_controller_in_a_migration,
    "kill -9 of a shard and of the store": kill_shard_and_store,
}


async def is_whole(url: str) -> bool:
    """Whether every expert has two live homes, on as many shards as there should be."""
    async with new_client(5.0) as client:
        try:
            report = (await client.get(f"{url}/health/degraded")).json()
        except Exception:
            return False
    return report.get("status") == "covered" and len(report["blast_radius"]) >= NUM_SHARDS


async def measure_rate(url: str, bodies: list[dict[str, Any]]) -> float:
    """Requests a second that the server can do, eight at a time."""
    started = time.monotonic()
    outcomes = await closed_loop(f"{url}/v1/completions", bodies, 8, 600.0)
    assert not any(outcome.error for outcome in outcomes), [outcome.error for outcome in outcomes if outcome.error]
    return len(outcomes) / (time.monotonic() - started)


def load_of(url: str, rate: float) -> Load:
    """Every other request is sampled, with a seed."""
    load = Load.of_sentences(url, rate, SECONDS, MAX_TOKENS)
    seeded = [
        {**body, "temperature": 0.8, "seed": number} if number % 2 else body for number, body in enumerate(load.bodies)
    ]
    return replace(load, bodies=tuple(seeded))


async def trial(victims: Victims, deed: Deed, load: Load, undisturbed: list[Outcome]) -> tuple[Verdict, float | None]:
    done = asyncio.Event()

    async def do() -> None:
        asyncio.get_running_loop().create_task(run_deed())

    async def run_deed() -> None:
        try:
            await deed(victims)
        finally:
            done.set()

    async def is_over() -> bool:
        return done.is_set() and await is_whole(victims.server.url)

    at_s = victims.random.uniform(*AT_S)
    return await under_load(load, Disturbance(do, is_over, at_s), undisturbed, window_s=SECONDS)


def row(kind: str, verdicts: list[Verdict], whole: list[float]) -> str:
    gaps = [verdict.longest_gap_s for verdict in verdicts]
    num_requests = sum(verdict.num_requests for verdict in verdicts)
    failed, different = (sum(getattr(v, name) for v in verdicts) for name in ("num_failed", "num_different"))
    dip = statistics.median(verdict.dip for verdict in verdicts)
    cover = f"{statistics.median(whole):.1f} / {max(whole):.1f}" if whole else "–"
    gap = f"{statistics.median(gaps):.3f} / {max(gaps):.3f} ({verdicts[0].undisturbed_gap_s:.3f})"
    return f"| {kind} | {len(verdicts)} | {num_requests} | {failed} | {different} | {gap} | {dip:+.1%} | {cover} |"


async def run(started: Server, kinds: dict[str, Deed], num_trials: int, seed: int) -> None:
    victims = Victims(started, random.Random(seed))
    warm_up = load_of(started.url, 2.0)
    rate = LOAD_SHARE * await measure_rate(started.url, list(warm_up.bodies[:24]))
    load = load_of(started.url, rate)
    while not await is_whole(started.url):
        await asyncio.sleep(0.5)
    undisturbed = await load.run()
    print(f"{rate:.2f} requests/s of {MAX_TOKENS} tokens, half of what the server can do.\n")
    print("| failure | trials | requests | failed | different | longest gap, s: median / worst (undisturbed)", end="")
    print(" | tokens missing | full cover after, s: median / worst |\n|---|---|---|---|---|---|---|---|")
    for kind, deed in kinds.items():
        verdicts, whole = [], []
        for _ in range(num_trials):
            verdict, whole_s = await trial(victims, deed, load, undisturbed)
            verdicts.append(verdict)
            whole += [whole_s] if whole_s is not None else []
            if verdict.errors:
                print(f"  {kind}: {verdict.errors}", flush=True)
        print(row(kind, verdicts, whole), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30, help="of each kind of failure")
    parser.add_argument("--kinds", default="", help="only those whose names contain this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds = {name: deed for name, deed in KINDS.items() if args.kinds in name}
    if not kinds:
        parser.error(f"--kinds {args.kinds!r} matches none of: {', '.join(KINDS)}")
    with server("--shards", str(NUM_SHARDS)) as started:
        asyncio.run(run(started, kinds, args.trials, args.seed))


if __name__ == "__main__":
    main()
