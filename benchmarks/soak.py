"""The soak test sends half an hour of mixed load to `expertmesh up` and checks that nothing leaks, hangs or fails.

    python -m benchmarks.soak                                # 30 minutes
    python -m benchmarks.soak --minutes 3 --json out.json    # exit code 1 if a check fails

Clients send random requests from `benchmarks.soak_requests`: different lengths and sampling parameters, chats,
grammars, several choices, streams, cancelled and bad requests. Each request has an expected HTTP status. At the end,
only the prefix cache may hold state slots and KV pages. No request may take longer than two minutes. In the second half
of the test, the memory of a process may grow only by the amount that this file allows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.server import Server, new_client, resident_bytes, server
from benchmarks.soak_requests import SoakRequest, draw_request

STUCK_AFTER_S = 120.0
SAMPLE_PERIOD_S = 5.0
DRAIN_S = 20.0
# In the second half of the test, a process's memory may grow by this number of bytes or by this share of its memory.
# The larger bound applies.
MAX_GROWTH_BYTES, MAX_GROWTH_SHARE = 16 << 20, 0.03
ZERO_WHEN_IDLE = ("num_running", "num_waiting", "num_slots_taken", "num_blocks_taken", "num_failed_steps")


@dataclass
class SoakTally:
    """A `SoakTally` counts the answers that the clients received and describes each wrong answer."""

    answers: Counter[str] = field(default_factory=Counter)  # "kind of request: HTTP status" -> number of answers
    wrong: list[str] = field(default_factory=list)
    num_tokens: int = 0  # number of tokens in complete answers


@dataclass(frozen=True)
class Growth:
    """A `Growth` has one process's memory at the start and at the end of the second half of the test.

    Both values lie on a line that is fitted to the samples of the second half.
    """

    process: str
    middle_bytes: float
    end_bytes: float

    @property
    def is_flat(self) -> bool:
        return self.end_bytes - self.middle_bytes <= max(MAX_GROWTH_BYTES, MAX_GROWTH_SHARE * self.middle_bytes)


async def one_request(client: httpx.AsyncClient, url: str, request: SoakRequest, tally: SoakTally) -> None:
    """Send one request and add the outcome to `tally`. A failed request raises no exception."""
    try:
        async with asyncio.timeout(STUCK_AFTER_S):
            status, body = await _send(client, url, request)
    except TimeoutError:
        status, body = 0, f"the answer did not end within {STUCK_AFTER_S:.0f} s"
    except httpx.HTTPError as error:
        status, body = 0, type(error).__name__
    tally.answers[f"{request.kind}: {status}"] += 1
    if status != request.expected:
        tally.wrong.append(
            f"{request.kind} got {status}, not {request.expected}: {body[:300]}; sent {request.content[:200]!r}"
        )
    elif status == 200 and not request.cancel_after:
        tally.num_tokens += _num_generated(body)


async def _send(client: httpx.AsyncClient, url: str, request: SoakRequest) -> tuple[int, str]:
    """Send a request and return the HTTP status and the body.

    If `cancel_after` is not 0, disconnect after this number of pieces of the answer.
    """
    headers = {"content-type": "application/json"}
    message = client.build_request(request.method, url + request.path, content=request.content, headers=headers)
    answer = await client.send(message, stream=True)
    pieces: list[str] = []
    try:
        async for piece in answer.aiter_text():
            pieces.append(piece)
            if request.cancel_after and len(pieces) >= request.cancel_after:
                break
    finally:
        await answer.aclose()
    body = "".join(pieces)
    if answer.status_code == 200 and not request.cancel_after and '"error":' in body[-400:]:
        return 500, body[-400:]  # the stream began with HTTP status 200 and ended with an error
    return answer.status_code, body


def _num_generated(body: str) -> int:
    """Return the number of generated tokens, from the field `usage` of a streamed or a complete answer."""
    _, found, number = body.rpartition('"completion_tokens":')
    return int("".join(c for c in number[:12].strip() if c.isdigit()) or 0) if found else 0


async def clients(url: str, concurrency: int, seconds: float, seed: int, tally: SoakTally) -> None:
    ends_at = time.monotonic() + seconds

    async def one_after_another(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        async with new_client(STUCK_AFTER_S) as client:
            while time.monotonic() < ends_at:
                await one_request(client, url, draw_request(rng), tally)
                await asyncio.sleep(rng.choice((0, 0, 0, 0.5)))

    await asyncio.gather(*map(one_after_another, range(concurrency)))


async def watch(running: Server, samples: list[dict[int, int]]) -> None:
    """Append a map from process id to memory in bytes to `samples` every five seconds, until the task is cancelled."""
    while True:
        samples.append({pid: resident_bytes(pid) for pid in running.processes()})
        await asyncio.sleep(SAMPLE_PERIOD_S)


def growths(samples: Sequence[dict[int, int]], names: dict[int, str]) -> list[Growth]:
    """Return the memory growth of every process that ran during the whole second half of the test."""
    half = samples[len(samples) // 2 :]
    return [
        Growth(f"{names.get(pid, '?')} ({pid})", *_line([sample[pid] for sample in half]))
        for pid in half[0]
        if all(sample.get(pid) for sample in half)
    ]


def _line(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the last value of the least-squares line through `values`."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = sum((i - middle) ** 2 for i in range(count))
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread if spread else 0.0
    return mean - slope * middle, mean + slope * middle


def wait_for_idle(running: Server) -> dict[str, Any]:
    """Wait until the engine has no request; return the engine's part of the status.

    After `DRAIN_S` seconds, return the status although the engine still has requests.
    """
    deadline = time.monotonic() + DRAIN_S
    while True:
        time.sleep(1)
        engine: dict[str, Any] = running.status()["engine"]
        if not any(engine[name] for name in ZERO_WHEN_IDLE) or time.monotonic() > deadline:
            return engine


async def soak(running: Server, concurrency: int, seconds: float, seed: int) -> tuple[SoakTally, list[dict[int, int]]]:
    tally, samples = SoakTally(), list[dict[int, int]]()
    watching = asyncio.create_task(watch(running, samples))
    try:
        await clients(running.url, concurrency, seconds, seed, tally)
    finally:
        watching.cancel()
    return tally, samples


def failures(
    tally: SoakTally, engine: dict[str, Any], grown: Sequence[Growth], before: set[int], after: set[int]
) -> list[str]:
    """Return a list with one sentence for each check of the soak test that fails."""
    found = [f"a wrong answer: {words}" for words in tally.wrong]
    found += [f"{name} is {engine[name]} although no request is left" for name in ZERO_WHEN_IDLE if engine[name]]
    found += [
        f"{one.process} grew from {one.middle_bytes / 2**20:.0f} to {one.end_bytes / 2**20:.0f} MiB in the second half"
        for one in grown
        if not one.is_flat
    ]
    if gone := before - after:
        found.append(f"{len(gone)} processes died")
    return found


def memory_table(grown: Sequence[Growth]) -> Table:
    table = Table(title="private memory of the processes, MiB")
    for column in ("process", "middle", "end"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for one in grown:
        table.add_row(one.process, f"{one.middle_bytes / 2**20:.1f}", f"{one.end_bytes / 2**20:.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run mixed load for half an hour and check that nothing leaks, hangs or fails."
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--model", default="", help="model directory; the demo model if left out")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument(
        "--state-memory",
        default="256MiB",
        help="memory for requests' state; small, so that the prefix cache fills and requests queue",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = ["--model", args.model] if args.model else []
    with server(*model, "--shards", str(args.shards), "--state-memory", args.state_memory) as running:
        names = running.processes()
        tally, samples = asyncio.run(soak(running, args.concurrency, 60 * args.minutes, args.seed))
        engine = wait_for_idle(running)
        after = set(running.processes())
    grown = growths(samples, names)
    serving = {pid for pid, name in names.items() if "ServeReplica" in name}
    found = failures(tally, engine, grown, serving, after)
    console = Console(width=120)
    console.print(memory_table(grown))
    for kind, count in sorted(tally.answers.items()):
        console.print(f"{count:>7,} {kind}")
    console.print(f"{tally.num_tokens:,} tokens in whole answers; the engine: {engine}")
    for sentence in found[:20]:
        console.print(f"FAILED: {sentence}", markup=False)
    console.print("failed" if found else "nothing leaked, nothing hung, and every answer was as expected")
    if args.json:
        report = {"answers": dict(tally.answers), "failures": found, "engine": engine, "tokens": tally.num_tokens}
        memory = {"memory": [asdict(one) for one in grown], "samples": samples}
        args.json.write_text(json.dumps({"minutes": args.minutes, **report, **memory}, indent=2) + "\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
