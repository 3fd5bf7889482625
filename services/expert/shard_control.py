"""What a controller, or whoever makes the first placement, asks of shards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import numpy as np
import torch
from numpy.typing import NDArray

from cluster.control.reconciler import ShardFailed
from cluster.topology import Homes, Placement, Shard
from model.blocks.moe import ExpertShape
from model.exact_sums import grid_exponents
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from protos.options import CHANNEL_OPTIONS
from services.expert.transport.wire import WIRE_DTYPES, body_of, checksum_of_request, rows_as_numpy, sums_from_proto

T = TypeVar("T")
ByLayer = Mapping[int, Sequence[int]]  # expert ids by layer
Key = tuple[int, int]  # layer, expert
LOAD_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 5.0
CANARY_TIMEOUT_S = 10.0
# Between devices of different kinds, of a row's largest number; another expert's sums differ by about as much as that.
CANARY_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}


class ShardError(ShardFailed):
    """A shard did not do what it was asked; `code` is the gRPC status."""

    def __init__(self, endpoint: str, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(f"The shard at {endpoint} answered {code.name}: {detail}")
        self.endpoint, self.code = endpoint, code


@dataclass(frozen=True)
class Sources:
    """Where a shard gets experts from, and what they must be.

    `peers` are endpoints of shards that have them, asked before the checkpoint is read; an expert whose bytes have
    another checksum than `expected` is not taken.
    """

    peers: Mapping[Key, str] = field(default_factory=dict)
    expected: Mapping[Key, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadResult:
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
) -> LoadResult:
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
    return LoadResult(gains, checksums, reply.used_bytes, reply.memory_budget)


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


async def canary(
    old_endpoint: str,
    new_endpoint: str,
    experts: ByLayer,
    shapes: Iterable[ExpertShape],
    dtype: torch.dtype,
    gains: Mapping[int, int],
) -> list[Key]:
    """The experts on whose sums an old home and a new one disagree: two rows for each, one message per layer and shard.

    A row and its opposite, because one alone says nothing of the weights behind a hidden unit that it leaves at 0. Bit
    for bit where both compute on the same kind of device, else within CANARY_TOLERANCES. `gains` are the layers'
    gain exponents. Raises ShardError where a shard does not compute what it is asked.
    """
    asked = [shape for shape in shapes if experts.get(shape.layer)]
    requests = [_canary_request(shape, experts[shape.layer], dtype, gains[shape.layer]) for shape in asked]
    endpoints = (old_endpoint, new_endpoint)
    statuses = await asyncio.gather(*map(status, endpoints))
    old_replies, new_replies = await asyncio.gather(*(_compute(endpoint, requests) for endpoint in endpoints))
    is_same_kind = len({of.device.partition(":")[0] for of in statuses}) == 1
    disagreeing = []
    for shape, old, new in zip(asked, old_replies, new_replies, strict=True):
        ids = experts[shape.layer]
        old_NL, new_NL = (sums_from_proto(reply, 2 * len(ids), shape.input_dim) for reply in (old, new))
        is_same_N = sums_agree(old_NL, new_NL, 0.0 if is_same_kind else CANARY_TOLERANCES[dtype])
        is_same_E = is_same_N[: len(ids)] & is_same_N[len(ids) :]
        disagreeing += [(shape.layer, expert) for expert, is_same in zip(ids, is_same_E, strict=True) if not is_same]
    return disagreeing


def sums_agree(old_NL: NDArray[np.integer], new_NL: NDArray[np.integer], tolerance: float) -> NDArray[np.bool_]:
    """Whether each row is the same, or differs by at most `tolerance` of its largest number."""
    is_same_N: NDArray[np.bool_] = (old_NL == new_NL).all(1)
    if tolerance:
        old, new = old_NL.astype(np.float64), new_NL.astype(np.float64)
        is_same_N |= np.abs(old - new).max(1) <= tolerance * np.abs(old).max(1)
    return is_same_N


def _canary_request(shape: ExpertShape, ids: Sequence[int], dtype: torch.dtype, gain: int) -> pb.ComputeRequest:
    generator = torch.Generator().manual_seed(shape.layer)
    x_EL = torch.randn(len(ids), shape.input_dim, generator=generator)
    x_NL = torch.cat([x_EL, -x_EL]).to(dtype)
    weight_N1 = torch.ones(len(x_NL), 1)
    request = pb.ComputeRequest(
        id=shape.layer,
        layer=shape.layer,
        num_rows=len(x_NL),
        dtype=WIRE_DTYPES[dtype],
        rows=rows_as_numpy(x_NL).tobytes(),
        grid=grid_exponents(x_NL, weight_N1, gain).numpy().tobytes(),
        pick_rows=np.arange(len(x_NL), dtype="<i4").tobytes(),
        pick_experts=np.array([*ids, *ids], "<i4").tobytes(),
        pick_weights=weight_N1.numpy().tobytes(),
        timeout_us=round(CANARY_TIMEOUT_S * 1e6),
    )
    request.checksum = checksum_of_request(request, body_of(request))
    return request


async def _compute(endpoint: str, requests: Sequence[pb.ComputeRequest]) -> list[pb.ComputeReply]:
    """One after the other: all at once they could be more than the shard lets wait."""

    async def ask(stub: Any) -> list[Any]:
        stream, replies = stub.Compute(timeout=CANARY_TIMEOUT_S), []
        for request in requests:
            await stream.write(request)
            replies.append(await stream.read())
        await stream.done_writing()
        return replies

    replies: list[Any] = await call(endpoint, ask)
    for reply in replies:
        if reply is grpc.aio.EOF or not reply.HasField("sums"):
            detail = "nothing, and ended the stream" if reply is grpc.aio.EOF else reply.refusal.detail
            raise ShardError(endpoint, grpc.StatusCode.FAILED_PRECONDITION, detail)
    return replies


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
