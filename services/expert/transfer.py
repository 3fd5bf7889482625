"""Experts' weights from one shard to another: `Expert.Fetch`, both ends, with their bytes in flight bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import torch

from model.blocks.moe import ExpertShape
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from services.expert.host import ExpertFacts
from services.expert.transport.wire import WIRE_DTYPES
from services.expert.weights import Weights, seal
from services.low_priority import aside

MAX_TRANSFER_BYTES = 64 << 20  # of experts that a shard is sending, and as many again that it is receiving
FETCH_STALL_S = 2.0  # a peer that says nothing for as long is given up


WeightsOf = Callable[[int], Awaitable[tuple[Weights, ExpertFacts]]]  # an expert, and what was found when it was loaded


class PeerError(RuntimeError):
    """A peer did not send what it was asked for."""


class ByteBudget:
    """At most `max_bytes` at once, first come, first served; something larger than that goes alone."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used_bytes = max_bytes, 0
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        num_bytes = min(num_bytes, self.max_bytes)
        async with self._turn:
            while self.used_bytes + num_bytes > self.max_bytes:
                self._freed.clear()
                await self._freed.wait()
            self.used_bytes += num_bytes
        try:
            yield
        finally:
            self.used_bytes -= num_bytes
            self._freed.set()


async def send(
    experts: Iterable[int], num_bytes: int, weights_of: WeightsOf, out: ByteBudget
) -> AsyncIterator[pb.FetchChunk]:
    """The chunks of experts of `num_bytes` each; `out` bounds what is under way."""
    for expert in experts:
        async with out.hold(num_bytes):
            weights, known = await weights_of(expert)
            left = weights.nbytes
            for view in weights.chunks():
                left -= len(view)
                chunk = pb.FetchChunk(expert=expert, data=view.tobytes())
                if left == 0:
                    chunk.is_last, chunk.checksum, chunk.gain_exponent = True, known.checksum, known.gain
                    chunk.seal = seal(known.checksum, known.gain)
                yield chunk


async def fetch(channel: grpc.aio.Channel, shape: ExpertShape, expert: int, dtype: torch.dtype) -> Weights:
    """One expert from a peer, its checksum verified; raises PeerError."""
    request = pb.FetchRequest(layer=shape.layer, experts=[expert], dtype=WIRE_DTYPES[dtype])
    call: Any = expert_pb2_grpc.ExpertStub(channel).Fetch(request)  # type: ignore[no-untyped-call]
    try:
        return await _receive(call, shape, expert, dtype)
    except grpc.aio.AioRpcError as error:
        raise PeerError(f"it answered {error.code().name}: {error.details()}") from None
    except TimeoutError:
        raise PeerError(f"it said nothing for {FETCH_STALL_S} s") from None
    finally:
        call.cancel()


async def _receive(call: Any, shape: ExpertShape, expert: int, dtype: torch.dtype) -> Weights:
    data, end = bytearray(shape.nbytes(dtype)), 0
    while (chunk := await asyncio.wait_for(call.read(), FETCH_STALL_S)) is not grpc.aio.EOF:
        piece = chunk.data
        if chunk.expert != expert or end + len(piece) > len(data):
            raise PeerError(f"it sent {len(piece)} bytes of expert {chunk.expert} that nobody asked for")
        data[end : end + len(piece)] = piece
        end += len(piece)
        if chunk.is_last:
            return await aside(_verified, data, end, shape, dtype, chunk)
    raise PeerError(f"it ended after {end} of {len(data)} bytes")


def _verified(data: bytearray, end: int, shape: ExpertShape, dtype: torch.dtype, last: pb.FetchChunk) -> Weights:
    if end != len(data):
        raise PeerError(f"it sent {end} bytes where {len(data)} were asked for")
    weights = Weights.from_bytes(data, shape, dtype, last.gain_exponent)
    if weights.checksum != last.checksum:
        raise PeerError(f"its bytes have the checksum {weights.checksum:016x}, but it said {last.checksum:016x}")
    if last.seal != seal(last.checksum, last.gain_exponent):
        raise PeerError(f"it said that the gain exponent is {last.gain_exponent}, and that is damaged")
    return weights
