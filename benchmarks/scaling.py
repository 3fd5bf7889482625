"""The benchmark measures requests while a pool repeatedly grows and shrinks by one shard.

    python -m benchmarks.scaling                          # 20 cycles, at least 2,000 requests, 10 to 15 minutes
    python -m benchmarks.scaling --cycles 3 --requests 0

The benchmark starts `expertmesh up --shards 3 --max-shards 4` with the demo model. It orders 4 shards and 3 shards
alternately. Meanwhile `--concurrency` clients send greedy completions. Each client has a running request for 60 % of
the time. The benchmark reports:

- the number of failed requests, and of requests whose text differs from the text without changes of the pool;
- ITL and stream events with text per second, during rebalances and outside of rebalances;
- the time from a new shard's first heartbeat until the placement contains the shard;
- the time from a new shard's first heartbeat until the shard has answered a call.

When the pool grows, a rebalance starts with the new shard's first heartbeat. It ends when the new homes hold all their
experts and the old homes have dropped these experts. When the pool shrinks, a rebalance starts with the order and ends
when the shard is gone. The start of a new process is a separate phase, because the process keeps one of the machine's
two cores busy while it imports its libraries.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.load import Prompts, quantile
from benchmarks.server import Server, server
from cluster.control.embedded_redis import EmbeddedRedis
from cluster.control.operator_orders import OrderKind, StandingOrder
from cluster.control.registry import Registry, connect
from cluster.control.registry_store import StoreUnavailable
from cluster.topology import Placement, Shard
from services.cli.drill.load import RequestOutcome, ask
from services.expert import control_client

POOL, NUM_SHARDS = "experts-cpu", 3
NUM_PROMPTS = 24
POLL_PERIOD_S = 0.1
SETTLE_S = 2.0  # seconds after the last epoch until the old homes have dropped their experts
CHANGE_TIMEOUT_S = 120.0
OUTSIDE, STARTING, REBALANCE = "outside", "a process starts", "rebalance"


# Requests -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptOutcome:
    """A `PromptOutcome` has the outcome of a request and the index of the prompt that the request sent."""

    prompt: int
    outcome: RequestOutcome


async def send_prompt(url: str, number: int, body: dict[str, Any]) -> PromptOutcome:
    return PromptOutcome(number, await ask(f"{url}/v1/completions", body, origin=0.0, timeout_s=60.0))


@dataclass
class ClosedLoopClients:
    """`ClosedLoopClients` are `concurrency` clients that send requests until `is_over` is set.

    Each client pauses between requests, so that it has a running request for `share` of the time.
    """

    url: str
    bodies: Sequence[dict[str, Any]]
    concurrency: int
    share: float
    outcomes: list[PromptOutcome] = field(default_factory=list)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        source = itertools.cycle(enumerate(self.bodies))

        async def one_after_another() -> None:
            while not self.is_over.is_set():
                self.outcomes.append(one := await send_prompt(self.url, *next(source)))
                await asyncio.sleep((one.outcome.ended_at - one.outcome.sent_at) * (1 / self.share - 1))

        await asyncio.gather(*(one_after_another() for _ in range(self.concurrency)))


# Changes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A `Phase` is a period in which the pool changes; `start` and `end` are values of `time.perf_counter`."""

    name: str
    start: float
    end: float


@dataclass
class PoolObserver:
    """A `PoolObserver` orders changes of the pool's size, and measures how long each change takes."""

    registry: Registry
    phases: list[Phase] = field(default_factory=list)
    # seconds from each new shard's first heartbeat until the placement contains the shard
    placed_s: list[float] = field(default_factory=list)
    # seconds from each new shard's first heartbeat until the shard has answered a call
    answered_s: list[float] = field(default_factory=list)
    lowest_cover: int = 1000

    async def observe(self) -> tuple[Placement | None, list[Shard]]:
        while True:
            try:
                placement, shards = await self.registry.placement(), await self.registry.shards()
            except StoreUnavailable:
                await asyncio.sleep(POLL_PERIOD_S)
                continue
            if placement is not None:
                self.lowest_cover = min(self.lowest_cover, placement.cover({shard.id for shard in shards}))
            return placement, shards

    async def _order(self, num_shards: int) -> None:
        await self.registry.give_order(StandingOrder(OrderKind.SCALE, POOL, num_shards, "benchmark", time.time()))

    async def grow(self) -> None:
        known = {shard.id for shard in (await self.observe())[1]}
        start = time.perf_counter()
        await self._order(NUM_SHARDS + 1)
        new = await self._first_new_shard(known)
        seen = time.perf_counter()
        self.phases.append(Phase(STARTING, start, seen))
        placed = await self._wait_until(lambda placement, _: new.id in placement.shard_ids)
        self.placed_s.append(placed - seen)
        while not (await control_client.status(new.endpoint)).counters.num_requests:
            await asyncio.sleep(POLL_PERIOD_S)
        self.answered_s.append(time.perf_counter() - seen)
        done = await self._wait_until(lambda placement, shards: _is_settled(placement, shards, NUM_SHARDS + 1))
        await asyncio.sleep(SETTLE_S)
        self.phases.append(Phase(REBALANCE, seen, done + SETTLE_S))

    async def shrink(self) -> None:
        start = time.perf_counter()
        await self._order(NUM_SHARDS)
        done = await self._wait_until(lambda placement, shards: _is_settled(placement, shards, NUM_SHARDS))
        self.phases.append(Phase(REBALANCE, start, done))

    async def _first_new_shard(self, known: set[str]) -> Shard:
        async with asyncio.timeout(CHANGE_TIMEOUT_S):
            while True:
                if new := [shard for shard in (await self.observe())[1] if shard.id not in known]:
                    return new[0]
                await asyncio.sleep(POLL_PERIOD_S)

    async def _wait_until(self, is_true: Callable[[Placement, Sequence[Shard]], bool]) -> float:
        async with asyncio.timeout(CHANGE_TIMEOUT_S):
            while True:
                placement, shards = await self.observe()
                if placement is not None and is_true(placement, shards):
                    return time.perf_counter()
                await asyncio.sleep(POLL_PERIOD_S)


def _is_settled(placement: Placement, shards: Sequence[Shard], count: int) -> bool:
    """Return True if `count` shards exist, no shard drains, and every shard holds what the placement says."""
    return len(shards) == count and all(
        not shard.draining and shard.held_digest == placement.digest_of(shard.id) for shard in shards
    )


# Numbers --------------------------------------------------------------------------------------------------------------


def seconds_by_phase(phases: Sequence[Phase], start: float, end: float) -> dict[str, float]:
    """Return the total seconds of each kind of phase; "outside" is the time from `start` to `end` without a phase."""
    took = {
        name: sum(phase.end - phase.start for phase in phases if phase.name == name) for name in (STARTING, REBALANCE)
    }
    return {**took, OUTSIDE: end - start - sum(took.values())}


def phases_at(phases: Sequence[Phase], times: Sequence[float]) -> list[str]:
    """Return, for each time in `times`, the name of the phase at this time; "outside" if there is no phase."""
    return [next((phase.name for phase in phases if phase.start <= at < phase.end), OUTSIDE) for at in times]


def report(
    outcomes: Sequence[PromptOutcome], expected: Sequence[str], observer: PoolObserver, start: float, end: float
) -> dict[str, Any]:
    """Return the numbers of failed and different requests, and the measurements of each kind of phase.

    The measurements are ITL and stream events with text per second.
    """
    good = [one for one in outcomes if not one.outcome.error]
    events = [time for one in good for time in one.outcome.event_times if start <= time < end]
    gaps = [(b, b - a) for one in good for a, b in itertools.pairwise(one.outcome.event_times) if start <= b < end]
    of_events, of_gaps = phases_at(observer.phases, events), phases_at(observer.phases, [at for at, _ in gaps])
    parts = {}
    for name, seconds in seconds_by_phase(observer.phases, start, end).items():
        own = [1e3 * gap for (_, gap), where in zip(gaps, of_gaps, strict=True) if where == name]
        rate = of_events.count(name) / seconds if seconds else 0.0
        parts[name] = {"seconds": seconds, "events_per_s": rate}
        parts[name] |= {f"itl_p{share:.0f}_ms": quantile(own, share / 100) for share in (50, 99)}
        parts[name] |= {"longest_gap_ms": max(own, default=0.0)}
    outside, rebalance = parts[OUTSIDE], parts[REBALANCE]
    return {
        "num_requests": len(outcomes),
        "errors": sorted({one.outcome.error for one in outcomes} - {""}),
        "num_failed": len(outcomes) - len(good),
        "num_different": sum(one.outcome.text != expected[one.prompt] for one in good),
        "lowest_cover": observer.lowest_cover,
        "cycles": len(observer.placed_s),
        "parts": parts,
        "itl_p99_ratio": rebalance["itl_p99_ms"] / max(outside["itl_p99_ms"], 1e-9),
        "throughput_ratio": rebalance["events_per_s"] / max(outside["events_per_s"], 1e-9),
        "placed_s": {"median": quantile(observer.placed_s, 0.5), "most": max(observer.placed_s, default=0.0)},
        "answered_s": {"median": quantile(observer.answered_s, 0.5), "most": max(observer.answered_s, default=0.0)},
    }


def tables(found: dict[str, Any]) -> Iterator[Table]:
    parts = Table(title=f"{found['cycles']} cycles of growing and shrinking, {found['num_requests']} requests")
    for name in ("", "seconds", "events/s", "ITL p50, ms", "ITL p99, ms", "longest gap, ms"):
        parts.add_column(name, justify="right")
    for name, numbers in found["parts"].items():
        parts.add_row(name, *(f"{value:.1f}" for value in numbers.values()))
    yield parts
    whole = Table(title="results and bars")
    for name in ("", "found", "bar"):
        whole.add_column(name, justify="right")
    whole.add_row("failed requests", str(found["num_failed"]), "0")
    whole.add_row("different texts", str(found["num_different"]), "0")
    whole.add_row("lowest cover", str(found["lowest_cover"]), "2")
    whole.add_row("ITL p99, rebalance / outside", f"{found['itl_p99_ratio']:.3f}", "1.1")
    whole.add_row("throughput, rebalance / outside", f"{found['throughput_ratio']:.3f}", "0.97")
    for name in ("placed", "answered"):
        delays = found[f"{name}_s"]
        whole.add_row(f"heartbeat to {name}, s", f"{delays['median']:.2f}, at most {delays['most']:.2f}", "3")
    yield whole


# The run --------------------------------------------------------------------------------------------------------------


async def run(target: Server, redis_url: str, args: argparse.Namespace) -> dict[str, Any]:
    prompts = Prompts((16, 64), (args.tokens,), 2048, seed=args.seed)
    bodies = list(itertools.islice(prompts.bodies(), NUM_PROMPTS))
    undisturbed = [await send_prompt(target.url, *numbered) for numbered in enumerate(bodies)]
    if failed := [one.outcome.error for one in undisturbed if one.outcome.error]:
        raise RuntimeError(f"{len(failed)} of {len(undisturbed)} requests failed before anything changed: {failed[0]}")
    redis = connect(redis_url)
    observer = PoolObserver(Registry(redis, target.model_id()))
    clients = ClosedLoopClients(target.url, bodies, args.concurrency, args.share)
    load = asyncio.create_task(clients.run())
    await asyncio.sleep(args.rest)  # the clients need some time until their load is steady
    start = time.perf_counter()
    for cycle in range(args.cycles):
        await observer.grow()
        await asyncio.sleep(args.rest)
        await observer.shrink()
        await asyncio.sleep(args.rest)
        print(f"cycle {cycle + 1}: {len(clients.outcomes)} requests, {time.perf_counter() - start:.0f} s", flush=True)
    while len(clients.outcomes) < args.requests:
        await asyncio.sleep(1.0)
    end = time.perf_counter()
    clients.is_over.set()
    await load
    await redis.aclose()
    return report(clients.outcomes, [one.outcome.text for one in undisturbed], observer, start, end)


def main() -> None:
    parser = argparse.ArgumentParser(description="Grow and shrink a pool while requests are computed.")
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000, help="smallest number of requests")
    parser.add_argument("--concurrency", type=int, default=3, help="requests at a time")
    parser.add_argument(
        "--share",
        type=float,
        default=0.6,
        help="share of the time in which each client has a request; 1 means no pauses",
    )
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each answer")
    parser.add_argument("--rest", type=float, default=6.0, help="seconds without changes after each change")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in ("cycles", "concurrency", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 < args.share <= 1:
        parser.error(f"--share must be above 0 and at most 1, not {args.share}")
    with EmbeddedRedis() as redis:
        options = ("--shards", str(NUM_SHARDS), "--max-shards", str(NUM_SHARDS + 1), "--redis-url", redis.url)
        with server(*options) as target:
            found = asyncio.run(run(target, redis.url, args))
    for table in tables(found):
        Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
