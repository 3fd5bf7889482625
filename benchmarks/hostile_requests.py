"""The benchmark sends hostile requests to a server, and measures how each of them affects all other clients.

    python -m benchmarks.hostile_requests                          # all inputs, three rounds of up to five minutes
    python -m benchmarks.hostile_requests --only grammar --rounds 5
    python -m benchmarks.hostile_requests --limit body_bytes=8388608 --only stop_token_ids

A gateway and a backbone with the demo model run in two processes. The backbone has no prefix cache, so that two
requests with one prompt are the same work. Meanwhile a third process keeps the engine busy with one stream of tokens,
and asks for `/health/live` every 20 ms, each time over a new connection. The benchmark prints a table in Markdown, and
exits with 1 if a bound is passed:

- the longest time for which the gateway's event loop is blocked, which the gateway measures;
- the longest answer of `/health/live`;
- the longest engine step, which the backbone measures, compared with the same work for the engine without the hostile
  part, or with no request at all;
- the growth of the gateway's and the backbone's memory: the peaks during the request, less the sizes before it.

The benchmark exits with 2 if an input had another answer than expected, because then the input did not reach the code
that the case is meant for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from benchmarks.gateway_pair import GatewayPair, Longest, gateway_pair
from benchmarks.hostile_inputs import (
    COMPLETIONS,
    SLOW_S,
    Case,
    Send,
    Target,
    cases,
    completion,
    filled,
    post,
)
from benchmarks.long_context import write_model
from benchmarks.server import descendants, new_client
from model.demo import DEMO
from services.args import AppArgs
from services.gateway.limits import GatewayLimits

CONTEXT = 16_384
HEALTH_PERIOD_S, SETTLE_S, IDLE_S, TIMEOUT_S = 0.02, 0.3, 3, 300
BLOCK_BAR_S, HEALTH_BAR_S, STEP_BAR_S, MEMORY_BAR, BYTES_PER_TOKEN = 0.25, 0.3, 0.02, 50_000_000, 100
STREAM = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True, "temperature": 0}


@dataclass(frozen=True)
class Cost:
    """A `Cost` holds what one input cost in one round."""

    answer: str
    seconds: float
    block_s: float  # longest time for which the gateway's event loop was blocked
    health_s: float  # longest answer of /health/live
    step_s: float  # longest step of the engine
    gateway_bytes: int
    backbone_bytes: int


@dataclass(frozen=True)
class Row:
    """A `Row` sums up all rounds of one case: medians of times, and the largest of the memory figures."""

    name: str
    answer: str
    is_expected: bool  # False: the input did not reach the code that the case is meant for
    seconds: float
    block_s: float
    health_s: float
    step_s: float
    plain_step_s: float
    gateway_bytes: int
    backbone_bytes: int
    num_tokens: int

    @property
    def passed_bounds(self) -> list[str]:
        most = MEMORY_BAR + BYTES_PER_TOKEN * self.num_tokens
        passed = {
            "loop": self.block_s > BLOCK_BAR_S,
            "health": self.health_s > HEALTH_BAR_S,
            "step": self.step_s - self.plain_step_s > STEP_BAR_S,
            "memory": self.gateway_bytes + self.backbone_bytes > most,
        }
        return [name for name, is_passed in passed.items() if is_passed]


# The process that watches ---------------------------------------------------------------------------------------------


class Watch:
    """A `Watch` keeps the engine busy with one stream, and keeps the longest answer of `/health/live`."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._health = Longest()

    async def run(self, pipe: Connection) -> None:
        """Watch until `pipe` sends False. For True, send the longest answer time since the last question."""
        tasks = [asyncio.create_task(work) for work in (self._ask_health(), self._read_tokens())]
        while await asyncio.to_thread(pipe.recv):
            pipe.send(self._health.take())
        for task in tasks:
            task.cancel()

    async def _ask_health(self) -> None:
        while True:
            began = time.monotonic()
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                writer.write(b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                await reader.read()
                writer.close()
            ended = time.monotonic()
            self._health.add(ended - began)
            await asyncio.sleep(max(0, began + HEALTH_PERIOD_S - ended))

    async def _read_tokens(self) -> None:
        body = json.dumps(STREAM).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        while True:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            writer.write(head.encode() + body)
            while await reader.read(1 << 16):
                pass
            writer.close()


def watch(url: str, pipe: Connection) -> None:
    asyncio.run(Watch(url).run(pipe))


@contextmanager
def watching(url: str) -> Iterator[Callable[[], float]]:
    """Watch the server at `url` during the block; yield a function that returns the longest answer of /health/live."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=watch, args=(url, theirs), daemon=True)
    process.start()

    def longest_health() -> float:
        ours.send(True)
        return float(ours.recv())

    try:
        yield longest_health
    finally:
        ours.send(False)
        process.join(10)


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(pid: int, name: str) -> int:
    """Return the line `name` (VmRSS, or its peak VmHWM) of a process's status in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


class Memory:
    """A `Memory` measures how far a process and its child processes grow, from the start to their peaks."""

    def __init__(self, pid: int) -> None:
        self._before: dict[int, int] = {}
        for each in [pid, *descendants(pid)]:
            with suppress(OSError):
                Path(f"/proc/{each}/clear_refs").write_text("5")  # resets the peak, VmHWM
                self._before[each] = memory(each, "VmRSS")

    def growth(self) -> int:
        return sum(max(0, memory(pid, "VmHWM") - before) for pid, before in self._before.items())


# Measurement ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A `Bench` measures what requests to a running gateway cost."""

    running: GatewayPair
    target: Target
    longest_health: Callable[[], float]

    async def measure(self, send: Send) -> Cost:
        await asyncio.sleep(SETTLE_S)
        await self._longest()  # forget what was before
        gateway, backbone = Memory(self.running.gateway_pid), Memory(self.running.backbone_pid)
        started = time.monotonic()
        try:
            answer = await send(self.target)
        except (OSError, httpx.HTTPError) as error:
            answer = type(error).__name__
        seconds = time.monotonic() - started
        await asyncio.sleep(SETTLE_S)
        return Cost(answer, seconds, *await self._longest(), gateway.growth(), backbone.growth())

    async def _longest(self) -> tuple[float, float, float]:
        """Return the longest block of the event loop, answer of `/health/live` and engine step since the last call."""
        longest_block, longest_step = self.running.longest_block, self.running.longest_step
        block_s, health_s, step_s = [
            await asyncio.to_thread(ask) for ask in (longest_block, self.longest_health, longest_step)
        ]
        return block_s, health_s, step_s

    async def warm_up(self) -> None:
        """Send ordinary requests first, because kernels, tokenizer and grammar checker are loaded when needed."""
        for more in ({}, {"structured_outputs": {"regex": "[0-9]+"}}, {"logprobs": 1, "prompt_logprobs": 1}):
            assert await post(COMPLETIONS, completion(filled(2000), **more))(self.target) == "200"
        while not (await self.measure(nothing)).step_s:
            pass  # the stream has not begun

    async def round(self, chosen: list[Case]) -> list[tuple[Cost, Cost]]:
        """Return for each case what the input cost, and what its plain form or an idle server cost."""
        costs = list[tuple[Cost, Cost]]()
        idle = await self.measure(nothing)
        for case in chosen:
            plain = await self.measure(case.plain) if case.plain else idle
            costs.append((await self.measure(case.send), plain))
            print(case.name, costs[-1][0], file=sys.stderr)
        return costs


async def nothing(_: Target) -> str:
    await asyncio.sleep(IDLE_S)
    return "200"


async def rows(running: GatewayPair, chosen: list[Case], num_rounds: int) -> list[Row]:
    with watching(running.url) as longest_health:
        async with new_client(TIMEOUT_S) as http:
            bench = Bench(running, Target(running.url, running.grpc_address, http), longest_health)
            await bench.warm_up()
            rounds = [await bench.round(chosen) for _ in range(num_rounds)]
    return [summary(case, costs) for case, *costs in zip(chosen, *rounds, strict=True)]


def summary(case: Case, costs: list[tuple[Cost, Cost]]) -> Row:
    own, plain = [cost for cost, _ in costs], [cost for _, cost in costs]
    wrong = [cost.answer for cost in own if not re.match(case.answer, cost.answer)]
    wrong += [cost.answer for cost in plain if cost.answer != "200"]
    return Row(
        case.name,
        wrong[0] if wrong else own[-1].answer.partition(":")[0],
        not wrong,
        statistics.median(cost.seconds for cost in own),
        statistics.median(cost.block_s for cost in own),
        statistics.median(cost.health_s for cost in own),
        statistics.median(cost.step_s for cost in own),
        statistics.median(cost.step_s for cost in plain),
        max(cost.gateway_bytes for cost in own),
        max(cost.backbone_bytes for cost in own),
        case.num_tokens,
    )


def table(found: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    names = (
        "input",
        "answer",
        "s",
        "loop, ms",
        "health, ms",
        "step (plain), ms",
        "gateway, MB",
        "backbone, MB",
        "passed",
    )
    lines = [names, ("---",) * len(names)]
    for row in found:
        block, health, step, plain = (
            f"{1000 * seconds:.0f}" for seconds in (row.block_s, row.health_s, row.step_s, row.plain_step_s)
        )
        sizes = (f"{num_bytes / 1e6:.0f}" for num_bytes in (row.gateway_bytes, row.backbone_bytes))
        passed = ", ".join(row.passed_bounds)
        lines.append((row.name, row.answer, f"{row.seconds:.1f}", block, health, f"{step} ({plain})", *sizes, passed))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what hostile inputs cost everybody else.")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the inputs to send")
    parser.add_argument("--rounds", type=int, default=3, help="the table shows medians of so many rounds")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help="a limit of the gateway")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    limits = GatewayLimits.parse([f"header_s={SLOW_S}", f"body_s={SLOW_S}", *arguments.limit])
    with tempfile.TemporaryDirectory() as folder:
        write_model(DEMO, Path(folder), CONTEXT)
        args = AppArgs(model=folder, model_name="demo", limits=limits, draft_tokens=0, prefix_cache=False)
        with gateway_pair(args) as running:
            found = asyncio.run(rows(running, cases(limits, CONTEXT, arguments.only), arguments.rounds))
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    for row in found:
        if not row.is_expected:
            print(f"{row.name!r} has the wrong answer {row.answer!r}, so it measures nothing.", file=sys.stderr)
    sys.exit(1 if any(row.passed_bounds for row in found) else 0 if all(row.is_expected for row in found) else 2)


if __name__ == "__main__":
    main()
