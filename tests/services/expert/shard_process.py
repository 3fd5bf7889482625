"""`ShardProcess` runs shards in another process, and can make the shards slow or faulty.

The process prints the shards' records as JSON and serves until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
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
from services.expert.host import ExpertHost
from services.expert.shard import ExpertShard, ShardConfig

ROOT = Path(__file__).parents[3]
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
        arguments = map(str, (model_dir, num_shards, dtype, name, max_queue, us_per_row, trouble))
        command = [sys.executable, "-m", __name__, *arguments]
        env, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, env=env)
        self._shards: list[Shard] = []

    @property
    def shards(self) -> list[Shard]:
        """Wait until the shards serve, and return their records."""
        if not self._shards:
            assert self.process.stdout is not None
            self._shards = [Shard.from_record(record) for record in json.loads(self.process.stdout.readline())]
        return self._shards

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


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


async def serve(
    model_dir: str, num_shards: int, dtype: torch.dtype, name: str, max_queue: int, us_per_row: int, trouble: str
) -> None:
    if trouble == "corrupt":
        Corruption(until=math.inf)
    family, registry = load_family(model_dir), MemoryRegistry(time.monotonic)
    if trouble == "slow disk":
        family = SlowlyRead(family.checkpoint)
    base = ShardConfig("base", memory_budget=1 << 30, dtype=dtype, max_queue=max_queue)
    shards = [ExpertShard(replace(base, shard_id=f"{name}{i}"), family, registry) for i in range(num_shards)]
    for shard in shards:
        slow_down(shard.host, us_per_row)
        await shard.start()
    print(json.dumps([shard.record.to_record() for shard in shards]), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for shard in shards:
        await shard.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, num, dtype, name, depth, slowness, trouble = sys.argv[1:]
    asyncio.run(serve(path, int(num), getattr(torch, dtype), name, int(depth), int(slowness), trouble))
