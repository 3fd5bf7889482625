"""A controller changes and checks shards with the functions of this module: load, unload, status, drain and canary.

Each function calls one shard over gRPC, except `fill` and `canary`, which call several shards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np
import torch
from numpy.typing import NDArray

from cluster.control.shard_control import ShardFailed
from cluster.topology import Experts, Homes, Placement, Shard
from model.configs.expert_shape import ExpertShape
from model.exact_sums import grid_exponents
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from protos.options import CHANNEL_OPTIONS
from services.expert.transport.wire import WIRE_DTYPES, body_of, checksum_of_request, rows_as_numpy, sums_from_proto
from services.expert.weights.load_order import Key, LoadOrder, LoadResult, Sources, experts_to_proto

T = TypeVar("T")
LOAD_TIMEOUT_S = 600.0  # seconds for one load
CALL_TIMEOUT_S = 5.0  # seconds for every other call except the canary
CANARY_TIMEOUT_S = 10.0  # seconds for the canary on one shard
# Maximum difference between the sums of devices of different kinds, as a share of the largest number in the row. For
# comparison: the sums of a wrong expert differ by about as much as the largest number itself.
CANARY_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}


class ShardError(ShardFailed):
    """A `ShardError` says that a shard could not be called or failed a call; `code` is the gRPC status."""

    def __init__(self, endpoint: str, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(f"The shard at {endpoint} answered {code.name}: {detail}")
        self.endpoint, self.code = endpoint, code


async def load(
    endpoint: str,
    experts: Experts,
    epoch: int = 0,
    standby: Experts | None = None,
    sources: Sources | None = None,
    fencing: int = 0,
) -> LoadResult:
    """Make a shard the home of `experts` and a standby for `standby`, and return what the shard has loaded.

    A home that is in `standby` becomes a standby, and a standby that is in `experts` becomes a home. If the load fails,
    ShardError is raised, and the shard holds the same experts as before.

    epoch: the epoch of the placement that the caller knows.
    sources: where the shard gets the weights, and which checksums the weights must have.
    fencing: the fencing token of the leader that gives the order.
    """
    request = LoadOrder(experts, standby or {}, sources or Sources()).to_proto(epoch, fencing)
    reply: pb.LoadReply = await call(endpoint, lambda stub: stub.Load(request, timeout=LOAD_TIMEOUT_S))
    return LoadResult.from_proto(reply)


async def unload(endpoint: str, experts: Experts, epoch: int, standby: Experts | None = None, fencing: int = 0) -> None:
    """Make a shard give up its role as a home of `experts` and as a standby for `standby`.

    `epoch` is the epoch of the first placement in which the shard does not have these roles.
    """
    request = pb.UnloadRequest(
        experts=experts_to_proto(experts), epoch=epoch, standby=experts_to_proto(standby or {}), fencing=fencing
    )
    await call(endpoint, lambda stub: stub.Unload(request, timeout=CALL_TIMEOUT_S))


async def status(endpoint: str) -> pb.StatusReply:
    """Return the status of a shard: which experts it holds and what it has done since its start."""
    reply: pb.StatusReply = await call(endpoint, lambda stub: stub.Status(pb.StatusRequest(), timeout=CALL_TIMEOUT_S))
    return reply


async def drain(endpoint: str, keep_serving: bool = False) -> int:
    """Make a shard announce that it drains; if `keep_serving` is false, the shard also refuses new requests.

    Return the number of accepted requests that the shard still has to answer.
    """
    request = pb.DrainRequest(keep_serving=keep_serving)
    reply = await call(endpoint, lambda stub: stub.Drain(request, timeout=CALL_TIMEOUT_S))
    return int(reply.queue_depth)


async def fill(
    shards: Iterable[Shard], homes: Mapping[int, Homes], epoch: int, standby: Mapping[int, Homes] | None = None
) -> Placement:
    """Make all shards load their experts at the same time, and return the placement with the gain exponents.

    Raise the ShardError of the first shard that fails; other shards may have loaded their experts by then.
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
    experts: Experts,
    shapes: Iterable[ExpertShape],
    dtype: torch.dtype,
    gains: Mapping[int, int],
) -> list[Key]:
    """Return the keys of the experts for which an old home and a new home compute different sums.

    For each expert, the old home and the new home compute a random row and the opposite of this row. One row alone
    would not be enough: where a hidden unit is 0 for the row, the sums say nothing about the weights behind the unit.
    Each shard gets one message per layer.

    - Shards on devices of the same kind must agree bit for bit, other shards within CANARY_TOLERANCES.
    - `gains` are the gain exponents of the layers.
    - ShardError is raised if a shard does not compute a request.
    """
    chosen = [shape for shape in shapes if experts.get(shape.layer)]
    requests = [_canary_request(shape, experts[shape.layer], dtype, gains[shape.layer]) for shape in chosen]
    endpoints = (old_endpoint, new_endpoint)
    statuses = await asyncio.gather(*map(status, endpoints))
    old_replies, new_replies = await asyncio.gather(*(_compute(endpoint, requests) for endpoint in endpoints))
    is_same_kind = len({of.device.partition(":")[0] for of in statuses}) == 1
    disagreeing = []
    for shape, old, new in zip(chosen, old_replies, new_replies, strict=True):
        ids = experts[shape.layer]
        old_NL, new_NL = (sums_from_proto(reply, 2 * len(ids), shape.input_dim) for reply in (old, new))
        is_same_N = sums_agree(old_NL, new_NL, 0.0 if is_same_kind else CANARY_TOLERANCES[dtype])
        is_same_E = is_same_N[: len(ids)] & is_same_N[len(ids) :]
        disagreeing += [(shape.layer, expert) for expert, is_same in zip(ids, is_same_E, strict=True) if not is_same]
    return disagreeing


def sums_agree(old_NL: NDArray[np.integer], new_NL: NDArray[np.integer], tolerance: float) -> NDArray[np.bool_]:
    """Return for each row whether the old sums and the new sums agree: bool (N,).

    The sums of a row agree if they are equal, or if they differ by at most `tolerance` times the largest of the old
    sums.
    """
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
    """Send `requests` to a shard one after the other, and return the replies.

    All requests together could fill the queue of the shard.
    """

    async def exchange(stub: Any) -> list[Any]:
        stream, replies = stub.Compute(timeout=CANARY_TIMEOUT_S), []
        for request in requests:
            await stream.write(request)
            replies.append(await stream.read())
        await stream.done_writing()
        return replies

    replies: list[Any] = await call(endpoint, exchange)
    for reply in replies:
        if reply is grpc.aio.EOF or not reply.HasField("sums"):
            detail = "nothing, and ended the stream" if reply is grpc.aio.EOF else reply.refusal.detail
            raise ShardError(endpoint, grpc.StatusCode.FAILED_PRECONDITION, detail)
    return replies


async def call(endpoint: str, method: Callable[[Any], Awaitable[T]]) -> T:
    """Open a channel to a shard and return what `method` returns for the stub; raise ShardError if the call fails."""
    async with grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
        try:
            return await method(expert_pb2_grpc.ExpertStub(channel))  # type: ignore[no-untyped-call]
        except grpc.aio.AioRpcError as error:
            raise ShardError(endpoint, error.code(), error.details() or "") from None
