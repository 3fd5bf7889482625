"""`ExpertService` is the gRPC servicer of a shard.

`Compute` is served twice. grpcio serves any client on the shard's endpoint. `ComputeServer` serves the same rpc on a
separate port, where a message costs a fraction of the time that grpcio needs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import NoReturn

import grpc

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from services.expert.compute_handler import ComputeHandler
from services.expert.transport.compute_server import ComputeServer
from services.expert.transport.worker import Worker
from services.expert.weights.host import ExpertHost
from services.expert.weights.load_order import (
    LoadOrder,
    LoadResult,
    experts_from_proto,
    experts_to_proto,
    group_by_layer,
    keys_of,
)
from services.expert.weights.loader import Loader
from services.expert.weights.promotion import Promoter, PromotionQueue
from services.expert.weights.transfer import MAX_TRANSFER_BYTES, ByteBudget, ReadExpert, WeightSource, send
from services.expert.weights.weights import ExpertMetadata, Weights, describe_formats, matrix_formats

Context = grpc.aio.ServicerContext[object, object]
MAX_UNREAD = 256  # unread replies of one stream; above this number, no further requests are read


class StaleFencingToken(Exception):
    """A `StaleFencingToken` error says that a controller ordered a change after another controller became leader."""


class _ComputeStream:
    """A `_ComputeStream` carries the replies of one grpcio stream from the worker's thread to the event loop.

    While a client does not read its replies, the shard reads no further requests of the client. Otherwise the client's
    unread replies would pile up without a limit.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.replies: asyncio.Queue[pb.ComputeReply | None] = asyncio.Queue()
        self.unread = asyncio.Semaphore(MAX_UNREAD)
        self.is_open = True

    def reply(self, reply: pb.ComputeReply | None) -> None:
        """Send a reply, or end the stream if `reply` is None; any thread may call this method."""
        if self.is_open:
            self.loop.call_soon_threadsafe(self.replies.put_nowait, reply)


class ExpertService(expert_pb2_grpc.ExpertServicer):
    """`ExpertService` serves one `ExpertHost`; while `max_queue` requests wait, further requests are refused."""

    def __init__(self, host: ExpertHost, read: ReadExpert, shard_id: str, incarnation: str, max_queue: int) -> None:
        self.host, self.shard_id, self.incarnation = host, shard_id, incarnation
        self.worker = Worker(max_queue, name=f"experts-{shard_id}")
        self.source = WeightSource(host, read)
        self.promoter = Promoter(host, self.worker, self.source)
        self.loader = Loader(host, self.worker, self.source, self.promoter)
        self.promotion_queue = PromotionQueue(self.promoter, self.worker, max_queue)
        self.handler = ComputeHandler(host, self.worker, self.promotion_queue)
        self.outgoing = ByteBudget(MAX_TRANSFER_BYTES)
        self.has_announced_drain = False
        self._changing = asyncio.Lock()  # held by the running load or unload, because only one change may run at a time
        self._fencing = 0  # the highest fencing token of any leader so far

    @property
    def is_draining(self) -> bool:
        """Return True if the shard drains, even if the shard still accepts requests."""
        return self.has_announced_drain or self.handler.is_refusing

    # The data plane --------------------------------------------------------------------------------------------------

    def open_compute_port(self, address: str) -> str:
        """Listen on a free port for streams, which the worker's thread reads and answers; return the endpoint."""
        self._compute_server = ComputeServer(self.worker, self.handler.accept, address)
        return self._compute_server.endpoint

    async def close_compute_port(self) -> None:
        if self.worker.is_alive:
            await self.worker.run(self._compute_server.close)
        else:
            self._compute_server.close()

    async def Compute(
        self, requests: AsyncIterator[pb.ComputeRequest], context: Context
    ) -> AsyncIterator[pb.ComputeReply]:
        stream = _ComputeStream()
        reading = asyncio.create_task(self._read(requests, stream))
        try:
            while (reply := await stream.replies.get()) is not None:
                yield reply
                stream.unread.release()
            await reading
        finally:
            stream.is_open = False
            reading.cancel()

    async def _read(self, requests: AsyncIterator[pb.ComputeRequest], stream: _ComputeStream) -> None:
        try:
            async for request in requests:
                self.handler.accept(request, request.ByteSize(), stream)
                await stream.unread.acquire()
            await self.handler.idle()
        finally:
            self.worker.submit(lambda: stream.reply(None))  # None ends the stream after all its replies

    # Loading and unloading -------------------------------------------------------------------------------------------

    async def Load(self, request: pb.LoadRequest, context: Context) -> pb.LoadReply:
        host, order = self.host, LoadOrder.from_proto(request)
        await self._change(lambda: self.loader.load(order), request, context)
        checksums = host.checksums(keys_of(order.homes) | keys_of(order.standby))
        gains = host.gains([*order.homes, *order.standby])
        return LoadResult(gains, checksums, host.used_bytes, host.memory_budget).to_proto()

    async def Unload(self, request: pb.UnloadRequest, context: Context) -> pb.UnloadReply:
        host = self.host
        homes, standby = experts_from_proto(request.experts), experts_from_proto(request.standby)
        await self._change(lambda: self.worker.run(lambda: host.unload(homes, standby)), request, context)
        return pb.UnloadReply(used_bytes=host.used_bytes)

    async def _change(
        self, change: Callable[[], Awaitable[None]], request: pb.LoadRequest | pb.UnloadRequest, context: Context
    ) -> None:
        """Run `change` when no other change runs; abort the call if the change fails or the fencing token is stale.

        Even if the client goes away, the change runs to its end and holds the lock until its end.
        """

        async def change_alone() -> None:
            async with self._changing:
                self._check_fencing(request.fencing)
                await change()
                self.host.epoch = max(self.host.epoch, request.epoch)

        try:
            await asyncio.shield(asyncio.create_task(change_alone()))
        except ValueError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error)
        except StaleFencingToken as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, error)

    def _check_fencing(self, token: int) -> None:
        if 0 < token < self._fencing:
            raise StaleFencingToken(f"The token {token} is older than {self._fencing}: there is a new leader.")
        self._fencing = max(self._fencing, token)

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[pb.FetchChunk]:
        host, layer = self.host, request.layer
        missing = [expert for expert in request.experts if host.metadata((layer, expert)) is None]
        if missing or layer not in host.shapes:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Experts {missing} of layer {layer} are not here.")
        stored = matrix_formats(host.shapes[layer], host.dtype)
        if list(request.matrices) != stored:
            here, there = describe_formats(stored), describe_formats(request.matrices)
            detail = f"This shard stores the experts of layer {layer} as {here}, but the request is for {there}."
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, detail)
        try:
            weights_of = partial(self._weights_of, layer)
            async for chunk in send(request.experts, host.stored_bytes((layer, 0)), weights_of, self.outgoing):
                yield chunk
        except ValueError as error:
            await _abort(context, grpc.StatusCode.DATA_LOSS, error)

    async def _weights_of(self, layer: int, expert: int) -> tuple[Weights, ExpertMetadata]:
        found = await self.source.current((layer, expert))
        if found is None:
            raise ValueError(f"Expert {expert} of layer {layer} is not here any more.")
        return found

    # Status and drain ------------------------------------------------------------------------------------------------

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        reply = _host_status(self.host)
        reply.shard_id, reply.incarnation, reply.pid = self.shard_id, self.incarnation, os.getpid()
        reply.draining, reply.queue_depth = self.is_draining, self.worker.depth
        promotions = self.promoter.num_promotions, self.promoter.promotion_us
        reply.counters.CopyFrom(self.handler.counters.to_proto(*promotions))
        return reply

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        self.has_announced_drain = True
        self.handler.is_refusing = self.handler.is_refusing or not request.keep_serving
        return pb.DrainReply(queue_depth=self.worker.depth)


def _host_status(host: ExpertHost) -> pb.StatusReply:
    """Return a status with the fields that describe what `host` holds; the other fields are empty."""
    return pb.StatusReply(
        device=str(host.device),
        memory_budget=host.memory_budget,
        used_bytes=host.used_bytes,
        held=experts_to_proto(host.held),
        standby=experts_to_proto(host.standby),
        in_host_memory=experts_to_proto(group_by_layer(host.standbys.in_host_memory)),
        promoted=experts_to_proto(host.promoted),
        host_budget=host.standbys.host_budget,
        host_used_bytes=host.standbys.used_bytes,
        epoch=host.epoch,
    )


async def _abort(context: Context, code: grpc.StatusCode, error: Exception) -> NoReturn:
    await context.abort(code, str(error))
    raise AssertionError("abort does not return")
