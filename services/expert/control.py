"""What a controller, or whoever makes the first placement, asks of shards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import grpc

from cluster.topology import Homes, Placement, Shard
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from protos.options import CHANNEL_OPTIONS

T = TypeVar("T")
LOAD_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 5.0


class ShardError(RuntimeError):
    """A shard did not do what it was asked; `code` is the gRPC status."""

    def __init__(self, endpoint: str, error: grpc.aio.AioRpcError) -> None:
        super().__init__(f"The shard at {endpoint} answered {error.code().name}: {error.details()}")
        self.code = error.code()


async def load(endpoint: str, experts: Mapping[int, Sequence[int]], epoch: int = 0) -> dict[int, int]:
    """Has a shard hold these experts, by layer; returns the largest gain exponent it holds of each of these layers.

    Raises ShardError, after which the shard holds what it held before.
    """
    request = pb.LoadRequest(experts=_to_proto(experts), epoch=epoch)
    reply: pb.LoadReply = await _call(endpoint, lambda stub: stub.Load(request, timeout=LOAD_TIMEOUT_S))
    return {gain.layer: gain.exponent for gain in reply.gains}


async def unload(endpoint: str, experts: Mapping[int, Sequence[int]], epoch: int) -> None:
    """Has a shard let experts go; `epoch` is the first one that no longer places them there."""
    request = pb.UnloadRequest(experts=_to_proto(experts), epoch=epoch)
    await _call(endpoint, lambda stub: stub.Unload(request, timeout=CALL_TIMEOUT_S))


async def status(endpoint: str) -> pb.StatusReply:
    """What a shard holds and has done."""
    reply: pb.StatusReply = await _call(endpoint, lambda stub: stub.Status(pb.StatusRequest(), timeout=CALL_TIMEOUT_S))
    return reply


async def drain(endpoint: str) -> int:
    """Has a shard refuse new requests; returns how many it still answers."""
    reply = await _call(endpoint, lambda stub: stub.Drain(pb.DrainRequest(), timeout=CALL_TIMEOUT_S))
    return int(reply.queue_depth)


async def fill(shards: Iterable[Shard], homes: Mapping[int, Homes], epoch: int) -> Placement:
    """Has every shard load the experts that `homes` gives it, all at once; returns the placement with its gains.

    Raises ShardError for the first shard that could not; others may have loaded theirs.
    """
    planned = Placement(epoch, homes, gains={})
    loads = [load(shard.endpoint, planned.experts_of(shard.id), epoch) for shard in shards]
    gains: dict[int, int] = {}
    for by_layer in await asyncio.gather(*loads):
        for layer, gain in by_layer.items():
            gains[layer] = max(gain, gains.get(layer, gain))
    return Placement(epoch, homes, gains)


async def _call(endpoint: str, method: Callable[[Any], Awaitable[T]]) -> T:
    async with grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
        try:
            return await method(expert_pb2_grpc.ExpertStub(channel))  # type: ignore[no-untyped-call]
        except grpc.aio.AioRpcError as error:
            raise ShardError(endpoint, error) from None


def _to_proto(experts: Mapping[int, Sequence[int]]) -> list[pb.LayerExperts]:
    return [pb.LayerExperts(layer=layer, experts=list(ids)) for layer, ids in experts.items()]
