"""`ShardProcess` runs shards in another process, and can make the shards slow or faulty."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

import torch

from benchmarks.corrupt_shard import Corruption
from cluster.control.memory_registry import MemoryRegistry
from cluster.topology import Shard
from model.families.nemotron_h import NemotronHFamily
from model.families.registry import load_family
from model.stored_matrix import StoredMatrix
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.shard import ExpertShard, ShardConfig
from services.expert.weights.host import ExpertHost
from tests.services.forkserver import CONTEXT

START_TIMEOUT_S = 60
READ_S = 0.03  # additional seconds to read one expert from the slow disk


class ShardProcess:
    """A `ShardProcess` runs `num_shards` shards of the model in `model_dir`.

    - `name`: a shard's id is `name` and the shard's number
    - `us_per_row`: the shards need this number of additional microseconds to compute a row
    - `trouble`: "none", "corrupt" (every reply has a wrong byte) or "slow disk" (reads of experts are slow)
    """

    def __init__(
        self,
        model_dir: Path,
        num_shards: int = 1,
        dtype: str = "float32",
        name: str = "s",
        max_queue: int = 64,
        us_per_row: int = 0,
        trouble: str = "none",
    ) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        base = ShardConfig(name, memory_budget=1 << 30, dtype=getattr(torch, dtype), max_queue=max_queue)
        arguments = (theirs, model_dir, num_shards, base, us_per_row, trouble)
        self.process = CONTEXT.Process(target=_main, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self._shards: list[Shard] = []

    @property
    def shards(self) -> list[Shard]:
        """Wait until the shards serve, and return their records."""
        if not self._shards:
            assert self._pipe.poll(START_TIMEOUT_S), "the shards do not start"
            self._shards = self._pipe.recv()
        return self._shards

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()


def slow_down(host: ExpertHost, us_per_row: int) -> None:
    """Make `host` sleep before it computes a request: `us_per_row` microseconds for each row of the request."""
    compute = host.compute

    def compute_slowly(request: pb.ComputeRequest) -> pb.Sums:
        time.sleep(us_per_row * request.num_rows / 1e6)
        return compute(request)

    host.compute = compute_slowly  # type: ignore[method-assign]


class SlowlyRead(NemotronHFamily):
    """A `SlowlyRead` is a model family that waits `READ_S` seconds before it reads an expert, as from a slow disk."""

    def load_expert(self, layer: int, expert: int) -> dict[str, StoredMatrix]:
        time.sleep(READ_S)
        return super().load_expert(layer, expert)


def _main(pipe: Connection, model_dir: Path, num_shards: int, base: ShardConfig, us_per_row: int, trouble: str) -> None:
    torch.set_num_threads(1)
    asyncio.run(_serve(pipe, model_dir, num_shards, base, us_per_row, trouble))


async def _serve(
    pipe: Connection, model_dir: Path, num_shards: int, base: ShardConfig, us_per_row: int, trouble: str
) -> None:
    """Start the shards, send their records through `pipe`, and serve until the other end of `pipe` is closed."""
    if trouble == "corrupt":
        Corruption(until=math.inf)
    family, registry = load_family(model_dir), MemoryRegistry(time.monotonic)
    if trouble == "slow disk":
        family = SlowlyRead(family.checkpoint)
    configs = [replace(base, shard_id=f"{base.shard_id}{i}") for i in range(num_shards)]
    shards = [ExpertShard(config, family, registry) for config in configs]
    for shard in shards:
        slow_down(shard.host, us_per_row)
        await shard.start()
    pipe.send([shard.record for shard in shards])
    await asyncio.to_thread(pipe.poll, None)
