"""`serving` runs a shard in this process, and `stream_to` opens a stream to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from cluster.control.memory_registry import MemoryRegistry
from cluster.control.registry_store import RegistryStore
from model.family import ModelFamily
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from services.expert.shard import ExpertShard, ShardConfig

CONFIG = ShardConfig("s0", memory_budget=1 << 30, node="n0", max_queue=2)


@asynccontextmanager
async def serving(
    family: ModelFamily, registry: RegistryStore | None = None, config: ShardConfig = CONFIG
) -> AsyncIterator[ExpertShard]:
    shard = ExpertShard(config, family, registry or MemoryRegistry(time.monotonic))
    await shard.start()
    try:
        yield shard
    finally:
        await shard.stop()


@asynccontextmanager
async def stream_to(shard: ExpertShard) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(shard.endpoint) as channel:
        call = expert_pb2_grpc.ExpertStub(channel).Compute()  # type: ignore[no-untyped-call]
        yield call
        call.cancel()


async def ask(shard: ExpertShard, *requests: pb.ComputeRequest) -> dict[int, pb.ComputeReply]:
    """Send all `requests` on one stream without waiting for replies, and return the replies by request id."""
    async with stream_to(shard) as stream:
        for request in requests:
            await stream.write(request)
        await stream.done_writing()
        return {reply.id: reply async for reply in stream}


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(bounded())
