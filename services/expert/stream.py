"""The client's end of one shard's stream, and the event loop that all of them share.

Replies go into the inbox given with the request, as (request id, reply), or (request id, None) if the stream was lost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import Any

import grpc

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from services.expert.wire import CHANNEL_OPTIONS

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0
MIN_RECONNECT_S, MAX_RECONNECT_S = 0.05, 1.0
MAX_REST_S = 30.0
CLOSE_TIMEOUT_S = 5.0
PACE_KEPT = 0.9  # of what earlier replies said about a shard's pace, with each new one

Inbox = SimpleQueue[tuple[int, pb.ComputeReply | None]]


class LoopThread:
    """An event loop on a thread of its own; gRPC objects belong to the loop that made them."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        self.loop.call_soon_threadsafe(function, *args)

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(CLOSE_TIMEOUT_S)


@cache
def shared_loop_thread() -> LoopThread:
    """One loop for all streams of the process, never closed.

    All loops of a process share gRPC's completion queue: an event for a loop that is closed would raise in whichever
    loop happens to take it, and hold up the events behind it.
    """
    return LoopThread("expert-streams")


@dataclass(slots=True)
class _Owed:
    """A request that the shard has not answered; `inbox` is None where nobody waits for it any more."""

    num_rows: int
    inbox: Inbox | None


class ShardStream:
    """A stream that is opened again whenever it breaks.

    `send`, `forget` and `close` belong to the loop; the rest may be asked from any thread.
    """

    def __init__(self, endpoint: str, loop_thread: LoopThread) -> None:
        self.endpoint = endpoint
        self.queue_depth = 0  # as of the last reply
        self.is_down = False  # hopeful until the first attempt to connect has failed
        self.heard_at = 0.0
        self._rests_until = 0.0
        self._num_rests = 0
        self._pending: dict[int, _Owed] = {}
        self._num_rows_owed = 0
        self._paced_rows = self._paced_us = 0.0  # recent replies, each counting by its rows
        self._queue_us = 0  # as of the last reply
        self._outbox: asyncio.Queue[pb.ComputeRequest] = asyncio.Queue()
        self._task: asyncio.Task[None]
        loop_thread.call_soon(self._start)

    @property
    def predicted_s(self) -> float:
        """How long the shard should take for the rows it owes, going by what its replies said; 0 before the first."""
        us_per_row = self._paced_us / self._paced_rows if self._paced_rows else 0.0
        return (self._queue_us + us_per_row * self._num_rows_owed) / 1e6

    def is_resting(self, now: float) -> bool:
        return now < self._rests_until

    def rest(self, now: float) -> None:
        """Passes the shard over for a while because it owes answers: 1 s, doubled each time until it answers."""
        self._rests_until = now + min(MAX_REST_S, 2.0**self._num_rests)
        self._num_rests += 1

    def send(self, request: pb.ComputeRequest, inbox: Inbox) -> None:
        if self.is_down:
            inbox.put((request.id, None))
        else:
            self._pending[request.id] = _Owed(request.num_rows, inbox)
            self._num_rows_owed += request.num_rows
            self._outbox.put_nowait(request)

    def forget(self, request_id: int) -> None:
        """Drops the reply to a request that nobody waits for any more; the shard computes it all the same."""
        if owed := self._pending.get(request_id):
            owed.inbox = None

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._keep_open())

    async def _keep_open(self) -> None:
        delay = MIN_RECONNECT_S
        try:
            while True:
                reason = await self._converse_until_broken()
                delay = min(2 * delay, MAX_RECONNECT_S) if self.is_down else MIN_RECONNECT_S
                if not self.is_down:
                    log.warning("The stream to shard %s is down: %s.", self.endpoint, reason)
                self._lose_pending()
                await asyncio.sleep(delay)
        finally:
            self._lose_pending()

    async def _converse_until_broken(self) -> str:
        try:
            await self._converse()
        except grpc.aio.AioRpcError as error:
            return str(error.details())
        except TimeoutError:
            return f"no connection within {CONNECT_TIMEOUT_S} s"
        return "the shard ended it"

    async def _converse(self) -> None:
        async with grpc.aio.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS) as channel:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):  # wait_for of Python 3.11 can swallow a cancellation
                await channel.channel_ready()
            call = expert_pb2_grpc.ExpertStub(channel).Compute()  # type: ignore[no-untyped-call]
            writing = asyncio.create_task(self._write(call))
            if self.is_down:
                log.warning("The stream to shard %s is up again.", self.endpoint)
            self.is_down = False
            try:
                async for reply in call:
                    self._deliver(reply)
            finally:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outbox.get())

    def _deliver(self, reply: pb.ComputeReply) -> None:
        self.heard_at = time.monotonic()
        self.queue_depth = reply.queue_depth
        self._rests_until, self._num_rests = 0.0, 0
        owed = self._pending.pop(reply.id, None)
        if owed is None:
            return
        self._num_rows_owed -= owed.num_rows
        if reply.HasField("sums"):
            self._note_pace(reply, owed.num_rows)
        if owed.inbox is not None:
            owed.inbox.put((reply.id, reply))

    def _note_pace(self, reply: pb.ComputeReply, num_rows: int) -> None:
        self._queue_us = reply.queue_us
        self._paced_rows = PACE_KEPT * self._paced_rows + num_rows
        self._paced_us = PACE_KEPT * self._paced_us + reply.compute_us

    def _lose_pending(self) -> None:
        self.is_down = True
        self._outbox = asyncio.Queue()
        pending, self._pending, self._num_rows_owed = self._pending, {}, 0
        for request_id, owed in pending.items():
            if owed.inbox is not None:
                owed.inbox.put((request_id, None))
