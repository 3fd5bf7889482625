"""The gRPC servicer of a shard: messages in, messages out, the arithmetic on the worker's thread.

`Compute` is served twice: by grpcio on the shard's endpoint, for any client, and by `ComputeServer` on a port of its own, where
it costs a fraction of that.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import NoReturn

import grpc
import numpy as np

from cluster.cost_fit import CostFit, RowsPerCall
from cluster.topology import CostModel
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from services.expert.host import (
    ExpertFacts,
    ExpertHost,
    ExpertsByLayer,
    NeedsPromotion,
    PartialResult,
    by_layer,
    keys_of,
)
from services.expert.loader import PROMOTE_TIMEOUT_S, Loader, LoadOrder, Read
from services.expert.promotion import PromotionQueue
from services.expert.standbys import Key
from services.expert.transfer import MAX_TRANSFER_BYTES, ByteBudget, send
from services.expert.transport.checksum import checksum_of_reply
from services.expert.transport.compute_server import ComputeServer, ReplyTo
from services.expert.transport.wire import WIRE_DTYPES, Refused
from services.expert.transport.worker import Worker
from services.expert.weights import Weights

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[object, object]
MAX_UNREAD = 256  # requests of one stream whose replies it has not taken
COST_SAMPLES = 256  # calls at most that the pace learns from at a time; every fourth is noted
Sample = tuple[int, int, bytes, int]  # layer, rows, experts of the picks, µs


class StaleLeader(Exception):
    """A change that a controller asks for after another has taken over."""


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


class _ComputeStream:
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

    def __init__(self, host: ExpertHost, read: Read, shard_id: str, incarnation: str, max_queue: int) -> None:
        self.host, self.shard_id, self.incarnation = host, shard_id, incarnation
        self.worker = Worker(max_queue, name=f"experts-{shard_id}")
        self.loader = Loader(host, self.worker, read)
        self.waking = PromotionQueue(self.loader, self.worker, max_queue)
        self.outgoing = ByteBudget(MAX_TRANSFER_BYTES)
        self.counters = Counters()
        self.cost_fit = CostFit()
        self.rows_per_call = RowsPerCall()
        self._counted = (0, 0)  # calls and rows that it knows already
        self.num_failed_in_a_row = 0  # requests
        self.is_leaving = False  # says that it drains
        self.is_draining = False  # and refuses what comes
        self.last_request_at = -math.inf
        self._samples: deque[Sample] = deque(maxlen=COST_SAMPLES)
        self._changing = asyncio.Lock()
        self._fencing = 0  # the newest leader's token
        self._counting = threading.Lock()  # requests and refusals, which the loop and the worker both count

    def open_front(self, host: str) -> str:
        """Listens on a free port for streams that the worker's thread reads and answers; returns host:port."""
        self._front = ComputeServer(self.worker, self._accept, host)
        return self._front.endpoint

    async def close_front(self) -> None:
        await self.worker.run(self._front.close)

    async def Compute(
        self, requests: AsyncIterator[pb.ComputeRequest], context: Context
    ) -> AsyncIterator[pb.ComputeReply]:
        stream = _ComputeStream()
        reading = asyncio.create_task(self._read(requests, stream))
        try:
            while (reply := await stream.replies.get()) is not None:
                yield reply
                stream.room.release()
            await reading
        finally:
            stream.is_open = False
            reading.cancel()

    async def _read(self, requests: AsyncIterator[pb.ComputeRequest], stream: _ComputeStream) -> None:
        try:
            async for request in requests:
                self._accept(request, request.ByteSize(), stream)
                await stream.room.acquire()
            await self.answered()
        finally:
            self.worker.submit(lambda: stream.reply(None))  # after the replies to everything accepted before

    async def answered(self) -> None:
        """Returns when everything accepted so far has its reply."""
        await self.worker.idle()  # from then on what is not answered waits for an expert
        await self.waking.idle()

    def _accept(self, request: pb.ComputeRequest, num_bytes: int, stream: ReplyTo) -> None:
        arrived_at = self.last_request_at = time.monotonic()
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
        stream.reply(_sealed(self._refusal(request, Refused(code, detail))))

    def _serve(
        self, request: pb.ComputeRequest, stream: ReplyTo, arrived_at: float, begun: PartialResult | None = None
    ) -> None:
        """Runs on the worker's thread."""
        if not stream.is_open:
            return
        started_at = time.monotonic()
        try:
            reply = self._compute(request, started_at - arrived_at, begun)
        except NeedsPromotion as asleep:
            self._wake(asleep.unfinished, request, stream, arrived_at)
            return
        reply.queue_us = round((started_at - arrived_at) * 1e6)
        reply.compute_us = round((time.monotonic() - started_at) * 1e6)
        reply.queue_depth = self.worker.depth - 1
        self._count(request, _sealed(reply))
        stream.reply(reply)

    def _wake(self, begun: PartialResult, request: pb.ComputeRequest, stream: ReplyTo, arrived_at: float) -> None:
        left_s = request.timeout_us / 1e6 if request.timeout_us else PROMOTE_TIMEOUT_S
        self.waking.park(
            begun,
            min(PROMOTE_TIMEOUT_S, left_s) - (time.monotonic() - arrived_at),
            lambda: self._serve(request, stream, arrived_at, begun),
            lambda refused: stream.reply(_sealed(self._refusal(request, refused))),
        )

    def _compute(self, request: pb.ComputeRequest, waited: float, begun: PartialResult | None) -> pb.ComputeReply:
        try:
            if 0 < request.timeout_us < waited * 1e6:
                raise Refused(pb.Refusal.DEADLINE, f"It waited {waited:.3f} s, longer than its timeout_us allows.")
            sums = self.host.compute(request) if begun is None else self.host.resume(begun)
            self.num_failed_in_a_row = 0
            return pb.ComputeReply(id=request.id, sums=sums)
        except Refused as refused:
            return self._refusal(request, refused)
        except NeedsPromotion:
            raise
        except Exception as error:
            log.exception("A request for layer %d failed.", request.layer)
            self.num_failed_in_a_row += 1
            return self._refusal(request, Refused(pb.Refusal.FAILED, f"Computing failed with {error!r}."))

    def _refusal(self, request: pb.ComputeRequest, refused: Refused) -> pb.ComputeReply:
        with self._counting:
            self.counters.num_refusals += 1
        refusal = pb.Refusal(
            code=refused.code, detail=refused.detail, epoch=self.host.epoch, missing=list(refused.missing)
        )
        return pb.ComputeReply(id=request.id, refusal=refusal, queue_depth=self.worker.depth)

    def learn_pace(self) -> CostModel:
        """What the calls since the last time say of this shard's pace, and how many rows they had."""
        counted = (self.counters.num_requests, self.counters.num_rows)
        self.rows_per_call.observe(*(now - before for now, before in zip(counted, self._counted, strict=True)))
        self._counted = counted
        samples = [self._samples.popleft() for _ in range(len(self._samples))]
        mib = {layer: shape.nbytes(self.host.dtype) / 2**20 for layer, shape in self.host.shapes.items()}
        columns = [
            (len(np.unique(np.frombuffer(experts, "<i4"))), num_rows, mib[layer], took_us)
            for layer, num_rows, experts, took_us in samples
        ]
        num_experts, num_rows, sizes, took_us = np.array(columns, dtype=np.float64).reshape(-1, 4).T
        return self.cost_fit.observe(num_experts, num_rows, sizes, took_us)

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
        host, order = self.host, _order(request)
        await self._change(lambda: self.loader.load(order), request, context)
        gains = host.gains({**order.homes, **order.standby})
        return pb.LoadReply(
            gains=[pb.LayerGain(layer=layer, exponent=gain) for layer, gain in sorted(gains.items())],
            used_bytes=host.used_bytes,
            memory_budget=host.memory_budget,
            checksums=_checksums(host, keys_of(order.homes) | keys_of(order.standby)),
        )

    async def Unload(self, request: pb.UnloadRequest, context: Context) -> pb.UnloadReply:
        host, homes, standby = self.host, _wanted(request.experts), _wanted(request.standby)
        await self._change(lambda: self.worker.run(lambda: host.remove(homes, standby)), request, context)
        return pb.UnloadReply(used_bytes=host.used_bytes)

    async def _change(
        self, change: Callable[[], Awaitable[None]], request: pb.LoadRequest | pb.UnloadRequest, context: Context
    ) -> None:
        """Changes what is held, one change at a time; a caller that leaves neither stops it nor frees the lock."""

        async def change_alone() -> None:
            async with self._changing:
                if 0 < request.fencing < self._fencing:
                    raise StaleLeader(
                        f"The token {request.fencing} is older than {self._fencing}: there is a new leader."
                    )
                self._fencing = max(self._fencing, request.fencing)
                await change()
                self.host.epoch = max(self.host.epoch, request.epoch)

        try:
            await asyncio.shield(asyncio.create_task(change_alone()))
        except ValueError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error)
        except StaleLeader as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, error)

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[pb.FetchChunk]:
        host, layer = self.host, request.layer
        if request.dtype != WIRE_DTYPES[host.dtype]:
            detail = f"This shard computes in {host.dtype} and can give its experts in nothing else."
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, detail)
        if missing := [expert for expert in request.experts if host.known((layer, expert)) is None]:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Experts {missing} of layer {layer} are not here.")

        async def weights_of(expert: int) -> tuple[Weights, ExpertFacts]:
            found = await self.loader.weights_of((layer, expert))
            if found is None:
                raise ValueError(f"Expert {expert} of layer {layer} is not here any more.")
            return found

        try:
            async for chunk in send(request.experts, host.nbytes((layer, 0)), weights_of, self.outgoing):
                yield chunk
        except ValueError as error:
            await _abort(context, grpc.StatusCode.DATA_LOSS, error)

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        host = self.host
        return pb.StatusReply(
            shard_id=self.shard_id,
            incarnation=self.incarnation,
            pid=os.getpid(),
            device=str(host.device),
            memory_budget=host.memory_budget,
            used_bytes=host.used_bytes,
            held=_experts(host.held),
            standby=_experts(host.standby),
            in_host_memory=_experts(by_layer(host.standbys.in_host_memory)),
            promoted=_experts(host.promoted),
            host_budget=host.standbys.host_budget,
            host_used_bytes=host.standbys.used_bytes,
            epoch=host.epoch,
            draining=self.is_leaving or self.is_draining,
            queue_depth=self.worker.depth,
            counters=pb.Counters(
                **vars(self.counters),
                num_promotions=self.loader.num_promotions,
                promotion_us=self.loader.promotion_us,
            ),
        )

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        self.is_leaving = True
        self.is_draining = self.is_draining or not request.keep_serving
        return pb.DrainReply(queue_depth=self.worker.depth)


def _sealed(reply: pb.ComputeReply) -> pb.ComputeReply:
    """A reply that is complete, with its checksum."""
    reply.checksum = checksum_of_reply(reply)
    return reply


def _wanted(experts: Iterable[pb.LayerExperts]) -> ExpertsByLayer:
    wanted: ExpertsByLayer = {}
    for entry in experts:
        wanted.setdefault(entry.layer, []).extend(entry.experts)
    return wanted


def _order(request: pb.LoadRequest) -> LoadOrder:
    peers = {key: peer.endpoint for peer in request.peers for key in keys_of(_wanted(peer.experts))}
    expected = {
        (of.layer, expert): checksum
        for of in request.expected
        for expert, checksum in zip(of.experts, of.checksums, strict=True)
    }
    return LoadOrder(_wanted(request.experts), _wanted(request.standby), peers, expected)


def _experts(wanted: ExpertsByLayer) -> list[pb.LayerExperts]:
    return [pb.LayerExperts(layer=layer, experts=experts) for layer, experts in wanted.items()]


def _checksums(host: ExpertHost, keys: Iterable[Key]) -> list[pb.LayerChecksums]:
    known = {key: found.checksum for key in keys if (found := host.known(key)) is not None}
    return [
        pb.LayerChecksums(layer=layer, experts=experts, checksums=[known[layer, expert] for expert in experts])
        for layer, experts in by_layer(known).items()
    ]


async def _abort(context: Context, code: grpc.StatusCode, error: Exception) -> NoReturn:
    await context.abort(code, str(error))
    raise AssertionError("abort does not return")
