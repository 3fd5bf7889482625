"""A gateway holds one gRPC stream to each backbone, and sends every request to the least loaded backbone.

A backbone sends a message several times per second, even if it is idle (`services.engine.server.HEARTBEAT_S`). The
gateway therefore assumes that a silent backbone is stopped, hung or disconnected, and continues its requests on
another backbone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.gateway.backbones.backbone_stream import CONNECT_TIMEOUT_S, BackboneStream
from services.gateway.backbones.failover import OnResumed, ResumableRequest
from services.gateway.errors import ApiError, ApiRefusal
from services.gateway.health import Health

log = logging.getLogger(__name__)

FIND_PERIOD_S = 5.0  # seconds between two searches for backbones, while all known backbones answer
# Seconds after which the statuses of the backbones are stale, so that the gateway asks for new statuses. While a
# backbone is missing or silent, the gateway also waits this long between two searches for backbones.
STATUS_TTL_S = 0.5
STATUS_TIMEOUT_S = 5.0  # seconds after which a request for the statuses of all backbones fails
SILENCE_TICK_S = 0.1  # seconds between two checks of how long each backbone has been silent
MAX_SILENT_S = 1.0  # seconds of silence after which a backbone is given up, if another backbone answers
# Seconds of silence after which a backbone is given up while all backbones are silent. This limit is longer than
# MAX_SILENT_S, because no other backbone could continue the requests. A backbone that is only delayed also answers
# again before a new backbone has started.
MAX_SILENT_ALONE_S = 10.0

# a function that returns the statuses of the backbones that answer; each status has the key `endpoint`
AskStatuses = Callable[[], Awaitable[list[dict[str, Any]]]]


def unresponsive_endpoints(silent_s: Mapping[str, float]) -> list[str]:
    """Return the endpoints of the backbones that the gateway should give up.

    `silent_s` maps the endpoint of each backbone to the seconds since the backbone's last message.
    """
    does_one_answer = any(seconds < MAX_SILENT_S for seconds in silent_s.values())
    limit = MAX_SILENT_S if does_one_answer else MAX_SILENT_ALONE_S
    return [endpoint for endpoint, seconds in silent_s.items() if seconds >= limit]


def _ignore_pause(pause: float | None) -> None: ...


class BackbonePool:
    """A `BackbonePool` is a `TokenSource` that uses all backbone replicas.

    `start`, `stop` and `generate` must be called on the same event loop. The pool calls `on_resumed` each time a
    request continues on another backbone.
    """

    def __init__(self, ask_statuses: AskStatuses, on_resumed: OnResumed = _ignore_pause) -> None:
        self._ask_statuses, self._on_resumed = ask_statuses, on_resumed
        self._streams: dict[str, BackboneStream] = {}
        # the time.monotonic() at which the latest statuses of the backbones arrived, and these statuses
        self._last: tuple[float, list[dict[str, Any]]] = (0.0, [])
        self._tasks: list[asyncio.Task[None]] = []
        self._search: asyncio.Task[None] | None = None
        self._opened = asyncio.Event()
        self._is_stopping = False

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._count_silence())]

    async def stop(self) -> None:
        self._is_stopping = True
        self._opened.set()
        tasks = [*self._tasks, *([self._search] if self._search else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(stream.close() for stream in self._streams.values()))

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None = None,
    ) -> AsyncGenerator[TokenOutput, None]:
        """Yield the outputs of a request, and continue the request on another backbone if its backbone is lost.

        Raises the exceptions of `Engine.generate`, and ApiError (UNAVAILABLE) if no backbone answers.
        """
        request = ResumableRequest(request_id, prompt_token_ids, params, timeout, self._on_resumed)
        stream = self._least_loaded() or await self._find_one()
        async with aclosing(request.run(stream, self._find_stream)) as outputs:
            async for output in outputs:
                yield output

    async def statuses(self) -> list[dict[str, Any]]:
        """Return the statuses of the backbones that answer, in the order of their endpoints.

        The statuses are at most STATUS_TTL_S seconds old. Raises EngineFailed if no backbone answers.
        """
        asked_at, statuses = self._last
        if time.monotonic() - asked_at > STATUS_TTL_S:
            try:
                statuses = await asyncio.wait_for(self._ask_statuses(), STATUS_TIMEOUT_S)
            except Exception as error:
                raise EngineFailed(f"No backbone answers ({type(error).__name__}).") from error
            statuses = sorted(statuses, key=lambda status: str(status["endpoint"]))
            self._last = time.monotonic(), statuses
        if not statuses:
            raise EngineFailed("No backbone answers.")
        return statuses

    async def health(self) -> Health:
        """Return the health of the backbones; the field `detail` names the backbones and shards that do not work."""
        try:
            statuses = await self.statuses()
        except EngineFailed as error:
            return Health(is_ready=False, detail=str(error))
        failing = [status["endpoint"] for status in statuses if not status["engine"]["is_healthy"]]
        if len(failing) == len(statuses):
            return Health(is_ready=False, detail="The engine's last steps failed.")
        down = sorted({shard_id for status in statuses for shard_id in status.get("down", [])})
        details = [f"Backbones whose last steps failed: {', '.join(failing)}."] if failing else []
        if down:
            details.append(f"Shards that do not serve what they should: {', '.join(down)}.")
        return Health(is_ready=True, is_degraded=bool(details), detail=" ".join(details))

    def _least_loaded(self, avoid: str = "") -> BackboneStream | None:
        """Return the open stream with the fewest requests, or None if no stream is open.

        A stream whose backbone has been silent for MAX_SILENT_S seconds is returned only if all backbones are silent.
        The stream to the endpoint `avoid` is returned only if no other backbone answers.
        """
        is_open = [stream for stream in self._streams.values() if stream.is_open]
        return min(
            is_open,
            key=lambda stream: (stream.silent_s >= MAX_SILENT_S, stream.endpoint == avoid, stream.num_requests),
            default=None,
        )

    async def _find_one(self) -> BackboneStream:
        await self._find()
        if stream := self._least_loaded():
            return stream
        raise ApiError(ApiRefusal.UNAVAILABLE, "No backbone answers; try again.", retry_after=1)

    async def _find_stream(self, avoid: str, wait_s: float) -> BackboneStream | None:
        """Return a stream for a request that lost its backbone, or None if no stream opens within `wait_s` seconds.

        The stream to the endpoint `avoid` is returned only if no other backbone answers.
        """
        stop_at = time.monotonic() + wait_s
        while not (stream := self._least_loaded(avoid)) and time.monotonic() < stop_at:
            if self._is_stopping:
                raise ApiError(ApiRefusal.UNAVAILABLE, "The gateway that answers this request is stopping; try again.")
            self._opened.clear()
            self._begin_search()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._opened.wait(), min(STATUS_TTL_S, stop_at - time.monotonic()))
        return stream

    async def _watch(self) -> None:
        while True:
            await self._find()
            streams = self._streams.values()
            is_complete = streams and all(stream.is_open and stream.silent_s < MAX_SILENT_S for stream in streams)
            await asyncio.sleep(FIND_PERIOD_S if is_complete else STATUS_TTL_S)

    async def _count_silence(self) -> None:
        while True:
            await asyncio.sleep(SILENCE_TICK_S)
            # Silence is counted in ticks and not by the clock. No tick passes while this process does not run, so the
            # process does not take its own pause for the silence of a backbone.
            for stream in self._streams.values():
                stream.silent_s += SILENCE_TICK_S
            silent_s = {endpoint: stream.silent_s for endpoint, stream in self._streams.items() if stream.is_open}
            for endpoint in unresponsive_endpoints(silent_s):
                self._streams[endpoint].give_up(f"the backbone was silent for {silent_s[endpoint]:.1f} s")

    async def _find(self) -> None:
        """Open streams to new backbones and close broken streams. Concurrent callers share one search."""
        await asyncio.shield(self._begin_search())

    def _begin_search(self) -> asyncio.Task[None]:
        if self._search is None or self._search.done():
            self._search = asyncio.create_task(self._search_once())
        return self._search

    async def _search_once(self) -> None:
        with suppress(EngineFailed):
            await self.statuses()
        endpoints = {status["endpoint"] for status in self._last[1]}
        for endpoint in [known for known, stream in self._streams.items() if not stream.is_open]:
            await self._streams.pop(endpoint).close()
        await asyncio.gather(*(self._open(endpoint) for endpoint in endpoints - self._streams.keys()))

    async def _open(self, endpoint: str) -> None:
        stream = BackboneStream(endpoint)
        try:
            await stream.open()
        except TimeoutError:
            await stream.close()
            log.warning("The backbone %s does not answer within %s s.", endpoint, CONNECT_TIMEOUT_S)
        else:
            self._streams[endpoint] = stream
            self._opened.set()
