"""The benchmark measures how much time REST and gRPC add to the engine's time to the first token.

    python -m benchmarks.first_token                      # the demo model, 3 shards, one stream at a time
    python -m benchmarks.first_token --requests 200 --json out.json

With REST, the client's time starts before the client connects. With gRPC the connection stays open, and the time starts
before the client sends the request. In both cases the client's time ends when the bytes of the first token arrive. The
engine's time starts when the request arrives at the engine, and ends with the first token. The benchmark reads the
engine's time from the backbone's log. The difference between the two times is the cost of the gateway's and the
client's processes, the protocols, the tokenizer and the detokenizer. Prompts share no prefix.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks.load import FIRST_ORDINARY_ID
from benchmarks.server import Server, server
from protos.expertmesh.inference.v1 import inference_pb2 as pb
from protos.expertmesh.inference.v1 import inference_pb2_grpc
from services.cli.drill.event_stream import post

VOCAB_SIZE, PROMPT_LEN, OUTPUT_LEN, WARM_UP = 512, 64, 4, 10
TIMEOUT_S, LOG_DELAY_S = 60.0, 0.5
BAR_MS = 5.0

SendPrompt = Callable[[list[int]], Awaitable[float]]  # prompt -> seconds to the first token


def through_rest(running: Server, model: str) -> SendPrompt:
    async def send(prompt: list[int]) -> float:
        body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_LEN, "temperature": 0, "stream": True}
        started = time.perf_counter()
        answer = await post(f"{running.url}/v1/completions", {**body, "ignore_eos": True}, TIMEOUT_S)
        assert answer.status == 200, answer.body
        return next(answer.events()).came_at - started

    return send


def through_grpc(stub: Any) -> SendPrompt:
    async def send(prompt: list[int]) -> float:
        sampling = pb.SamplingParams(max_tokens=OUTPUT_LEN, temperature=0, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
        started, first = time.perf_counter(), 0.0
        async for chunk in stub.GenerateStream(request):
            first = first or (time.perf_counter() if chunk.choice.token_ids else 0.0)
        return first - started

    return send


def engine_times(running: Server) -> list[float]:
    """Return, for each request, the time to the first token that the engine measured, in seconds.

    The times are in the order in which the requests ended.
    """
    backbone = next(pid for pid, name in running.processes().items() if "backbone" in name.lower())
    lines = Path(f"/proc/{backbone}/fd/2").resolve().read_text().splitlines()
    records = [json.loads(line) for line in lines if '"first_token_s"' in line]
    return [
        record["first_token_s"]
        for record in records
        if record["num_prompt_tokens"] == PROMPT_LEN and record["first_token_s"]
    ]


async def measure(running: Server, send: SendPrompt, num_requests: int) -> list[tuple[float, float]]:
    """Send prompts one after another; return a pair of times to the first token, in seconds, for each prompt.

    A pair is (time that the client measured, time that the engine measured).
    """
    rng, times = random.Random(time.time_ns()), list[float]()
    for _ in range(WARM_UP + num_requests):
        times.append(await send([rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(PROMPT_LEN)]))
    await asyncio.sleep(LOG_DELAY_S)  # wait until the backbone has written its last log line
    return list(zip(times, engine_times(running)[-len(times) :], strict=True))[WARM_UP:]


async def run(running: Server, num_requests: int) -> dict[str, dict[str, float]]:
    found = {"REST": await measure(running, through_rest(running, running.model_id()), num_requests)}
    async with grpc.aio.insecure_channel(running.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        found["gRPC"] = await measure(running, through_grpc(stub), num_requests)
    return {surface: summary(pairs) for surface, pairs in found.items()}


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Return the medians of the client's times, the engine's times and the differences, all in milliseconds.

    The result also has the 90th percentile of the differences. A pair is (the client's time, the engine's time) for the
    same request, in seconds.
    """
    added = sorted(1000 * (client - engine) for client, engine in pairs)
    return {
        "client_ms": 1000 * statistics.median(client for client, _ in pairs),
        "engine_ms": 1000 * statistics.median(engine for _, engine in pairs),
        "added_ms": statistics.median(added),
        "added_p90_ms": added[len(added) * 9 // 10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure what REST and gRPC add to the engine's time to the first token."
    )
    parser.add_argument("--requests", type=int, default=100, help="requests through each API")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with server("--log-format", "json") as running:
        found = asyncio.run(run(running, arguments.requests))
    table = Table("", "client, ms", "engine, ms", "added, ms", "90 % below", title="time to the first token, medians")
    for surface, row in found.items():
        table.add_row(surface, *(f"{value:.1f}" for value in row.values()))
    Console().print(table, f"bar: less than {BAR_MS:g} ms added")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
