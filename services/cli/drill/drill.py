"""Drills: steady load on a running server, once undisturbed and once with something done to it meanwhile.

What is done, and how it is told that all is whole again, is handed in: `benchmarks/failures.py` does worse things than
the command line. Requests arrive at the same moments in both runs, whatever the server does.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from services.cli.drill.load import RequestOutcome, open_loop
from services.cli.drill.verdict import Verdict, compare

POLL_S = 0.1
SENTENCES = (
    "The first thing to know about a lighthouse is",
    "def read_config(path):",
    "In the morning the harbour was quiet, and",
    "class Queue:",
    "A good knife is sharpened by",
    "import os\n",
)


@dataclass(frozen=True)
class Load:
    """Requests for `url`, `rate` a second on average, none later than `seconds` after the start."""

    url: str
    rate: float
    seconds: float
    bodies: Sequence[dict[str, Any]]
    seed: int = 0
    timeout_s: float = 120.0

    @classmethod
    def of_sentences(cls, url: str, rate: float, seconds: float, max_tokens: int, seed: int = 0) -> Load:
        """Greedy completions of a few words each, no two alike."""
        bodies = tuple(itertools.islice(_bodies(max_tokens), max(1, round(3 * rate * seconds) + 10)))
        return cls(f"{url.rstrip('/')}/v1/completions", rate, seconds, bodies, seed)

    async def run(self) -> list[RequestOutcome]:
        return await open_loop(self.url, self.bodies, self.rate, self.seconds, self.seed, self.timeout_s)


def _bodies(max_tokens: int) -> Iterator[dict[str, Any]]:
    for number, sentence in enumerate(itertools.cycle(SENTENCES)):
        prompt = f"{number}. {sentence}"
        yield {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Disturbance:
    """`do` is done `at_s` after the start; then `is_whole` is asked again and again, for at most `timeout_s`."""

    do: Callable[[], Awaitable[None]]
    is_whole: Callable[[], Awaitable[bool]]
    at_s: float
    timeout_s: float = 120.0

    async def run(self) -> float | None:
        """Seconds from the deed until all was whole again; None if it took too long."""
        await asyncio.sleep(self.at_s)
        await self.do()
        done_at = time.monotonic()
        while time.monotonic() - done_at < self.timeout_s:
            if await self.is_whole():
                return time.monotonic() - done_at
            await asyncio.sleep(POLL_S)
        return None


async def under_load(
    load: Load, disturbance: Disturbance, undisturbed: Sequence[RequestOutcome] | None = None, window_s: float = 30.0
) -> tuple[Verdict, float | None]:
    """The verdict, and the seconds until all was whole again.

    `undisturbed` may come from an earlier drill with the same load. Raises ValueError where that run fails already, and
    whatever the deed itself raises.
    """
    before = await load.run() if undisturbed is None else undisturbed
    tasks = asyncio.create_task(load.run()), asyncio.create_task(disturbance.run())
    try:
        after, whole_after_s = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    window_s = min(window_s, max(load.seconds - disturbance.at_s, POLL_S))
    return compare(before, after, disturbance.at_s, window_s), whole_after_s
