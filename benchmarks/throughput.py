"""Tokens per second through REST, with expert shards in other processes and with the experts in the backbone.

    make bench                                          # the demo model, 1 and 8 streams
    python -m benchmarks.throughput --json out.json

Both set-ups run in turn in each round; what counts is the ratio of their medians, because these machines are small and
shared. Prompts are beginnings of the demo's held-out files; greedy, `ignore_eos`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from model.demo.corpus import read_corpus

READY_TIMEOUT_S = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(*options: str) -> Iterator[str]:
    """`expertmesh up` in a process of its own; its REST address."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "services.cli",
        "up",
        "--port",
        str(port),
        "--grpc-port",
        str(free_port()),
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server at {url} was not ready within {READY_TIMEOUT_S} s")


def complete(url: str, prompt: str, num_tokens: int) -> int:
    """One greedy completion; returns the tokens it made."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


def tokens_per_second(url: str, prompts: list[str], num_streams: int, num_tokens: int) -> float:
    """`num_streams` completions at once."""
    chosen = [prompts[i % len(prompts)] for i in range(num_streams)]
    started = time.perf_counter()
    with ThreadPoolExecutor(num_streams) as threads:
        made = sum(threads.map(lambda prompt: complete(url, prompt, num_tokens), chosen))
    return made / (time.perf_counter() - started)


def wire_per_row(url: str) -> dict[str, float]:
    """Bytes and messages per row, which is one token in one MoE layer, since the server started."""
    traffic = httpx.get(f"{url}/status", timeout=10).json()["traffic"]
    rows = traffic["num_rows"]
    assert rows, "nothing went over the wire"
    names = ("sent_bytes", "received_bytes", "num_sent")
    return {name: traffic[name] / rows for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second, distributed against local experts.")
    parser.add_argument("--model", default="", help="model directory; the demo model if left out")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = ["--model", args.model] if args.model else []
    prompts = [text[:400] for text in read_corpus()[1] if len(text) >= 400]
    speeds: dict[tuple[str, int], list[float]] = {}
    with server(*model, "--shards", str(args.shards)) as remote, server(*model, "--local-experts") as local:
        servers = {"distributed": remote, "local": local}
        for url in servers.values():
            tokens_per_second(url, prompts, max(args.streams), 16)  # warm
        for _ in range(args.rounds):
            for num_streams in args.streams:
                for name, url in servers.items():
                    speed = tokens_per_second(url, prompts, num_streams, args.tokens)
                    speeds.setdefault((name, num_streams), []).append(speed)
        wire = wire_per_row(remote)
    report(speeds, args.streams, wire, args.json)


def report(
    speeds: dict[tuple[str, int], list[float]], streams: list[int], wire: dict[str, float], out: Path | None
) -> None:
    table = Table(title=f"tokens/s, median (min to max), {os.cpu_count()} cores")
    for column in ("streams", "distributed", "local experts", "ratio"):
        table.add_column(column, justify="right")
    rows = []
    for num_streams in streams:
        both = [speeds[name, num_streams] for name in ("distributed", "local")]
        ratio = statistics.median(both[0]) / statistics.median(both[1])
        words = [f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})" for values in both]
        table.add_row(str(num_streams), *words, f"{ratio:.2f}")
        rows.append({"streams": num_streams, "distributed": both[0], "local": both[1], "ratio": ratio})
    console = Console()
    console.print(table)
    console.print(
        f"wire per token and MoE layer: {wire['sent_bytes']:.0f} B out, {wire['received_bytes']:.0f} B back, "
        f"{wire['num_sent']:.2f} messages"
    )
    if out:
        out.write_text(json.dumps({"speeds": rows, "wire": wire}, indent=2) + "\n")


if __name__ == "__main__":
    main()
