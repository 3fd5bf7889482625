"""The benchmark measures through REST how many requests use the prefix cache and how much time the cache saves.

    python -m benchmarks.prefix_cache                        # the demo model, 3 shards; about 3 minutes
    python -m benchmarks.prefix_cache --json out.json

There are four patterns of 64 requests each. Each request begins with the same tokens as earlier requests (shared
tokens). If the server reuses at least half of the shared tokens, the request is a hit. The bar is 50 hits of 64 in
every pattern. After each request, the benchmark sends a cold request, which has the same length and no shared tokens.
The time that the cache saves is the TTFT of the cold request minus the TTFT of the request with shared tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.load import FIRST_ORDINARY_ID, quantile
from benchmarks.server import Server, new_client, server
from model.demo.corpus import read_corpus
from services.cli.drill.load import RequestOutcome, ask

NUM_REQUESTS, BAR = 64, 50
NUM_CONVERSATIONS = 8
OPTIONS: dict[str, Any] = {"max_tokens": 16, "temperature": 0}


@dataclass(frozen=True)
class PromptPattern:
    """A `PromptPattern` is a list of prompts as token ids; all prompts have the same first `num_shared` tokens."""

    name: str
    num_shared: int
    prompts: tuple[tuple[int, ...], ...]


def prefix_patterns(vocab_size: int, seed: int) -> Iterator[PromptPattern]:
    """Yield three patterns: a long shared prefix, 100 shared tokens before this prefix, and a short shared prefix."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(count))

    shared = ids(1000)
    yield PromptPattern("1,000 shared", 1000, tuple(shared + ids(60) for _ in range(NUM_REQUESTS)))
    head = ids(100)
    yield PromptPattern("shifted by 100", 1100, tuple(head + shared + ids(60) for _ in range(NUM_REQUESTS)))
    short = ids(400)
    yield PromptPattern("under 528", 400, tuple(short + ids(60) for _ in range(NUM_REQUESTS)))


@dataclass(frozen=True)
class PrefixReuse:
    """A `PrefixReuse` has the reused tokens and the TTFT of one request, and the TTFT of the cold request after it."""

    num_shared: int
    num_cached: int
    reason: str  # the server's reason why the prefix cache did not reuse more tokens
    ttft_s: float
    cold_ttft_s: float

    @property
    def is_hit(self) -> bool:
        return self.num_cached >= max(1, self.num_shared / 2)


def make_reuse(num_shared: int, warm: RequestOutcome, cold: RequestOutcome) -> PrefixReuse:
    for outcome in (warm, cold):
        if outcome.error:
            raise RuntimeError(f"a request failed: {outcome.error}")
    reason = warm.cache.partition(";")[0]
    return PrefixReuse(num_shared, warm.num_cached, reason, warm.ttft_s, cold.ttft_s)


async def run_prompts(running: Server, pattern: PromptPattern, vocab_size: int, concurrency: int) -> list[PrefixReuse]:
    """Send each prompt of a pattern and then a cold prompt of the same length.

    `concurrency` such pairs of prompts run at the same time.
    """
    rng, url, results = random.Random(repr(pattern.name)), f"{running.url}/v1/completions", list[PrefixReuse]()
    source = enumerate(pattern.prompts)

    async def pairs() -> None:
        for i, prompt in source:
            other = [rng.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in prompt]
            warm, cold = [await complete(url, "prompt", ids) for ids in (list(prompt), other)]
            results.append(make_reuse(pattern.num_shared if i else 0, warm, cold))

    await asyncio.gather(*(pairs() for _ in range(concurrency)))
    return results


async def run_chats(running: Server, concurrency: int) -> list[PrefixReuse]:
    """Run chats in which each request repeats all earlier questions and answers and adds a new question."""
    url = f"{running.url}/v1/chat/completions"
    lines = [line.strip() for text in read_corpus()[1] for line in text.splitlines() if 40 < len(line) < 100]
    results: list[PrefixReuse] = []
    semaphore = asyncio.Semaphore(concurrency)

    async def converse(client: httpx.AsyncClient, number: int) -> None:
        rng, messages, num_before = random.Random(number), list[dict[str, str]](), 0
        for _ in range(NUM_REQUESTS // NUM_CONVERSATIONS):
            messages.append({"role": "user", "content": " ".join(rng.choices(lines, k=4))})
            other = [{**message, "content": message["content"][::-1]} for message in messages]
            async with semaphore:
                warm = await complete(url, "messages", messages)
                cold = await complete(url, "messages", [{"role": "user", "content": str(rng.random())}, *other])
            results.append(make_reuse(num_before, warm, cold))
            answer = await client.post(url, json={"messages": messages, **OPTIONS})
            messages.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"] or ""})
            num_before = warm.num_prompt + warm.num_generated

    async with new_client(120) as client:
        await asyncio.gather(*(converse(client, number) for number in range(NUM_CONVERSATIONS)))
    return results


async def complete(url: str, kind: str, prompt: Sequence[Any]) -> RequestOutcome:
    return await ask(url, {kind: prompt, **OPTIONS}, time.perf_counter())


def summarize(results: Sequence[PrefixReuse]) -> dict[str, Any]:
    hits = [one for one in results if one.is_hit]
    return {
        "num_requests": len(results),
        "num_hits": len(hits),
        "reasons": dict(Counter(one.reason for one in results)),
        "cached_share": sum(one.num_cached for one in results) / max(1, sum(one.num_shared for one in results)),
        "ttft_ms": 1e3 * quantile([one.ttft_s for one in hits], 0.5),
        "cold_ttft_ms": 1e3 * quantile([one.cold_ttft_s for one in hits], 0.5),
    }


def report(summaries: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"prefix cache, {NUM_REQUESTS} requests a pattern, bar {BAR} hits; TTFT medians of the hits")
    for column in ("pattern", "hits", "reused of shared", "TTFT, ms", "without, ms", "reasons"):
        table.add_column(column, justify="left" if column in ("pattern", "reasons") else "right")
    for name, one in summaries.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in one["reasons"].items())
        hits = f"{one['num_hits']}" + ("" if one["num_hits"] >= BAR else " (missed)")
        times = [f"{one[key]:.0f}" for key in ("ttft_ms", "cold_ttft_ms")]
        table.add_row(name, hits, f"{one['cached_share']:.0%}", *times, reasons)
    return table


async def measure(running: Server, vocab_size: int, concurrency: int, seed: int) -> dict[str, dict[str, Any]]:
    summaries = {}
    for pattern in prefix_patterns(vocab_size, seed):
        summaries[pattern.name] = summarize(await run_prompts(running, pattern, vocab_size, concurrency))
    summaries["multi-turn chat"] = summarize(await run_chats(running, concurrency))
    return summaries


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure hits of the prefix cache in four patterns.")
    parser.add_argument("--model", default="", help="model directory; the demo model if left out")
    parser.add_argument("--vocab", type=int, default=2048, help="token ids of prompts are drawn below this number")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at a time")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = ["--model", args.model] if args.model else []
    with server(*model, "--shards", str(args.shards)) as running:
        summaries = asyncio.run(measure(running, args.vocab, args.concurrency, args.seed))
        engine = running.status()["engine"]
    Console(width=120).print(report(summaries))
    if args.json:
        args.json.write_text(json.dumps({"patterns": summaries, "engine": engine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
