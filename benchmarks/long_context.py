"""The benchmark measures memory during the prefill of long prompts, and the time per decoded token after the prefill.

    python -m benchmarks.long_context                    # 8 k, 32 k and 128 k tokens; takes long
    python -m benchmarks.long_context --lens 2048 8192 --json out.json

The model has the demo's weights and a larger `max_position_embeddings`. Experts run in the same process. The benchmark
uses neither drafts nor the prefix cache. The engine reads the prompt in chunks. Each prompt length runs in its own
process, whose KV cache has room for this length only. The measured memory is the process's peak resident set while the
engine reads the prompt. A longer prompt should need more memory only for its KV. The benchmark measures the time in
attention layers separately, because this time must grow with the context.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model.blocks.attention import Attention
from model.demo import DEMO
from services.args import AppArgs
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.contract.sampling_params import SamplingParams

WARM_LEN, WARM_OUTPUT = 2048, 4
TIMEOUT_S = 2 * 3600  # 256 k tokens take about 45 minutes on one core
# The bar applies to the time of a token without attention: the time after the longest prompt, divided by the time after
# the shortest prompt, must not be greater.
SLOWDOWN_BAR = 1.5


@dataclass(frozen=True)
class ContextMeasurement:
    """A `ContextMeasurement` holds the memory and the times that were measured at one context length."""

    num_tokens: int
    kv_bytes: int
    peak_bytes: int  # peak resident set while the engine read the prompt
    prefill_s: float
    token_ms: float  # median time of one decoded token
    attention_ms: float  # median time that one decoded token spends in attention layers

    @property
    def other_ms(self) -> float:
        return self.token_ms - self.attention_ms


def write_model(source: Path, out: Path, context: int) -> None:
    """Write a copy of the checkpoint that allows a longer context; the copy has links to the original weights."""
    for path in source.iterdir():
        if path.name != "config.json":
            (out / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))


class AttentionTimer:
    """An `AttentionTimer` adds up the seconds that a model spends in attention layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = 0.0
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        assert layers, "the model has no attention layer"
        for layer in layers:
            setattr(layer, "add_to", self._timed(layer.add_to))  # noqa: B010 - replaces the method of this one layer

    def reset(self) -> None:
        self.seconds = 0.0

    def _timed(self, add_to: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            started = time.perf_counter()
            add_to(*args)
            self.seconds += time.perf_counter() - started

        return timed


def reset_peak() -> None:
    """Reset this process's peak resident set. Linux then measures the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


async def measure(
    model: str, num_tokens: int, num_output: int, max_batch_tokens: int, num_threads: int
) -> ContextMeasurement:
    """Prefill a random prompt of `num_tokens` tokens, decode `num_output` tokens, and measure memory and times."""
    context = num_tokens + num_output
    args = AppArgs(model=model, experts="local", max_requests=1, max_model_len=context, state_memory=None)
    family = args.check()
    page = family.config.state_spec.bytes_per_block(args.torch_dtype)
    one = family.config.state_spec.bytes_per_slot(args.torch_dtype)
    kv_bytes = family.config.state_spec.num_blocks(context) * page
    args = args.model_copy(update={"state_memory": kv_bytes + 8 * one})
    config = BackboneConfig(
        dtype=args.torch_dtype,
        device="cpu",
        max_model_len=context,
        max_batch_tokens=max_batch_tokens,
        memory=args.memory_plan(family),
        num_threads=num_threads or args.threads(family),
        draft_tokens=0,
        prefix_cache=False,
    )
    backbone = Backbone(config, family, None, None)
    await backbone.start()
    try:
        attention = AttentionTimer(backbone.engine.runner.model)  # type: ignore[arg-type]
        rng = random.Random(0)

        async def tokens(length: int, num_output: int) -> list[tuple[float, float]]:
            """Return, for each token, the pair (arrival time, total seconds in attention layers before the arrival)."""
            ids = [rng.randrange(16, family.config.vocab_size) for _ in range(length)]
            params = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
            return [
                (time.perf_counter(), attention.seconds)
                async for _ in backbone.engine.generate(f"{length}-{num_output}", ids, params)
            ]

        await tokens(min(WARM_LEN, num_tokens), WARM_OUTPUT)
        reset_peak()
        started = time.perf_counter()
        came = await tokens(num_tokens, num_output)
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(came)]
    finally:
        await backbone.stop()
    token_s, attention_s = (statistics.median(column) for column in zip(*steps, strict=True))
    prefill_s = came[0][0] - started
    return ContextMeasurement(num_tokens, kv_bytes, peak_bytes(), prefill_s, 1e3 * token_s, 1e3 * attention_s)


@contextmanager
def long_model(source: Path, context: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        write_model(source, Path(folder), context)
        yield folder


def measure_apart(model: str, num_tokens: int, *numbers: int) -> ContextMeasurement:
    """Measure one context length in a new process, so that the memory of other lengths does not count."""
    command = [sys.executable, "-m", "benchmarks.long_context", "one", model]
    command += [str(number) for number in (num_tokens, *numbers)]
    output = subprocess.run(command, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=True).stdout
    return ContextMeasurement(**json.loads(output.splitlines()[-1]))


def report(measured: list[ContextMeasurement]) -> Table:
    table = Table(title="one request at a time, experts in the process")
    for column in ("tokens", "KV, MiB", "peak, MiB", "growth / KV's", "prefill, s", "tokens/s"):
        table.add_column(column, justify="right")
    for column in ("a token, ms", "attention, ms", "the rest, ms"):
        table.add_column(column, justify="right")
    first = measured[0]
    for one in measured:
        growth = "–"
        if one is not first:
            grown, kv = one.peak_bytes - first.peak_bytes, one.kv_bytes - first.kv_bytes
            growth = f"{grown / 2**20:.0f} / {kv / 2**20:.0f}"
        memory = [f"{value / 2**20:.0f}" for value in (one.kv_bytes, one.peak_bytes)]
        times = [f"{value:.2f}" for value in (one.token_ms, one.attention_ms, one.other_ms)]
        speed = [f"{one.prefill_s:.1f}", f"{one.num_tokens / one.prefill_s:.0f}"]
        table.add_row(f"{one.num_tokens:,}", *memory, growth, *speed, *times)
    return table


def summarize(measured: list[ContextMeasurement]) -> dict[str, Any]:
    first, last = measured[0], measured[-1]
    return {
        "lens": [asdict(one) for one in measured],
        "growth_bytes": last.peak_bytes - first.peak_bytes,
        "kv_growth_bytes": last.kv_bytes - first.kv_bytes,
        "slowdown_attention_aside": last.other_ms / first.other_ms,
    }


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        measurement = asyncio.run(measure(sys.argv[2], *map(int, sys.argv[3:7])))
        print(json.dumps(asdict(measurement)))
        return
    parser = argparse.ArgumentParser(description="Measure memory and time at long contexts.")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--lens", type=int, nargs="+", default=[8192, 32768, 131072], help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded after each prompt")
    parser.add_argument("--chunk", type=int, default=2048, help="largest number of tokens in one step")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: as many as a server uses for this model")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lens = sorted(args.lens)
    with long_model(args.model, lens[-1] + args.tokens) as model:
        measured = [measure_apart(model, length, args.tokens, args.chunk, args.threads) for length in lens]
    console = Console(width=120)
    console.print(report(measured))
    summary = summarize(measured)
    if len(measured) > 1:
        slower = summary["slowdown_attention_aside"]
        console.print(f"without attention, a token after the longest prompt takes {slower:.2f}× (bar {SLOWDOWN_BAR}×)")
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
