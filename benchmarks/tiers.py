"""The benchmark measures how long a shard takes to load an expert, from each place where the expert may lie.

    python -m benchmarks.tiers [--input-dim 1024] [--width 2688] [--experts 8] [--dtype bfloat16]

The places are the checkpoint, host memory and another shard. The shards run in this process and use real gRPC on
127.0.0.1 and a real safetensors file. After the first read, the file is in Linux's page cache. The first printed lines
show single steps of a load. The later lines show whole loads. All printed times are medians over experts, in ms per
expert.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import grpc
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.blocks.expert_bank import ExpertBank
from model.configs.expert_shape import ExpertShape
from model.stored_matrix import StoredMatrix
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from protos.options import SERVER_OPTIONS
from services.expert.service import ExpertService
from services.expert.weights.host import ExpertHost
from services.expert.weights.load_order import LoadOrder, Sources
from services.expert.weights.promotion import PROMOTE_TIMEOUT_S
from services.expert.weights.weights import Weights

LAYER = 1


def write_experts(path: Path, shape: ExpertShape) -> Path:
    """Write random experts in bf16, as published checkpoints do, to a safetensors file; return the file's path."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=generator) / sizes[1] ** 0.5).bfloat16()

    sizes = {"up": (shape.width, shape.input_dim), "down": (shape.input_dim, shape.width)}
    tensors = {f"{part}.{e}": draw(*sizes[part]) for e in range(shape.num_experts) for part in sizes}
    save_file(tensors, path / "experts.safetensors")
    return path / "experts.safetensors"


def reader(path: Path) -> Callable[[int, int], dict[str, Tensor]]:
    file = safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
    return lambda _, expert: {part: StoredMatrix.plain(file.get_tensor(f"{part}.{expert}")) for part in ("up", "down")}


class MeasuredShard:
    """A `MeasuredShard` is a shard that serves gRPC but does not register itself with the store."""

    def __init__(self, shape: ExpertShape, path: Path, dtype: torch.dtype, in_memory: bool) -> None:
        budget = shape.num_experts * shape.nbytes(dtype)
        host = self.host = ExpertHost([shape], dtype, torch.device("cpu"), budget, budget if in_memory else 0)
        self.service = ExpertService(host, reader(path), "s", "i", 64)
        self.loader = self.service.loader

    async def serve(self) -> str:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        expert_pb2_grpc.add_ExpertServicer_to_server(self.service, self.server)  # type: ignore[no-untyped-call]
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return f"127.0.0.1:{port}"

    async def close(self) -> None:
        await self.server.stop(0)
        await asyncio.to_thread(self.service.worker.close)


async def milliseconds(work: Callable[[int], Awaitable[object]], experts: Sequence[int]) -> float:
    spent = []
    for expert in experts:
        started = time.perf_counter()
        await work(expert)
        spent.append((time.perf_counter() - started) * 1e3)
    return statistics.median(spent)


async def measure_parts(shape: ExpertShape, path: Path, dtype: torch.dtype) -> dict[str, float]:
    read, bank, experts = reader(path), ExpertBank(shape, dtype), range(shape.num_experts)
    weights = [Weights.of(read(LAYER, expert), dtype) for expert in experts]
    copies = [one.in_host_memory() for one in weights]

    async def checksum(expert: int) -> None:
        assert copies[expert].checksum

    async def load(expert: int, gain: int | None = None) -> None:
        bank.load(expert, weights[expert].matrices, gain)

    return {
        "checksum": await milliseconds(checksum, experts),
        "into the bank, gain found": await milliseconds(load, experts),
        "into the bank, gain known": await milliseconds(lambda expert: load(expert, 0), experts),
    }


async def measure_ways(shape: ExpertShape, path: Path, dtype: torch.dtype) -> dict[str, float]:
    experts, shards = (
        range(shape.num_experts),
        [MeasuredShard(shape, path, dtype, tier) for tier in (False, True, False)],
    )
    on_disk, in_memory, third = shards
    peer, _, _ = [await shard.serve() for shard in shards]

    async def promote(shard: MeasuredShard, expert: int) -> None:
        promoter = shard.service.promoter
        await promoter.unpin(await promoter.promote(LAYER, [expert], PROMOTE_TIMEOUT_S))

    for shard in (on_disk, in_memory):
        await shard.loader.load(LoadOrder({}, {LAYER: list(experts)}))
    times = {
        "promoted from disk": await milliseconds(lambda expert: promote(on_disk, expert), experts),
        "promoted from host memory": await milliseconds(lambda expert: promote(in_memory, expert), experts),
        "loaded from a peer": await milliseconds(
            lambda expert: third.loader.load(LoadOrder({LAYER: [expert]}, {}, Sources({(LAYER, expert): peer}))),
            experts,
        ),
    }
    third.host.unload({LAYER: list(experts)}, {})
    times["loaded from the checkpoint"] = await milliseconds(
        lambda expert: third.loader.load(LoadOrder({LAYER: [expert]}, {})), experts
    )
    for shard in shards:
        await shard.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long it takes to bring an expert to a shard.")
    parser.add_argument("--input-dim", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2688)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape, dtype = ExpertShape(LAYER, args.experts, 1, args.input_dim, args.width), getattr(torch, args.dtype)
    print(f"experts of {shape.nbytes(dtype) / 2**20:.1f} MiB")
    with tempfile.TemporaryDirectory() as folder:
        path = write_experts(Path(folder), shape)
        times = asyncio.run(measure_parts(shape, path, dtype)) | asyncio.run(measure_ways(shape, path, dtype))
    for what, spent in times.items():
        print(f"{what:28} {spent:8.1f} ms")


if __name__ == "__main__":
    main()
