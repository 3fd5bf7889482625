"""The benchmark sends hostile requests to a server, and measures how each of them affects all other clients.

    python -m benchmarks.hostile_requests                          # all inputs, three rounds; takes 15 minutes
    python -m benchmarks.hostile_requests --only grammar --rounds 5

A gateway and a backbone with the demo model run in two processes. Meanwhile a third process asks for `/health/live`
every 20 ms, each time over a new connection, and reads one stream of tokens. The benchmark exits with 1 if a bound is
passed:

- the longest answer of `/health/live`, which contains the longest stall of the gateway's event loop;
- the longest time between two tokens, compared with the same work for the engine without the hostile part, or with no
  request at all. This time contains the longest engine step;
- the growth of the gateway's and the backbone's memory: the peaks during the request, less the sizes before it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.gateway_pair import GatewayPair, gateway_pair
from benchmarks.hostile_inputs import (
    COMPLETIONS,
    SLOW_S,
    Case,
    Send,
    Target,
    cases,
    completion,
    filled,
    nothing,
    post,
)
from benchmarks.long_context import write_model
from benchmarks.server import descendants, new_client
from model.demo import DEMO
from services.args import AppArgs
from services.gateway.limits import GatewayLimits

CONTEXT = 32_768
HEALTH_PERIOD_S, SETTLE_S, TIMEOUT_S = 0.02, 0.5, 120
HEALTH_BAR_S, STEP_BAR_S, MEMORY_BAR, BYTES_PER_TOKEN = 0.3, 0.02, 50_000_000, 100
STREAM = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True, "temperature": 0}
MIB = 1 << 20


@dataclass(frozen=True)
class Cost:
    """A `Cost` holds what one input cost in one round."""

    answer: str
    seconds: float
    health_s: float  # longest answer of /health/live
    gap_s: float  # longest time between two tokens of the stream beside the input
    gateway_bytes: int
    backbone_bytes: int


@dataclass(frozen=True)
class Row:
    """A `Row` sums up all rounds of one case: medians of times, and the largest of the memory figures."""

    name: str
    answer: str
    seconds: float
    health_s: float
    gap_s: float
    plain_gap_s: float
    gateway_bytes: int
    backbone_bytes: int
    num_prompt_tokens: int

    @property
    def passed_bounds(self) -> list[str]:
        most = MEMORY_BAR + BYTES_PER_TOKEN * self.num_prompt_tokens
        passed = {
            "health": self.health_s > HEALTH_BAR_S,
            "step": self.gap_s - self.plain_gap_s > STEP_BAR_S,
            "memory": self.gateway_bytes + self.backbone_bytes > most,
        }
        return [name for name, is_passed in passed.items() if is_passed]


# The process that watches ---------------------------------------------------------------------------------------------


class Watch:
    """A `Watch` measures answers of `/health/live` and gaps between tokens, as pairs (end time, seconds)."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self.health: list[tuple[float, float]] = []
        self.gaps: list[tuple[float, float]] = []

    async def run(self, pipe: Connection) -> None:
        """Measure until `pipe` sends None. For a pair of times from `pipe`, send the maxima between the two."""
        tasks = [asyncio.create_task(work) for work in (self._ask_health(), self._read_tokens())]
        while (asked := await asyncio.to_thread(pipe.recv)) is not None:
            pipe.send([self._longest(kind, *asked) for kind in (self.health, self.gaps)])
        for task in tasks:
            task.cancel()

    @staticmethod
    def _longest(measured: list[tuple[float, float]], start: float, end: float) -> float:
        return max((seconds for ended, seconds in measured if start <= ended <= end), default=TIMEOUT_S)

    async def _ask_health(self) -> None:
        while True:
            began = time.monotonic()
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                writer.write(b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                await reader.read()
                writer.close()
            ended = time.monotonic()
            self.health.append((ended, ended - began))
            await asyncio.sleep(max(0, began + HEALTH_PERIOD_S - ended))

    async def _read_tokens(self) -> None:
        body = json.dumps(STREAM).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        while True:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            writer.write(head.encode() + body)
            before: float | None = None
            while data := await reader.read(1 << 16):
                now = time.monotonic()
                if b"data: " in data:
                    if before is not None:
                        self.gaps.append((now, now - before))
                    before = now
            writer.close()


def watch(url: str, pipe: Connection) -> None:
    asyncio.run(Watch(url).run(pipe))


@contextmanager
def watching(url: str) -> Iterator[Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=watch, args=(url, theirs), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        ours.send(None)
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


async def measure(running: GatewayPair, target: Target, pipe: Connection, send: Send) -> Cost:
    await asyncio.sleep(SETTLE_S)
    gateway, backbone = Memory(running.gateway_pid), Memory(running.backbone_pid)
    started = time.monotonic()
    try:
        answer = await send(target)
    except (OSError, httpx.HTTPError) as error:
        answer = type(error).__name__
    ended = time.monotonic()
    await asyncio.sleep(SETTLE_S)
    pipe.send((started, time.monotonic()))
    health_s, gap_s = await asyncio.to_thread(pipe.recv)
    return Cost(answer, ended - started, health_s, gap_s, gateway.growth(), backbone.growth())


async def warm_up(target: Target) -> None:
    """Send ordinary requests first, because kernels, the tokenizer and the grammar checker are loaded when needed."""
    for more in ({}, {"structured_outputs": {"regex": "[0-9]+"}}, {"logprobs": 1, "prompt_logprobs": 1}):
        assert await post(COMPLETIONS, completion(filled(3000), **more))(target) == "200"


async def rows(running: GatewayPair, chosen: list[Case], num_rounds: int) -> list[Row]:
    found: list[list[tuple[Cost, Cost]]] = [[] for _ in chosen]
    with watching(running.url) as pipe:
        async with new_client(TIMEOUT_S) as http:
            target = Target(running.url, running.grpc_address, http)
            await warm_up(target)
            while (await measure(running, target, pipe, nothing)).gap_s == TIMEOUT_S:
                pass  # the stream has not begun
            for _ in range(num_rounds):
                idle = await measure(running, target, pipe, nothing)
                for case, costs in zip(chosen, found, strict=True):
                    plain = await measure(running, target, pipe, case.plain) if case.plain else idle
                    costs.append((await measure(running, target, pipe, case.send), plain))
                    print(case.name, costs[-1][0], file=sys.stderr)
    return [summary(case, costs) for case, costs in zip(chosen, found, strict=True)]


def summary(case: Case, costs: list[tuple[Cost, Cost]]) -> Row:
    own = [cost for cost, _ in costs]
    return Row(
        case.name,
        own[-1].answer,
        statistics.median(cost.seconds for cost in own),
        statistics.median(cost.health_s for cost in own),
        statistics.median(cost.gap_s for cost in own),
        statistics.median(plain.gap_s for _, plain in costs),
        max(cost.gateway_bytes for cost in own),
        max(cost.backbone_bytes for cost in own),
        case.num_prompt_tokens,
    )


def show(found: list[Row]) -> None:
    names = ("answer", "s", "health, ms", "gap, ms", "plain gap, ms", "gateway, MB", "backbone, MB", "passed")
    table = Table("input", *names, title="what hostile inputs cost")
    for row in found:
        times = (f"{1000 * value:.0f}" for value in (row.health_s, row.gap_s, row.plain_gap_s))
        sizes = (f"{value / 1e6:.0f}" for value in (row.gateway_bytes, row.backbone_bytes))
        table.add_row(row.name, row.answer, f"{row.seconds:.1f}", *times, *sizes, ", ".join(row.passed_bounds))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what hostile inputs cost everybody else.")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the inputs to send")
    parser.add_argument("--rounds", type=int, default=3, help="the table shows medians of so many rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(DEMO, Path(folder), CONTEXT)
        limits = GatewayLimits(header_s=SLOW_S, body_s=SLOW_S)
        args = AppArgs(model=folder, model_name="demo", limits=limits, draft_tokens=0)
        with gateway_pair(args) as running:
            found = asyncio.run(rows(running, cases(arguments.only), arguments.rounds))
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    sys.exit(any(row.passed_bounds for row in found))


if __name__ == "__main__":
    main()
