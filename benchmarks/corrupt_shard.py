"""The script runs a real expert shard that joins a running server and can return corrupt replies for some seconds.

    python -m benchmarks.corrupt_shard STORE_URL

After each SIGUSR1, the script changes one byte of the sums in every reply for some seconds. The shard has computed the
reply's checksum before, so that the change looks like broken memory or a broken network card. After SIGTERM, the shard
drains and stops.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time

import torch

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.args import AppArgs
from services.expert.shard import ExpertShard, ShardConfig
from services.expert.transport.compute_server import _ComputeServerStream

CORRUPT_S = 6.0


class Corruption:
    """A `Corruption` changes one byte of the sums in each reply, until the monotonic clock reaches `until`."""

    def __init__(self, until: float = 0.0) -> None:
        self.until = until
        reply_as_it_is = _ComputeServerStream.reply

        def reply_changed(stream: _ComputeServerStream, reply: pb.ComputeReply | None) -> None:
            if reply is not None and reply.HasField("sums") and time.monotonic() < self.until:
                data = bytearray(reply.sums.data)
                data[len(data) // 2] ^= 4
                reply.sums.data = bytes(data)
            reply_as_it_is(stream, reply)

        _ComputeServerStream.reply = reply_changed  # type: ignore[method-assign]

    def begin(self) -> None:
        self.until = time.monotonic() + CORRUPT_S


async def serve(store_url: str) -> None:
    args = AppArgs(redis_url=store_url)
    family, pool = args.check(), args.pools[0]
    corruption, ended = Corruption(), asyncio.Event()
    shard = ExpertShard(ShardConfig("corrupt", args.shard_memory(pool, family)), family, args.registry())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, corruption.begin)
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    await shard.start()
    await ended.wait()
    await shard.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(serve(sys.argv[1]))
