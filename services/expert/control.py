"""What a controller, or whoever makes the first placement, asks of shards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from cluster.reconciler import ShardFailed
from cluster.topology import Homes, Placement, Shard
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from protos.options import CHANNEL_OPTIONS

T = TypeVar("T")
ByLayer = Mapping[int, Sequence[int]]  # expert ids by layer
Key = tuple[int, int]  # layer, expert
LOAD_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 5.0


class ShardError(ShardFailed):
    """A shard did not do what it was asked; `code` is the gRPC status."""

    def __init__(self, endpoint: str, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(f"The shard at {endpoint} answered {code.name}: {detail}")
        self.code = code


@dataclass(frozen=True)
class Sources:
    """Where a shard gets experts from, and what they must be.

    `peers` are endpoints of shards that have them, asked before the checkpoint is read; an expert whose bytes have
    another checksum than `expected` is not taken.
    """

    peers: Mapping[Key, str] = field(default_factory=dict)
    expected: Mapping[Key, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """What a shard says after a load.

    `gains` are the largest gain exponents of what it holds or stands by for, of the layers asked for; `checksums`, by
    layer and expert, are those of the experts asked for. Bytes are of the device's memory.
    """

    gains: dict[int, int]
    checksums: dict[int, dict[int, int]]
    used_bytes: int
    memory_budget: int


async def load(
    endpoint: str,
    experts: ByLayer,
    epoch: int = 0,
    standby: ByLayer | None = None,
    sources: Sources = Sources(),
    fencing: int = 0,
) -> Loaded:
    """Has a shard hold `experts` and stand by for `standby`; one that is there in the other role changes it.

    Raises ShardError, after which the shard holds what it held before.
    """
    request = pb.LoadRequest(
        experts=_to_proto(experts),
        epoch=epoch,
        standby=_to_proto(standby or {}),
        peers=[pb.Peer(endpoint=peer, experts=_to_proto(of)) for peer, of in _by_peer(sources.peers).items()],
        expected=_checksums_to_proto(sources.expected),
        fencing=fencing,
    )
    reply: pb.LoadReply = await call(endpoint, lambda stub: stub.Load(request, timeout=LOAD_TIMEOUT_S))
    checksums = {of.layer: dict(zip(of.experts, of.checksums, strict=True)) for of in reply.checksums}
    gains = {gain.layer: gain.exponent for gain in reply.gains}
    return Loaded(gains, checksums, reply.used_bytes, reply.memory_budget)


async def unload(endpoint: str, experts: ByLayer, epoch: int, standby: ByLayer | None = None, fencing: int = 0) -> None:
    """Has a shard let experts go, and not stand by for others; `epoch` is the first one without them there."""
    experts_proto, standby_proto = _to_proto(experts), _to_proto(standby or {})
    request = pb.UnloadRequest(experts=experts_proto, epoch=epoch, standby=standby_proto, fencing=fencing)
    await call(endpoint, lambda stub: stub.Unload(request, timeout=CALL_TIMEOUT_S))


async def status(endpoint: str) -> pb.StatusReply:
    """What a shard holds and has done."""
    reply: pb.StatusReply = await call(endpoint, lambda stub: stub.Status(pb.StatusRequest(), timeout=CALL_TIMEOUT_S))
    return reply


async def drain(endpoint: str, keep_serving: bool = False) -> int:
    """Has a shard say that it drains and, unless it is to keep serving, refuse new requests.

    Returns how many it still answers.
    """
    request = pb.DrainRequest(keep_serving=keep_serving)
    reply = await call(endpoint, lambda stub: stub.Drain(request, timeout=CALL_TIMEOUT_S))
    return int(reply.queue_depth)


async def fill(
    shards: Iterable[Shard], homes: Mapping[int, Homes], epoch: int, standby: Mapping[int, Homes] | None = None
) -> Placement:
    """Has every shard load the experts that it is given, all at once; returns the placement with its gains.

    Raises ShardError for the first shard that could not; others may have loaded theirs.
    """
    planned = Placement(epoch, homes, gains={}, standby=standby or {})
    loads = [
        load(shard.endpoint, planned.experts_of(shard.id), epoch, planned.standby_of(shard.id)) for shard in shards
    ]
    gains: dict[int, int] = {}
    for loaded in await asyncio.gather(*loads):
        for layer, gain in loaded.gains.items():
            gains[layer] = max(gain, gains.get(layer, gain))
    return Placement(epoch, homes, gains, standby=standby or {})


async def call(endpoint: str, method: Callable[[Any], Awaitable[T]]) -> T:
    """Calls a shard once; raises ShardError."""
    async with grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
        try:
            return await method(expert_pb2_grpc.ExpertStub(channel))  # type: ignore[no-untyped-call]
        except grpc.aio.AioRpcError as error:
            raise ShardError(endpoint, error.code(), error.details() or "") from None


def _to_proto(experts: ByLayer) -> list[pb.LayerExperts]:
    return [pb.LayerExperts(layer=layer, experts=list(ids)) for layer, ids in experts.items()]


def _checksums_to_proto(expected: Mapping[Key, int]) -> list[pb.LayerChecksums]:
    by_layer: dict[int, pb.LayerChecksums] = {}
    for (layer, expert), checksum in expected.items():
        of = by_layer.setdefault(layer, pb.LayerChecksums(layer=layer))
        of.experts.append(expert)
        of.checksums.append(checksum)
    return list(by_layer.values())


def _by_peer(peers: Mapping[Key, str]) -> dict[str, dict[int, list[int]]]:
    by_peer: dict[str, dict[int, list[int]]] = {}
    for (layer, expert), endpoint in peers.items():
        by_peer.setdefault(endpoint, {}).setdefault(layer, []).append(expert)
    return by_peer
