"""The benchmark compares tokens per second of 3 expert shards with local experts, transformers and llama.cpp.

    make bench                                                                   # 3 rounds, about 15 minutes
    make bench ARGS="--llama-cpp /tmp/llama.cpp --rounds 5 --json out.json"
    make bench ARGS="--family deepseek_v3"

The benchmark compares four sides: expert shards, local experts, transformers and llama.cpp. In each round, every side
runs alone and stops before the next side starts, because even an idle server would use a twentieth of two cores. The
benchmark prints the median of each side over the rounds, the ratios of the medians, and the required ratios (bars). It
measures expert shards and local experts through REST. All sides compute in bf16 with the same number of threads.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.load import Prompts, RequestOutcome, closed_loop
from benchmarks.peers import TRIES, Speeds, Workload, has_llama_cpp, measure_llama_cpp, measure_transformers
from benchmarks.server import Server, server
from benchmarks.shape import SHAPES, write_shape

SHAPE = Path("/tmp/expertmesh-shape")  # Nemotron's shape; the names of the other families' directories begin alike
DISTRIBUTED, LOCAL, TRANSFORMERS, LLAMA_CPP = "distributed", "local experts", "transformers", "llama.cpp"
BARS = {  # required tokens per second of expert shards, divided by the tokens per second of the named side
    "decode × 1": {TRANSFORMERS: 2.5, LOCAL: 0.6, LLAMA_CPP: 0.6},
    "decode × 8": {TRANSFORMERS: 3.0, LOCAL: 0.85, LLAMA_CPP: 1.0},
    "decode × 16": {TRANSFORMERS: 4.0, LOCAL: 0.9, LLAMA_CPP: 1.1},
    "prefill": {TRANSFORMERS: 1.5, LOCAL: 0.9, LLAMA_CPP: 1.0},
}


def decode_speed(outcomes: list[RequestOutcome]) -> float:
    """Return the tokens per second of all streams together, in the time in which every stream decodes.

    The measured time starts when every stream has its first token, and ends when the first stream ends. With drafts, a
    stream event may contain several tokens. Therefore each event of a stream counts as the mean number of tokens per
    event of this stream.
    """
    start = max(outcome.event_times[0] for outcome in outcomes)
    end = min(outcome.event_times[-1] for outcome in outcomes)
    assert start < end, "the streams did not decode at the same time"
    tokens = sum(
        outcome.num_generated / len(outcome.event_times) * sum(start < when <= end for when in outcome.event_times)
        for outcome in outcomes
    )
    return tokens / (end - start)


class ThroughputClient:
    """A `ThroughputClient` measures one server. Every prompt is new, so that the prefix cache helps no request."""

    def __init__(self, running: Server, vocab_size: int, seed: int) -> None:
        self.url, self._vocab_size, self._seeds = f"{running.url}/v1/completions", vocab_size, itertools.count(seed)

    def streams(self, num_streams: int, prompt_len: int, output_len: int) -> list[RequestOutcome]:
        prompts = Prompts((prompt_len,), (output_len,), self._vocab_size, next(self._seeds))
        bodies = list(itertools.islice(prompts.bodies(), num_streams))
        outcomes = asyncio.run(closed_loop(self.url, bodies, num_streams, seconds=600))
        for outcome in outcomes:
            if outcome.error:
                raise RuntimeError(f"a request failed: {outcome.error}")
        return outcomes

    def measure(self, workload: Workload) -> Speeds:
        self.streams(max(workload.batches), workload.prompt_len, 8)  # warm-up
        lengths = workload.prompt_len, workload.output_len
        decode = {
            batch: max(decode_speed(self.streams(batch, *lengths)) for _ in range(TRIES)) for batch in workload.batches
        }
        first = min(self.streams(1, workload.prefill_len, 1)[0].ttft_s for _ in range(TRIES))
        return Speeds(decode, workload.prefill_len / first)


def wire_per_row(status: dict[str, Any]) -> dict[str, float]:
    """Return how many bytes the backbone sent and received, and how many messages it sent, per row.

    The numbers are means over all rows since the server started.
    """
    traffic = status["traffic"]
    assert traffic["num_rows"], "the backbone sent no rows to shards"
    return {name: traffic[name] / traffic["num_rows"] for name in ("sent_bytes", "received_bytes", "num_sent")}


def median(speeds: list[Speeds]) -> dict[str, float]:
    """Return the median tokens per second over `speeds` for each column: decode at each batch size, and prefill."""
    columns = {
        f"decode × {batch}": statistics.median(speed.decode[batch] for speed in speeds) for batch in speeds[0].decode
    }
    return {**columns, "prefill": statistics.median(speed.prefill for speed in speeds)}


def speed_table(speeds: dict[str, list[Speeds]]) -> Table:
    table = Table(
        title=f"tokens/s, median of {len(speeds[DISTRIBUTED])} rounds (least to most), {os.cpu_count()} cores"
    )
    columns = median(speeds[DISTRIBUTED])
    for column in ("", *columns):
        table.add_column(column, justify="right")
    for name, rounds in speeds.items():
        singles = [median([one]) for one in rounds]
        middle = median(rounds)
        words = [
            f"{middle[column]:.0f} ({min(s[column] for s in singles):.0f} to {max(s[column] for s in singles):.0f})"
            for column in columns
        ]
        table.add_row(name, *words)
    return table


def ratio_table(speeds: dict[str, list[Speeds]]) -> tuple[Table, dict[str, dict[str, float]]]:
    """Return the ratios of the speed of expert shards to the speed of each other side.

    The result is a pair: a table with the ratios and bars, and the same ratios by column and side.
    """
    medians = {name: median(rounds) for name, rounds in speeds.items()}
    others = [name for name in (TRANSFORMERS, LOCAL, LLAMA_CPP) if name in speeds]
    table = Table(title="3 shards through REST, against")
    for column in ("", *others):
        table.add_column(column, justify="right")
    ratios = {}
    for column, speed in medians[DISTRIBUTED].items():
        ratios[column] = {other: speed / medians[other][column] for other in others}
        bars = BARS.get(column, {})
        words = [
            f"{ratio:.2f}×" + (f" (bar {bars[other]}{', missed' if ratio < bars[other] else ''})" if bars else "")
            for other, ratio in ratios[column].items()
        ]
        table.add_row(column, *words)
    return table, ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare expert shards with local experts, transformers and llama.cpp."
    )
    parser.add_argument("--model", type=Path, help="model directory instead of the shape of --family")
    parser.add_argument(
        "--family", choices=SHAPES, default="nemotron_h", help=f"family whose shape is written to {SHAPE}* if missing"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt when decoding is measured")
    parser.add_argument("--output", type=int, default=32, help="tokens of each answer when decoding is measured")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt when prefill is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--llama-cpp", type=Path, help="the directory of a build by: python -m benchmarks.peers build DIR"
    )
    parser.add_argument("--without-peers", action="store_true", help="measure only expert shards and local experts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model is None:
        args.model = SHAPE if args.family == "nemotron_h" else SHAPE.with_name(f"{SHAPE.name}-{args.family}")
        if not (args.model / "config.json").exists():
            write_shape(args.model, args.family)
    workload = Workload(tuple(args.streams), args.prompt, args.output, args.prefill)
    vocab_size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    options = ["--model", str(args.model), "--dtype", args.dtype]
    wire: list[dict[str, float]] = []

    def serve(*more: str, is_remote: bool) -> Callable[[int], Speeds]:
        def measure(round_: int) -> Speeds:
            with server(*options, *more) as running:
                speeds = ThroughputClient(running, vocab_size, 1000 * round_).measure(workload)
                if is_remote:
                    wire.append(wire_per_row(running.status()))
                return speeds

        return measure

    sides: dict[str, Callable[[int], Speeds]] = {
        DISTRIBUTED: serve("--shards", str(args.shards), is_remote=True),
        LOCAL: serve("--local-experts", is_remote=False),
    }
    if not args.without_peers:
        sides[TRANSFORMERS] = lambda _: measure_transformers(args.model, workload, args.threads)
        if has_llama_cpp(args.llama_cpp):
            sides[LLAMA_CPP] = lambda _: measure_llama_cpp(args.llama_cpp, args.model, workload, args.threads)
        else:
            print("llama.cpp is left out: --llama-cpp has no build; build with: python -m benchmarks.peers build DIR")
    console = Console(width=120)
    load_before = os.getloadavg()
    speeds: dict[str, list[Speeds]] = {}
    for round_ in range(args.rounds):
        for name, side in sides.items():
            speeds.setdefault(name, []).append(side(round_))
            console.print(f"round {round_ + 1}, {name}: {speeds[name][-1]}", soft_wrap=True)
    ratios_table, ratios = ratio_table(speeds)
    console.print(speed_table(speeds), ratios_table)
    last = wire[-1]
    console.print(
        f"wire per token and MoE layer: {last['sent_bytes']:.0f} B out, {last['received_bytes']:.0f} B back, "
        f"{last['num_sent']:.2f} messages"
    )
    if args.json:
        rounds = {name: [asdict(speed) for speed in values] for name, values in speeds.items()}
        report = {"workload": asdict(workload), "speeds": rounds, "ratios": ratios, "wire": last}
        args.json.write_text(json.dumps({**report, "load_average_before": load_before}, indent=2) + "\n")


if __name__ == "__main__":
    main()
