"""A drill runs the same load on a running server twice, once undisturbed and once with a disturbance.

The caller supplies two functions: one causes the disturbance, and one checks whether the server has recovered. Thus
`benchmarks/failures.py` can cause worse disturbances than the command line. Requests are sent at the same moments in
both runs, no matter how fast the server answers.
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

POLL_S = 0.1  # seconds between two checks whether the server has recovered
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
    """A `Load` is a fixed sequence of requests to one URL. A slow reply does not delay the next requests.

    - `url`: address to which each of `bodies` is posted
    - `rate`: average number of requests per second
    - `seconds`: seconds from the start of the run during which requests are sent
    - `seed`: seed of the random moments of sending; two runs with the same seed send at the same moments
    - `timeout_s`: seconds after which a request counts as failed
    """

    url: str
    rate: float
    seconds: float
    bodies: Sequence[dict[str, Any]]
    seed: int = 0
    timeout_s: float = 120.0

    @classmethod
    def of_sentences(cls, url: str, rate: float, seconds: float, max_tokens: int, seed: int = 0) -> Load:
        """Return a load of greedy completions. The prompts are short, and no two prompts are equal."""
        bodies = tuple(itertools.islice(_bodies(max_tokens), max(1, round(3 * rate * seconds) + 10)))
        return cls(f"{url.rstrip('/')}/v1/completions", rate, seconds, bodies, seed)

    async def run(self) -> list[RequestOutcome]:
        """Send the requests and return their outcomes in the order of sending."""
        return await open_loop(self.url, self.bodies, self.rate, self.seconds, self.seed, self.timeout_s)


def _bodies(max_tokens: int) -> Iterator[dict[str, Any]]:
    for number, sentence in enumerate(itertools.cycle(SENTENCES)):
        prompt = f"{number}. {sentence}"
        yield {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Disturbance:
    """A `Disturbance` disturbs a server during a run, and waits until the server has recovered.

    - `do`: function that causes the disturbance
    - `is_whole`: function that returns True if the server has recovered
    - `at_s`: seconds from the start of the run to the call of `do`
    - `timeout_s`: maximum number of seconds from the end of `do` to the recovery
    """

    do: Callable[[], Awaitable[None]]
    is_whole: Callable[[], Awaitable[bool]]
    at_s: float
    timeout_s: float = 120.0

    async def run(self) -> float | None:
        """Disturb the server. Return the seconds from the end of `do` until the server has recovered.

        Return None if the server has not recovered after `timeout_s` seconds.
        """
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
    """Run a load without and with a disturbance, and return the pair (verdict, seconds until the server has recovered).

    - `undisturbed`: outcomes of an earlier undisturbed run of `load`; if None, an undisturbed run is made first
    - `window_s`: seconds after the disturbance in which the verdict compares the throughput

    The seconds are None if the server did not recover within `disturbance.timeout_s`. Raises ValueError if requests
    fail in the undisturbed run. An exception of `disturbance.do` also reaches the caller.
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
