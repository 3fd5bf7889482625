"""The benchmark measures what multi-token prediction gains: the demo model's tokens per second with and without drafts.

    python -m benchmarks.drafting                              # 1 stream, 3 rounds; about 5 minutes
    python -m benchmarks.drafting --streams 1 4 8 --json out.json

Prompts are the beginnings of the demo's held-out files, and decoding is greedy. In each round a server with drafts and
a server without drafts run one after the other. The benchmark also checks that the greedy output is the same with and
without drafts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.load import closed_loop
from benchmarks.server import Server, new_client, server
from benchmarks.throughput import decode_speed
from model.demo.corpus import read_corpus

PROMPT_CHARACTERS = 400
BAR = 1.7  # required tokens per second with drafts, divided by tokens per second without drafts, at one stream
SIDES = {"drafts": (), "none": ("--draft-tokens", "0")}


def held_out_prompts() -> list[str]:
    return [text[:PROMPT_CHARACTERS] for text in read_corpus()[1] if len(text) >= 2 * PROMPT_CHARACTERS]


def body(prompt: str, num_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


@dataclass
class DraftingResult:
    """A `DraftingResult` collects the measurements of one server, which runs with or without drafts."""

    speeds: dict[int, list[float]] = field(default_factory=dict)  # number of streams -> tokens/s in each round
    texts: list[str] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def accepted(self) -> list[float]:
        """Return, for each position in a draft, the share of the drafted tokens that the server accepted."""
        drafted, accepted = (self.engine.get(f"{name}_by_position", []) for name in ("drafted", "accepted"))
        return [hits / tries for hits, tries in zip(accepted, drafted, strict=True) if tries]


async def texts(url: str, prompts: list[str], num_tokens: int) -> list[str]:
    async with new_client(120) as client:

        async def text(prompt: str) -> str:
            answer: httpx.Response = await client.post(url, json=body(prompt, num_tokens))
            return str(answer.raise_for_status().json()["choices"][0]["text"])

        return list(await asyncio.gather(*map(text, prompts)))


def measure(
    running: Server, side: DraftingResult, streams: list[int], num_tokens: int, num_samples: int, round_: int
) -> None:
    url, prompts = f"{running.url}/v1/completions", held_out_prompts()
    asyncio.run(closed_loop(url, [body(prompt, num_tokens) for prompt in prompts[-4:]], 1, seconds=600))  # warm-up
    for num_streams in streams:
        speeds = []
        for sample in range(num_samples):
            first = (round_ * num_samples + sample) * num_streams
            chosen = [prompts[(first + i) % len(prompts)] for i in range(num_streams)]
            outcomes = asyncio.run(closed_loop(url, [body(p, num_tokens) for p in chosen], num_streams, seconds=600))
            assert not any(outcome.error for outcome in outcomes)
            speeds.append(decode_speed(outcomes))
        side.speeds.setdefault(num_streams, []).append(statistics.mean(speeds))
    side.texts += asyncio.run(texts(url, prompts[4 * round_ : 4 * round_ + 4], num_tokens))
    time.sleep(1)  # the status that the server returns may be half a second old
    side.engine = running.status()["engine"]


def report(sides: dict[str, DraftingResult], streams: list[int]) -> tuple[Table, dict[int, float]]:
    table = Table(title="tokens/s of the demo model through REST, medians")
    for column in ("streams", *sides, "ratio"):
        table.add_column(column, justify="right")
    ratios = {}
    for num_streams in streams:
        medians = [statistics.median(side.speeds[num_streams]) for side in sides.values()]
        ratios[num_streams] = medians[0] / medians[1]
        bar = f" (bar {BAR})" if num_streams == 1 else ""
        table.add_row(str(num_streams), *(f"{speed:.1f}" for speed in medians), f"{ratios[num_streams]:.2f}×{bar}")
    return table, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure tokens per second with and without drafts.")
    parser.add_argument("--model", default="", help="model directory; the demo model if left out")
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8, help="measurements of each number of streams in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local-experts", action="store_true", help="run the experts in the backbone, without shards")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = [*(["--model", args.model] if args.model else []), *(["--local-experts"] if args.local_experts else [])]
    sides = {name: DraftingResult() for name in SIDES}
    for round_ in range(args.rounds):
        for name, side in sides.items():
            with server(*options, *SIDES[name]) as running:
                measure(running, side, args.streams, args.tokens, args.samples, round_)
    table, ratios = report(sides, args.streams)
    console = Console(width=120)
    console.print(table)
    accepted = sides["drafts"].accepted
    console.print(f"accepted by position: {', '.join(f'{share:.0%}' for share in accepted) or 'nothing was drafted'}")
    num_different = sum(a != b for a, b in zip(*(side.texts for side in sides.values()), strict=True))
    console.print(f"greedy texts that differ: {num_different} of {len(sides['drafts'].texts)}")
    if args.json:
        speeds = {name: side.speeds for name, side in sides.items()}
        report_ = {"speeds": speeds, "ratios": ratios, "accepted": accepted, "num_different": num_different}
        args.json.write_text(json.dumps(report_, indent=2) + "\n")


if __name__ == "__main__":
    main()
