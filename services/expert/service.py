"""The gRPC servicer of a shard: messages in, messages out, the arithmetic on the worker's thread.

`Compute` is served twice: by grpcio on the shard's endpoint, for any client, and by `Front` on a port of its own, where
it costs a fraction of that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import NoReturn

import grpc
import numpy as np

from cluster.pace import PaceFit
from cluster.topology import Pace
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from services.expert.checksum import checksum_of_reply
from services.expert.front import Front, ReplyTo
from services.expert.host import ExpertHost, Wanted
from services.expert.wire import Refused
from services.expert.worker import Worker

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[object, object]
MAX_UNREAD = 256  # requests of one stream whose replies it has not taken
PACE_SAMPLES = 256  # calls at most that the pace learns from at a time; every fourth is noted
Sample = tuple[int, int, bytes, int]  # layer, rows, experts of the picks, µs


@dataclass
class Counters:
    """What a shard did since it started."""

    num_requests: int = 0
    num_refusals: int = 0
    num_rows: int = 0
    num_picks: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    queue_us: int = 0
    compute_us: int = 0


class _Stream:
    """One backbone's stream: where its replies go, and whether anybody still waits for them.

    A client that does not read its replies is not read from either, or they would pile up here without end.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.replies: asyncio.Queue[pb.ComputeReply | None] = asyncio.Queue()
        self.room = asyncio.Semaphore(MAX_UNREAD)
        self.is_open = True

    def reply(self, reply: pb.ComputeReply | None) -> None:
        """Sends from any thread; None ends the stream."""
        if self.is_open:
            self.loop.call_soon_threadsafe(self.replies.put_nowait, reply)


class ExpertService(expert_pb2_grpc.ExpertServicer):
    """Serves one `ExpertHost`; at most `max_queue` requests wait, the rest are refused as OVERLOADED."""

    def __init__(self, host: ExpertHost, shard_id: str, incarnation: str, max_queue: int) -> None:
        self.host, self.shard_id, self.incarnation = host, shard_id, incarnation
        self.worker = Worker(max_queue, name=f"experts-{shard_id}")
        self.counters = Counters()
        self.pace = PaceFit()
        self.is_draining = False
        self._samples: deque[Sample] = deque(maxlen=PACE_SAMPLES)
        self._changing = asyncio.Lock()
        self._counting = threading.Lock()  # requests and refusals, which the loop and the worker both count

    def open_front(self, host: str) -> str:
        """Listens on a free port for streams that the worker's thread reads and answers; returns host:port."""
        self._front = Front(self.worker, self._accept, host)
        return self._front.endpoint

    async def close_front(self) -> None:
        await self.worker.run(self._front.close)

    async def Compute(
        self, requests: AsyncIterator[pb.ComputeRequest], context: Context
    ) -> AsyncIterator[pb.ComputeReply]:
        stream = _Stream()
        reading = asyncio.create_task(self._read(requests, stream))
        try:
            while (reply := await stream.replies.get()) is not None:
                yield reply
                stream.room.release()
            await reading
        finally:
            stream.is_open = False
            reading.cancel()

    async def _read(self, requests: AsyncIterator[pb.ComputeRequest], stream: _Stream) -> None:
        try:
            async for request in requests:
                self._accept(request, request.ByteSize(), stream)
                await stream.room.acquire()
        finally:
            self.worker.submit(lambda: stream.reply(None))  # after the replies to everything accepted before

    def _accept(self, request: pb.ComputeRequest, num_bytes: int, stream: ReplyTo) -> None:
        arrived_at = time.monotonic()
        with self._counting:
            self.counters.num_requests += 1
            self.counters.received_bytes += num_bytes
        if self.is_draining:
            self._refuse(request, stream, pb.Refusal.DRAINING, "This shard is draining.")
        elif self.worker.is_full:
            detail = f"{self.worker.depth} requests wait here already; the bound max_queue is {self.worker.max_depth}."
            self._refuse(request, stream, pb.Refusal.OVERLOADED, detail)
        else:
            self.worker.submit(lambda: self._serve(request, stream, arrived_at))

    def _refuse(self, request: pb.ComputeRequest, stream: ReplyTo, code: pb.Refusal.Code, detail: str) -> None:
        refusal = self._refusal(request, Refused(code, detail))
        refusal.checksum = checksum_of_reply(refusal)
        stream.reply(refusal)

    def _serve(self, request: pb.ComputeRequest, stream: ReplyTo, arrived_at: float) -> None:
        """Runs on the worker's thread."""
        if not stream.is_open:
            return
        started_at = time.monotonic()
        reply = self._compute(request, started_at - arrived_at)
        reply.queue_us = round((started_at - arrived_at) * 1e6)
        reply.compute_us = round((time.monotonic() - started_at) * 1e6)
        reply.queue_depth = self.worker.depth - 1
        reply.checksum = checksum_of_reply(reply)
        self._count(request, reply)
        stream.reply(reply)

    def _compute(self, request: pb.ComputeRequest, waited: float) -> pb.ComputeReply:
        try:
            if 0 < request.timeout_us < waited * 1e6:
                raise Refused(pb.Refusal.DEADLINE, f"It waited {waited:.3f} s, longer than its timeout_us allows.")
            return pb.ComputeReply(id=request.id, sums=self.host.compute(request))
        except Refused as refused:
            return self._refusal(request, refused)
        except Exception as error:
            log.exception("A request for layer %d failed.", request.layer)
            return self._refusal(request, Refused(pb.Refusal.FAILED, f"Computing failed with {error!r}."))

    def _refusal(self, request: pb.ComputeRequest, refused: Refused) -> pb.ComputeReply:
        with self._counting:
            self.counters.num_refusals += 1
        refusal = pb.Refusal(
            code=refused.code, detail=refused.detail, epoch=self.host.epoch, missing=list(refused.missing)
        )
        return pb.ComputeReply(id=request.id, refusal=refusal, queue_depth=self.worker.depth)

    def learn_pace(self) -> Pace:
        """What the calls since the last time say of this shard's pace."""
        samples = [self._samples.popleft() for _ in range(len(self._samples))]
        mib = {layer: shape.nbytes(self.host.dtype) / 2**20 for layer, shape in self.host.shapes.items()}
        columns = [
            (len(np.unique(np.frombuffer(experts, "<i4"))), num_rows, mib[layer], took_us)
            for layer, num_rows, experts, took_us in samples
        ]
        num_experts, num_rows, sizes, took_us = np.array(columns, dtype=np.float64).reshape(-1, 4).T
        return self.pace.observe(num_experts, num_rows, sizes, took_us)

    def _count(self, request: pb.ComputeRequest, reply: pb.ComputeReply) -> None:
        counters = self.counters
        if not counters.num_requests % 4 and reply.HasField("sums"):
            self._samples.append((request.layer, request.num_rows, request.pick_experts, reply.compute_us))
        counters.num_rows += request.num_rows
        counters.num_picks += len(request.pick_rows) // 4
        counters.sent_bytes += reply.ByteSize()
        counters.queue_us += reply.queue_us
        counters.compute_us += reply.compute_us

    async def Load(self, request: pb.LoadRequest, context: Context) -> pb.LoadReply:
        host, wanted = self.host, _wanted(request.experts)
        await self._change(lambda: asyncio.to_thread(host.load, wanted), request.epoch, context)
        gains = [pb.LayerGain(layer=layer, exponent=gain) for layer, gain in host.gains(sorted(wanted)).items()]
        return pb.LoadReply(gains=gains, used_bytes=host.used_bytes, memory_budget=host.memory_budget)

    async def Unload(self, request: pb.UnloadRequest, context: Context) -> pb.UnloadReply:
        host, wanted = self.host, _wanted(request.experts)
        await self._change(lambda: self.worker.run(lambda: host.remove(wanted)), request.epoch, context)
        return pb.UnloadReply(used_bytes=host.used_bytes)

    async def _change(self, change: Callable[[], Awaitable[None]], epoch: int, context: Context) -> None:
        """Changes what is held, one change at a time; a caller that leaves neither stops it nor frees the lock."""

        async def change_alone() -> None:
            async with self._changing:
                await change()
                self.host.epoch = max(self.host.epoch, epoch)

        try:
            await asyncio.shield(asyncio.create_task(change_alone()))
        except ValueError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error)

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        host = self.host
        return pb.StatusReply(
            shard_id=self.shard_id,
            incarnation=self.incarnation,
            pid=os.getpid(),
            device=str(host.device),
            memory_budget=host.memory_budget,
            used_bytes=host.used_bytes,
            held=[pb.LayerExperts(layer=layer, experts=experts) for layer, experts in host.held.items()],
            epoch=host.epoch,
            draining=self.is_draining,
            queue_depth=self.worker.depth,
            counters=pb.Counters(**vars(self.counters)),
        )

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        self.is_draining = True
        return pb.DrainReply(queue_depth=self.worker.depth)


def _wanted(experts: Iterable[pb.LayerExperts]) -> Wanted:
    wanted: Wanted = {}
    for entry in experts:
        wanted.setdefault(entry.layer, []).extend(entry.experts)
    return wanted


async def _abort(context: Context, code: grpc.StatusCode, error: Exception) -> NoReturn:
    await context.abort(code, str(error))
    raise AssertionError("abort does not return")
