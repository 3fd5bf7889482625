"""A pool that grows by a shard and shrinks again, over and over, while requests are computed.

    python -m benchmarks.scaling                          # 20 cycles, at least 2,000 requests, 10 to 15 minutes
    python -m benchmarks.scaling --cycles 3 --requests 0

Starts `expertmesh up --shards 3 --max-shards 4` on the demo model, orders 4 shards and 3 in turn, and asks meanwhile
for greedy completions: `--concurrency` clients, each for 60 % of the time. Tells the requests that failed, those whose
text is not that of a run in which nothing changed, the gaps between tokens (ITL) and the tokens per second during
rebalances and outside of them, and how soon a new shard was useful.

A rebalance lasts, upwards, from the new shard's first heartbeat until all moves are done and dropped; downwards, from
the order until the shard is gone. The seconds in which a new process starts are told apart from both: on a machine of
two cores an interpreter that imports its libraries takes one of them, wherever it comes from.
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
from services.expert import shard_control

POOL, NUM_SHARDS = "experts-cpu", 3
NUM_PROMPTS = 24
LOOK_S = 0.1
SETTLE_S = 2.0  # from the last epoch until what it gave up is dropped
CHANGE_TIMEOUT_S = 120.0
OUTSIDE, STARTING, REBALANCE = "outside", "a process starts", "rebalance"


# Requests -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request's outcome, by the number of its prompt."""

    prompt: int
    outcome: RequestOutcome


async def ask_for(url: str, number: int, body: dict[str, Any]) -> Asked:
    return Asked(number, await ask(f"{url}/v1/completions", body, origin=0.0, timeout_s=60.0))


@dataclass
class Clients:
    """So many requests at a time until `is_over` is set; each client asks for `share` of the time and rests between."""

    url: str
    bodies: Sequence[dict[str, Any]]
    concurrency: int
    share: float
    asked: list[Asked] = field(default_factory=list)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        source = itertools.cycle(enumerate(self.bodies))

        async def one_after_another() -> None:
            while not self.is_over.is_set():
                self.asked.append(one := await ask_for(self.url, *next(source)))
                await asyncio.sleep((one.outcome.ended_at - one.outcome.sent_at) * (1 / self.share - 1))

        await asyncio.gather(*(one_after_another() for _ in range(self.concurrency)))


# Changes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """From when to when (`time.perf_counter`) something went on."""

    what: str
    start: float
    end: float


@dataclass
class PoolFleet:
    """The pool as the registry shows it, and what is noted of its changes."""

    registry: Registry
    spans: list[Span] = field(default_factory=list)
    placed_s: list[float] = field(default_factory=list)  # from a new shard's first heartbeat to a placement with it
    answered_s: list[float] = field(default_factory=list)  # and to its first answered call
    lowest_cover: int = 1000

    async def look(self) -> tuple[Placement | None, list[Shard]]:
        while True:
            try:
                placement, shards = await self.registry.placement(), await self.registry.shards()
            except StoreUnavailable:
                await asyncio.sleep(LOOK_S)
                continue
            if placement is not None:
                self.lowest_cover = min(self.lowest_cover, placement.cover({shard.id for shard in shards}))
            return placement, shards

    async def _order(self, num_shards: int) -> None:
        await self.registry.give_order(StandingOrder(OrderKind.SCALE, POOL, num_shards, "benchmark", time.time()))

    async def grow(self) -> None:
        known = {shard.id for shard in (await self.look())[1]}
        start = time.perf_counter()
        await self._order(NUM_SHARDS + 1)
        new = await self._first_new(known)
        seen = time.perf_counter()
        self.spans.append(Span(STARTING, start, seen))
        placed = await self._until(lambda placement, _: new.id in placement.shard_ids)
        self.placed_s.append(placed - seen)
        while not (await shard_control.status(new.endpoint)).counters.num_requests:
            await asyncio.sleep(LOOK_S)
        self.answered_s.append(time.perf_counter() - seen)
        done = await self._until(lambda placement, shards: _is_settled(placement, shards, NUM_SHARDS + 1))
        await asyncio.sleep(SETTLE_S)
        self.spans.append(Span(REBALANCE, seen, done + SETTLE_S))

    async def shrink(self) -> None:
        start = time.perf_counter()
        await self._order(NUM_SHARDS)
        done = await self._until(lambda placement, shards: _is_settled(placement, shards, NUM_SHARDS))
        self.spans.append(Span(REBALANCE, start, done))

    async def _first_new(self, known: set[str]) -> Shard:
        async with asyncio.timeout(CHANGE_TIMEOUT_S):
            while True:
                if new := [shard for shard in (await self.look())[1] if shard.id not in known]:
                    return new[0]
                await asyncio.sleep(LOOK_S)

    async def _until(self, is_true: Callable[[Placement, Sequence[Shard]], bool]) -> float:
        async with asyncio.timeout(CHANGE_TIMEOUT_S):
            while True:
                placement, shards = await self.look()
                if placement is not None and is_true(placement, shards):
                    return time.perf_counter()
                await asyncio.sleep(LOOK_S)


def _is_settled(placement: Placement, shards: Sequence[Shard], count: int) -> bool:
    """Whether the pool has its size, nothing drains, and every shard holds just what is published."""
    return len(shards) == count and all(
        not shard.draining and shard.held_digest == placement.digest_of(shard.id) for shard in shards
    )


# Numbers --------------------------------------------------------------------------------------------------------------


def seconds_of(spans: Sequence[Span], start: float, end: float) -> dict[str, float]:
    """How long each thing went on between two times; outside is the rest."""
    took = {what: sum(span.end - span.start for span in spans if span.what == what) for what in (STARTING, REBALANCE)}
    return {**took, OUTSIDE: end - start - sum(took.values())}


def by_span(spans: Sequence[Span], times: Sequence[float]) -> list[str]:
    """What went on at each time."""
    return [next((span.what for span in spans if span.start <= at < span.end), OUTSIDE) for at in times]


def report(
    asked: Sequence[Asked], expected: Sequence[str], fleet: PoolFleet, start: float, end: float
) -> dict[str, Any]:
    """Everything that is to be known, in milliseconds, seconds and tokens per second."""
    good = [one for one in asked if not one.outcome.error]
    events = [time for one in good for time in one.outcome.event_times if start <= time < end]
    gaps = [(b, b - a) for one in good for a, b in itertools.pairwise(one.outcome.event_times) if start <= b < end]
    of_events, of_gaps = by_span(fleet.spans, events), by_span(fleet.spans, [at for at, _ in gaps])
    parts = {}
    for what, seconds in seconds_of(fleet.spans, start, end).items():
        own = [1e3 * gap for (_, gap), where in zip(gaps, of_gaps, strict=True) if where == what]
        rate = of_events.count(what) / seconds if seconds else 0.0
        parts[what] = {"seconds": seconds, "events_per_s": rate}
        parts[what] |= {f"itl_p{share:.0f}_ms": quantile(own, share / 100) for share in (50, 99)}
        parts[what] |= {"longest_gap_ms": max(own, default=0.0)}
    outside, rebalance = parts[OUTSIDE], parts[REBALANCE]
    return {
        "num_requests": len(asked),
        "errors": sorted({one.outcome.error for one in asked} - {""}),
        "num_failed": len(asked) - len(good),
        "num_different": sum(one.outcome.text != expected[one.prompt] for one in good),
        "lowest_cover": fleet.lowest_cover,
        "cycles": len(fleet.placed_s),
        "parts": parts,
        "itl_p99_ratio": rebalance["itl_p99_ms"] / max(outside["itl_p99_ms"], 1e-9),
        "throughput_ratio": rebalance["events_per_s"] / max(outside["events_per_s"], 1e-9),
        "placed_s": {"median": quantile(fleet.placed_s, 0.5), "most": max(fleet.placed_s, default=0.0)},
        "answered_s": {"median": quantile(fleet.answered_s, 0.5), "most": max(fleet.answered_s, default=0.0)},
    }


def tables(found: dict[str, Any]) -> Iterator[Table]:
    parts = Table(title=f"{found['cycles']} cycles of a shard more and a shard less, {found['num_requests']} requests")
    for name in ("", "seconds", "events/s", "ITL p50, ms", "ITL p99, ms", "longest gap, ms"):
        parts.add_column(name, justify="right")
    for what, numbers in found["parts"].items():
        parts.add_row(what, *(f"{value:.1f}" for value in numbers.values()))
    yield parts
    whole = Table(title="what must hold")
    for name in ("", "found", "bar"):
        whole.add_column(name, justify="right")
    whole.add_row("failed requests", str(found["num_failed"]), "0")
    whole.add_row("other texts", str(found["num_different"]), "0")
    whole.add_row("lowest cover", str(found["lowest_cover"]), "2")
    whole.add_row("ITL p99, rebalance / outside", f"{found['itl_p99_ratio']:.3f}", "1.1")
    whole.add_row("throughput, rebalance / outside", f"{found['throughput_ratio']:.3f}", "0.97")
    for name in ("placed", "answered"):
        told = found[f"{name}_s"]
        whole.add_row(f"heartbeat to {name}, s", f"{told['median']:.2f}, at most {told['most']:.2f}", "3")
    yield whole


# The run --------------------------------------------------------------------------------------------------------------


async def run(target: Server, redis_url: str, args: argparse.Namespace) -> dict[str, Any]:
    prompts = Prompts((16, 64), (args.tokens,), 2048, seed=args.seed)
    bodies = list(itertools.islice(prompts.bodies(), NUM_PROMPTS))
    undisturbed = [await ask_for(target.url, *numbered) for numbered in enumerate(bodies)]
    if failed := [one.outcome.error for one in undisturbed if one.outcome.error]:
        raise RuntimeError(f"{len(failed)} of {len(undisturbed)} requests failed before anything changed: {failed[0]}")
    redis = connect(redis_url)
    fleet = PoolFleet(Registry(redis, target.model_id()))
    clients = Clients(target.url, bodies, args.concurrency, args.share)
    asking = asyncio.create_task(clients.run())
    await asyncio.sleep(args.rest)  # until the load is even
    start = time.perf_counter()
    for cycle in range(args.cycles):
        await fleet.grow()
        await asyncio.sleep(args.rest)
        await fleet.shrink()
        await asyncio.sleep(args.rest)
        print(f"cycle {cycle + 1}: {len(clients.asked)} requests, {time.perf_counter() - start:.0f} s", flush=True)
    while len(clients.asked) < args.requests:
        await asyncio.sleep(1.0)
    end = time.perf_counter()
    clients.is_over.set()
    await asking
    await redis.aclose()
    return report(clients.asked, [one.outcome.text for one in undisturbed], fleet, start, end)


def main() -> None:
    parser = argparse.ArgumentParser(description="A pool that grows and shrinks while requests are computed.")
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000, help="at least")
    parser.add_argument("--concurrency", type=int, default=3, help="requests at a time")
    parser.add_argument("--share", type=float, default=0.6, help="of the time that each client asks; 1 saturates")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--rest", type=float, default=6.0, help="seconds after each change in which nothing changes")
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
