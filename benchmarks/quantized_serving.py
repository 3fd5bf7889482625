"""The benchmark serves one model in bf16, FP8 and NVFP4 through 3 shards, and compares speeds, sizes and memory.

    python -m benchmarks.quantized_serving --rounds 3 --json out.json    # about 15 minutes

The model has the shape of `benchmarks.shape`, and its weights do not fit the processor's caches. The quantized copies
have the formats of the public checkpoints (see `model.demo.quantize`). In each round every format is served once, one
server at a time. The bars are those of a deployment that changes from bf16 to a quantized checkpoint: it must not
become slower with one stream, and at most 1.2 times slower with 8 and 16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.peers import Speeds, Workload
from benchmarks.server import server
from benchmarks.shape import write_shape
from benchmarks.throughput import SHAPE, ThroughputClient, median
from model.configs.model_files import SINGLE
from model.configs.weight_format import WeightFormat
from model.demo.quantize import formats_of, write_quantized
from model.encoder import linear_modules

FORMATS: dict[str, WeightFormat] = {"FP8": "fp8", "FP8 blocks": "fp8_blocks", "NVFP4": "nvfp4"}
PLAIN = "bf16"
BARS = {"decode × 1": 1.0, "decode × 8": 1 / 1.2, "decode × 16": 1 / 1.2}  # least tokens per second, against bf16


def write_models(source: Path, names: list[str], out: Path) -> dict[str, Path]:
    """Write the model directory `source` in the formats `names` into `out`, and return all directories by format."""
    modules = linear_modules(load_file(source / SINGLE))
    models = {PLAIN: source}
    for name in names:
        format = FORMATS[name]
        models[name] = out / format
        write_quantized(source, models[name], formats_of(format, modules))
    return models


def table(speeds: dict[str, list[Speeds]], sizes: dict[str, int]) -> Table:
    columns = list(median(speeds[PLAIN]))
    shown = Table(title=f"tokens/s through 3 shards, medians, and ratios to {PLAIN}; {os.cpu_count()} cores")
    for column in ("", *columns, "checkpoint, MB"):
        shown.add_column(column, justify="right")
    plain = median(speeds[PLAIN])
    for name, rounds in speeds.items():
        words = []
        for column, speed in median(rounds).items():
            ratio = speed / plain[column]
            missed = ", missed" if name != PLAIN and ratio < BARS.get(column, 0) else ""
            words.append(f"{speed:.0f} ({ratio:.2f}×{missed})")
        shown.add_row(name, *words, f"{sizes[name] / 1e6:.0f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the speed of bf16, FP8 and NVFP4 weights through shards.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="what bf16 is compared with"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt when decoding is measured")
    parser.add_argument("--output", type=int, default=32, help="tokens of each answer when decoding is measured")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt when prefill is measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not (SHAPE / "config.json").exists():
        write_shape(SHAPE)
    workload = Workload(tuple(args.streams), args.prompt, args.output, args.prefill)
    vocab_size = json.loads((SHAPE / "config.json").read_text())["vocab_size"]
    speeds: dict[str, list[Speeds]] = {}
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as out:
        models = write_models(SHAPE, args.formats, Path(out))
        sizes = {name: (path / SINGLE).stat().st_size for name, path in models.items()}
        for round_, (name, path) in itertools.product(range(args.rounds), models.items()):
            with server("--model", str(path), "--dtype", "bfloat16", "--shards", "3") as running:
                measured = ThroughputClient(running, vocab_size, 1000 * round_).measure(workload)
            speeds.setdefault(name, []).append(measured)
            console.print(f"round {round_ + 1}, {name}: {measured}", soft_wrap=True)
    console.print(table(speeds, sizes))
    if args.json:
        rounds = {name: [asdict(speed) for speed in values] for name, values in speeds.items()}
        report = {"workload": asdict(workload), "speeds": rounds, "checkpoint_bytes": sizes}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
