"""The benchmark measures the CPU products of weights in every stored format, and the routed experts made of them.

    python -m benchmarks.quantized_panels

- The first table has the products of a few rows and one matrix, on one thread.
- The second table has the experts of one decode step in the shape of `benchmarks.shape`, on one thread: all its MoE
  layers, one after the other, as a server computes them. The experts of all layers do not fit the caches.

The formats take turns in one process, and the printed times are medians. Every quantized product is compared with the
product of the dequantized weights; the benchmark fails if a bit differs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.shape import CONFIG
from model.blocks.expert_bank import ExpertBank
from model.configs.expert_shape import ExpertShape
from model.configs.weight_format import WeightFormat, stored_parts
from model.cpu.linear import linear
from model.cpu.packed_matrix import PackedMatrix, pack_matrix
from model.exact_sums import grid_exponents
from model.stored_matrix import StoredMatrix

Sizes = tuple[int, int]  # rows and columns
MATRIX: Sizes = (2048, 7168)
MATRIX_ROWS = (1, 2, 4, 8, 32)
STREAMS = (1, 8, 16, 64)
FORMATS: dict[str, tuple[WeightFormat, torch.dtype]] = {
    "fp32": ("plain", torch.float32),
    "bf16": ("plain", torch.bfloat16),
    "FP8": ("fp8", torch.bfloat16),
    "FP8 blocks": ("fp8_blocks", torch.bfloat16),
    "NVFP4": ("nvfp4", torch.bfloat16),
}


def random_weight(format: WeightFormat, sizes: Sizes, generator: torch.Generator) -> StoredMatrix:
    """Return a weight whose numbers have about the size of 1 / √columns."""
    rows, columns = sizes
    size = columns**-0.5
    if format == "plain":
        return StoredMatrix.plain(size * torch.randn(rows, columns, generator=generator))
    shapes = [part.shape for part in stored_parts(format, rows, columns)]
    if format == "nvfp4":
        codes = torch.randint(0, 256, shapes[0], generator=generator).to(torch.uint8)
        group_scales = (64 + 64 * torch.rand(shapes[1], generator=generator)).to(torch.float8_e4m3fn)
        return StoredMatrix(format, (codes, group_scales, torch.tensor(size / 300)))
    codes = (64 * torch.randn(shapes[0], generator=generator)).to(torch.float8_e4m3fn)
    return StoredMatrix(format, (codes, size / 64 * (1 + torch.rand(shapes[1], generator=generator))))


def alternate(calls: Mapping[str, Callable[[], object]], num_rounds: int) -> dict[str, float]:
    """Run each of `calls` once per round; return the median time of each call in milliseconds, by name."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(num_rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if round_ >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_matrix(num_rounds: int, generator: torch.Generator) -> dict[int, dict[str, float]]:
    """Return the milliseconds of a product by number of rows and format; raise ValueError if a bit differs."""
    packed: dict[str, PackedMatrix] = {}
    for name, (format, dtype) in FORMATS.items():
        weight = random_weight(format, MATRIX, generator).to("cpu", dtype)
        packed[name] = pack_matrix(weight)
        copy = pack_matrix(StoredMatrix.plain(weight.dequantized().float()))
        for num_rows in MATRIX_ROWS:
            x = torch.randn(num_rows, MATRIX[1], generator=generator)
            if not torch.equal(linear(x, packed[name]), linear(x, copy)):
                raise ValueError(f"{num_rows} rows times {name} differ from the product of the dequantized weights")
    times = {}
    for num_rows in MATRIX_ROWS:
        x = torch.randn(num_rows, MATRIX[1], generator=generator)

        def product(weight: PackedMatrix, x: torch.Tensor = x) -> Callable[[], object]:
            return lambda: linear(x, weight)

        times[num_rows] = alternate({name: product(weight) for name, weight in packed.items()}, num_rounds)
    return times


def filled_banks(name: str, num_layers: int, generator: torch.Generator) -> list[ExpertBank]:
    """Return the routed experts of the measured shape, in one format."""
    format, dtype = FORMATS[name]
    num_experts, top_k = CONFIG["n_routed_experts"], CONFIG["num_experts_per_tok"]
    sizes = CONFIG["moe_latent_size"], CONFIG["moe_intermediate_size"]
    banks = []
    for layer in range(num_layers):
        bank = ExpertBank(ExpertShape(layer, num_experts, top_k, *sizes, formats=(format, format)), dtype)
        for expert in range(num_experts):
            matrices = {
                matrix.name: random_weight(format, (matrix.rows, matrix.columns), generator)
                for matrix in bank.shape.matrices
            }
            bank.load(expert, matrices, gain=0)
        banks.append(bank)
    return banks


def measure_experts(num_rounds: int, generator: torch.Generator) -> tuple[dict[int, dict[str, float]], dict[str, int]]:
    """Return the milliseconds of a step's experts by number of streams and format, and the experts' bytes by format."""
    num_layers = CONFIG["hybrid_override_pattern"].count("E")
    all_banks = {name: filled_banks(name, num_layers, generator) for name in FORMATS if name != "fp32"}
    top_k, num_experts = CONFIG["num_experts_per_tok"], CONFIG["n_routed_experts"]
    times = {}
    for num_streams in STREAMS:
        # Each call computes another step with other experts, so that no expert is in a cache because of the last call.
        steps = []
        for _ in range(8):
            x_NL = torch.randn(num_streams, CONFIG["moe_latent_size"], generator=generator)
            scores = torch.rand(num_layers, num_streams, num_experts, generator=generator)
            steps.append((x_NL, scores.topk(top_k).indices))
        row_P, weights_NK = torch.arange(num_streams).repeat_interleave(top_k), torch.full((num_streams, top_k), 0.4)

        def step(
            banks: list[ExpertBank],
            steps: list[tuple[torch.Tensor, torch.Tensor]] = steps,
            row_P: torch.Tensor = row_P,
            weights_NK: torch.Tensor = weights_NK,
        ) -> Callable[[], None]:
            calls = iter(range(1_000_000))

            def run() -> None:
                x_NL, ids = steps[next(calls) % len(steps)]
                grid_N = grid_exponents(x_NL, weights_NK, 0)
                for bank, ids_NK in zip(banks, ids, strict=True):
                    bank.partial_sums(x_NL, row_P, ids_NK.flatten(), weights_NK.flatten(), grid_N)

            return run

        times[num_streams] = alternate({name: step(banks) for name, banks in all_banks.items()}, num_rounds)
    return times, {name: sum(bank.nbytes for bank in banks) for name, banks in all_banks.items()}


def table(title: str, first: str, times: dict[int, dict[str, float]]) -> Table:
    names = list(next(iter(times.values())))
    found = Table(first, *names, title=title)
    for count, by_name in times.items():
        found.add_row(str(count), *(f"{ms:.2f} ({ms / by_name['bf16']:.2f})" for ms in by_name.values()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the CPU products of weights in every stored format.")
    parser.add_argument("--rounds", type=int, default=30, help="calls of each format (default 30)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, generator = Console(), torch.Generator().manual_seed(0)
    rows, columns = MATRIX
    title = f"A {rows} × {columns} matrix: ms (relative to bf16)"
    console.print(table(title, "rows", measure_matrix(args.rounds, generator)))
    times, sizes = measure_experts(args.rounds, generator)
    console.print(table("Experts of one step of the shape: ms (relative to bf16)", "streams", times))
    console.print("Experts in MB:", ", ".join(f"{name} {size / 1e6:.0f}" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
