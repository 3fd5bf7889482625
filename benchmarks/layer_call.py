"""The benchmark measures layer calls through `RemoteExperts` to three shards. It prints median times in microseconds.

    python -m benchmarks.layer_call

The shards run in another process. The experts are very small. Therefore a call spends most of its time on the choice of
homes, on messages, on sockets and on the addition of sums.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import torch

from services.expert import control_client
from services.expert.client import RemoteExperts
from tests.services.expert.checkpoint import LATENT, LAYERS, NUM_EXPERTS, TOP_K, write_checkpoint
from tests.services.expert.shard_process import ShardProcess

NUM_SHARDS = 3


def measure(remote: RemoteExperts, num_rows: int, num_calls: int) -> list[float]:
    """Make `num_calls` layer calls and return the time of each call in microseconds; every call has new random rows."""
    generator = torch.Generator().manual_seed(num_rows)
    times = []
    for i in range(num_calls):
        x_NL = torch.randn(num_rows, LATENT, generator=generator)
        weights, ids = torch.rand(num_rows, NUM_EXPERTS, generator=generator).topk(TOP_K, dim=-1)
        started_at = time.perf_counter()
        remote(LAYERS[i % len(LAYERS)], x_NL, ids, weights)()
        times.append(1e6 * (time.perf_counter() - started_at))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=4000, help="calls of each size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        ShardProcess(write_checkpoint(Path(folder) / "m"), NUM_SHARDS) as process,
    ):
        ids = [shard.id for shard in process.shards]
        for name, spread in (("one home each", 1), ("two homes each", 2), ("everywhere", NUM_SHARDS)):
            homes_of = tuple(tuple(ids[(e + i) % NUM_SHARDS] for i in range(spread)) for e in range(NUM_EXPERTS))
            homes = dict.fromkeys(LAYERS, homes_of)
            remote = RemoteExperts()
            remote.update(asyncio.run(control_client.fill(process.shards, homes, epoch=1)), process.shards)
            for num_rows in (1, 8):
                measure(remote, num_rows, args.calls // 4)
                times = measure(remote, num_rows, args.calls)
                sent = remote.traffic.num_sent / remote.traffic.num_calls
                quartiles = statistics.quantiles(times, n=4)
                print(
                    f"{name}, {num_rows} rows: median {quartiles[1]:.0f} µs, quartiles {quartiles[0]:.0f} and "
                    f"{quartiles[2]:.0f}, {sent:.2f} messages a call",
                    flush=True,
                )
            remote.close()


if __name__ == "__main__":
    main()
