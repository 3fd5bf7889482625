"""The benchmark measures the processor time and the delay of the load generator itself.

    python -m benchmarks.load_overhead

A very simple server runs in a second process and writes the time into every stream event. The client reads the same
clock when the event arrives. The benchmark prints the delay of the events, and the processor time of the generator per
event and per request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from typing import Any

import httpx

from benchmarks.load import RequestOutcome, closed_loop, quantile
from benchmarks.server import free_port
from services.cli.drill.event_stream import post

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = '{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}'


async def serve(port: int) -> None:
    """Run a server that answers every POST with `max_tokens` stream events, one event every `temperature` seconds."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := (await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""):
            size = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
            body = json.loads(await reader.readexactly(size))
            writer.write(HEAD)
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(body["temperature"])
                writer.write(_chunk('{"choices":[{"index":0,"text":"%.9f"}]}' % time.perf_counter()))  # noqa: UP031
            writer.write(_chunk(USAGE % body["max_tokens"]) + _chunk("[DONE]") + b"0\r\n\r\n")
            if b"connection: close" in head.lower():
                writer.close()
                return

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()  # the client has closed the connection

    async with await asyncio.start_server(guarded, "127.0.0.1", port) as server:
        await server.serve_forever()


def _chunk(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


async def lateness(url: str, body: dict[str, Any]) -> list[float]:
    """Send one request; return, for each stream event, the seconds between its sending and its arrival."""
    answer = await post(url, body, timeout_s=60)
    sent = ((json.loads(event.data), event.came_at) for event in answer.events() if b'"text"' in event.data)
    return [came_at - float(data["choices"][0]["text"]) for data, came_at in sent]


async def _measure(url: str, num_streams: int, num_events: int, gap_s: float) -> dict[str, Any]:
    body = {"prompt": [17] * 128, "max_tokens": num_events, "temperature": gap_s}
    late = await asyncio.gather(*(lateness(url, body) for _ in range(num_streams)))
    cpu = time.process_time()
    outcomes: list[RequestOutcome] = await closed_loop(url, [body] * num_streams, num_streams, seconds=60)
    per_event = (time.process_time() - cpu) / (num_streams * num_events)
    assert all(len(outcome.event_times) == num_events and not outcome.error for outcome in outcomes)
    cpu = time.process_time()
    short = {**body, "max_tokens": 1, "temperature": 0}
    await closed_loop(url, [short] * 200, 8, seconds=60)
    flat = [value for values in late for value in values]
    return {
        "streams": num_streams,
        "late_us": {name: 1e6 * quantile(flat, share) for name, share in (("p50", 0.5), ("p99", 0.99))},
        "cpu_us_per_event": 1e6 * per_event,
        "cpu_us_per_request": 1e6 * (time.process_time() - cpu) / 200,
    }


def wait_for(url: str) -> None:
    for _ in range(100):
        try:
            httpx.post(url, json={"max_tokens": 1, "temperature": 0}, trust_env=False)
            return
        except httpx.ConnectError:
            time.sleep(0.1)
    raise RuntimeError(f"the trivial server at {url} did not start within 10 s")


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve(int(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description="Measure the load generator's own cost.")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--events", type=int, default=200, help="events of each stream")
    parser.add_argument("--gap", type=float, default=0.02, help="seconds between two events of a stream")
    args = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/completions"
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.load_overhead", "serve", str(port)])
    try:
        wait_for(url)
        for num_streams in args.streams:
            print(json.dumps(asyncio.run(_measure(url, num_streams, args.events, args.gap))))
    finally:
        process.terminate()
        process.wait(10)


if __name__ == "__main__":
    main()
