"""`ask` sends one request to an OpenAI-compatible server and times the reply; `open_loop` sends many requests."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from services.cli.drill.event_stream import StreamedReply, post


@dataclass(frozen=True)
class RequestOutcome:
    """A `RequestOutcome` records one request as the client saw it. Times are in seconds from the start of the run.

    - `event_times`, `events`: arrival time and data of each stream event with text
    - `num_prompt`, `num_cached`, `num_generated`: numbers of tokens, as counted by the server
    - `error`: kind of failure, or empty if the request succeeded
    - `cache`: value of the reply's header x-expertmesh-cache, which tells how the prefix cache was used
    """

    sent_at: float
    ended_at: float
    event_times: tuple[float, ...] = ()
    num_prompt: int = 0
    num_cached: int = 0
    num_generated: int = 0
    error: str = ""
    cache: str = ""
    events: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def ttft_s(self) -> float:
        """Return the seconds from the sending of the request to the arrival of the first stream event with text."""
        return self.event_times[0] - self.sent_at

    @property
    def text(self) -> str:
        """Return the generated text of the first choice.

        The stream events are parsed only here, because parsing during the run would disturb the timing.
        """
        choices = (json.loads(event)["choices"][0] for event in self.events)
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)

    @property
    def gaps_s(self) -> list[float]:
        """Return the times between consecutive stream events with text, in seconds."""
        return [later - earlier for earlier, later in itertools.pairwise(self.event_times)]


async def ask(url: str, body: dict[str, Any], origin: float, timeout_s: float = 600) -> RequestOutcome:
    """Send one streamed request and return its outcome.

    If the server or the connection fails, the outcome's `error` names the kind of failure. `origin` is the value of
    `time.perf_counter` at the start of the run.
    """
    sent_at = time.perf_counter() - origin
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        answer = await post(url, body, timeout_s)
    except OSError as failure:  # TimeoutError is an OSError too
        return RequestOutcome(sent_at, time.perf_counter() - origin, error=type(failure).__name__)
    ended_at = time.perf_counter() - origin
    if answer.status != 200:
        return RequestOutcome(sent_at, ended_at, error=f"HTTP {answer.status}")
    return read(answer, sent_at, ended_at, origin)


def read(answer: StreamedReply, sent_at: float, ended_at: float, origin: float) -> RequestOutcome:
    """Return the outcome of a request whose reply streams a completion or a chat.

    Only the stream events with the usage or with an error are parsed. `origin` is the value of `time.perf_counter` at
    the start of the run; `sent_at` and `ended_at` are in seconds from the start of the run.
    """
    times: list[float] = []
    events: list[bytes] = []
    usage: dict[str, Any] = {}
    error = ""
    for event in answer.events():
        if event.data.startswith(b'{"error"'):
            error = str(json.loads(event.data)["error"].get("type", "error"))
        elif b'"choices":[]' in event.data or b'"choices": []' in event.data:
            usage = json.loads(event.data).get("usage") or {}
        elif has_text(event.data):
            times.append(event.came_at - origin)
            events.append(event.data)
    details = usage.get("prompt_tokens_details") or {}
    counts = (usage.get("prompt_tokens", 0), details.get("cached_tokens") or 0, usage.get("completion_tokens", 0))
    if not error and not times:
        error = "no token"
    cache = answer.headers.get("x-expertmesh-cache", "")
    return RequestOutcome(sent_at, ended_at, tuple(times), *counts, error, cache, tuple(events))


def has_text(data: bytes) -> bool:
    """Return True if `data` contains text, and False if it contains only a role or a finish reason.

    `data` is one chunk of a completion or a chat.
    """
    is_empty = b'"text":""' in data or b'"delta":{}' in data or b'"content":""' in data
    return data.startswith(b"{") and not is_empty


async def open_loop(
    url: str, bodies: Iterable[dict[str, Any]], rate: float, seconds: float, seed: int, timeout_s: float = 600
) -> list[RequestOutcome]:
    """Send `bodies` to `url` at random moments, and return the outcomes in the order of sending.

    The moments form a Poisson process of `rate` requests per second; `seed` determines the moments. A slow reply does
    not delay later requests. Sending ends after `seconds` seconds, or earlier if all bodies are sent. The function then
    waits for the replies to the requests in flight.
    """
    draw, origin, due = random.Random(seed), time.perf_counter(), 0.0
    running = []
    async with asyncio.TaskGroup() as tasks:
        for body in bodies:
            due += draw.expovariate(rate)
            if due > seconds:
                break
            await asyncio.sleep(origin + due - time.perf_counter())
            running.append(tasks.create_task(ask(url, body, origin, timeout_s)))
    return [task.result() for task in running]
