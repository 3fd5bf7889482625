"""The backbones as a gateway sees them: one gRPC stream to each, and every request on the least loaded one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc

from protos.expertmesh.engine.v1 import engine_pb2 as pb
from protos.expertmesh.engine.v1 import engine_pb2_grpc
from protos.options import CHANNEL_OPTIONS
from services.engine.request import EngineFailed, SamplingParams, TokenOutput
from services.gateway.errors import ApiError, Refusal
from services.gateway.generation import Health
from services.link.wire import failure_from_proto, output_from_proto, start_to_proto

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0
FIND_PERIOD_S = 5.0  # between two questions which backbones there are, as long as nothing is amiss
STATUS_TTL_S = 0.5
STATUS_TIMEOUT_S = 5.0

AskStatuses = Callable[[], Awaitable[list[dict[str, Any]]]]  # of every backbone that answers; each names its `endpoint`


class BackboneStream:
    """One stream to one backbone; it belongs to the loop that made it, and is of no use once it is broken."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.is_open = endpoint, False
        self._commands: asyncio.Queue[pb.Command] = asyncio.Queue()
        self._inboxes: dict[str, asyncio.Queue[pb.Output | None]] = {}
        self._channel = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        self._task: asyncio.Task[None] | None = None

    @property
    def num_requests(self) -> int:
        return len(self._inboxes)

    async def open(self) -> None:
        """Raises TimeoutError where nobody answers."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await self._channel.channel_ready()
        self.is_open = True
        self._task = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """Requests under way end as if the backbone had gone."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()

    async def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, timeout: float | None
    ) -> AsyncGenerator[TokenOutput, None]:
        start = start_to_proto(request_id, prompt_token_ids, params, timeout)
        inbox = self._inboxes[request_id] = asyncio.Queue[pb.Output | None]()
        self._commands.put_nowait(pb.Command(start=start))
        is_over = False
        try:
            while not is_over:
                message = await inbox.get()
                is_over = message is None or bool(message.finish_reason) or message.HasField("failure")
                yield _output(message)
        finally:
            self._inboxes.pop(request_id, None)
            if not is_over:
                self._commands.put_nowait(pb.Command(cancel=request_id))

    async def _listen(self) -> None:
        reason = "it ended the stream"
        try:
            call = engine_pb2_grpc.EngineStub(self._channel).Converse(self._send())  # type: ignore[no-untyped-call]
            async for message in call:
                self._deliver(message)
        except grpc.aio.AioRpcError as error:
            reason = str(error.details())
        finally:
            self.is_open = False
            log.warning("The stream to the backbone %s is down: %s.", self.endpoint, reason)
            for inbox in self._inboxes.values():
                inbox.put_nowait(None)

    def _deliver(self, message: pb.Outputs) -> None:
        for output in message.outputs:
            if inbox := self._inboxes.get(output.request_id):  # else it was cancelled meanwhile
                inbox.put_nowait(output)

    async def _send(self) -> AsyncIterator[pb.Command]:
        while True:
            yield await self._commands.get()


def _output(message: pb.Output | None) -> TokenOutput:
    if message is None:
        raise ApiError(Refusal.UNAVAILABLE, "The backbone that answered this request is gone; try again.")
    if message.HasField("failure"):
        raise failure_from_proto(message.failure)
    return output_from_proto(message)


class Backbones:
    """A `TokenSource` over every backbone replica; `start` and `stop` belong to the loop that asks it."""

    def __init__(self, ask_statuses: AskStatuses) -> None:
        self._ask_statuses = ask_statuses
        self._streams: dict[str, BackboneStream] = {}
        self._last: tuple[float, list[dict[str, Any]]] = (0.0, [])
        self._watching: asyncio.Task[None] | None = None
        self._search: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        tasks = [task for task in (self._watching, self._search) if task is not None]
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
        """Raises what `Engine.generate` raises, and ApiError (UNAVAILABLE) where no backbone answers."""
        stream = self._least_loaded() or await self._find_one()
        outputs = stream.generate(request_id, prompt_token_ids, params, timeout)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()

    async def statuses(self) -> list[dict[str, Any]]:
        """Of every backbone that answers, by endpoint, at most half a second old; EngineFailed if none does."""
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

    def _least_loaded(self) -> BackboneStream | None:
        is_open = [stream for stream in self._streams.values() if stream.is_open]
        return min(is_open, key=lambda stream: stream.num_requests, default=None)

    async def _find_one(self) -> BackboneStream:
        await self._find()
        if stream := self._least_loaded():
            return stream
        raise ApiError(Refusal.UNAVAILABLE, "No backbone answers; try again.", retry_after=1)

    async def _watch(self) -> None:
        while True:
            await self._find()
            is_well = self._streams and all(stream.is_open for stream in self._streams.values())
            await asyncio.sleep(FIND_PERIOD_S if is_well else STATUS_TTL_S)

    async def _find(self) -> None:
        """Opens streams to backbones that are new, drops those that broke; all who ask at once share one search."""
        if self._search is None or self._search.done():
            self._search = asyncio.create_task(self._search_once())
        await asyncio.shield(self._search)

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
