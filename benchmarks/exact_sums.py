"""The benchmark measures how much time exact sums take in a layer call and in a decode step.

Exact sums do not depend on the placement or on the order of the additions.

    python -m benchmarks.exact_sums

- *plain*: a loop over experts computes matrix products in PyTorch. It adds the weighted outputs as fp32 in any order.
- *exact*: the code that a server runs. On a CPU, the code uses compiled kernels; with EXPERTMESH_CPU_KERNELS=0, it uses
  plain PyTorch.

Plain and exact calls alternate in one process. The printed times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.blocks.expert_bank import ExpertBank, LocalExperts
from model.configs.expert_shape import ExpertShape
from model.demo import DEMO
from model.families.registry import load_family
from model.family import ModelFamily
from model.state import Batch, State
from model.stored_matrix import StoredMatrix

Weights = dict[tuple[int, int], dict[str, Tensor]]  # (layer, expert) -> {"up": matrix, "down": matrix}
SUPER = ExpertShape(layer=0, num_experts=64, top_k=22, input_dim=1024, width=2688)


class FloatExperts:
    """`FloatExperts` adds expert outputs as floats. The sums depend on the order of the additions and on the batch."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weights = {key: (part["up"].to(dtype), part["down"].to(dtype)) for key, part in weights.items()}

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        return lambda: self._sums(layer, x_NL, topk_ids_NK, topk_weights_NK)

    def _sums(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Tensor:
        num_picks = topk_ids_NK.shape[1]
        order_P = topk_ids_NK.flatten().argsort()
        experts, counts = topk_ids_NK.flatten()[order_P].unique_consecutive(return_counts=True)
        rows_P = order_P // num_picks
        parts = x_NL.to(self.dtype)[rows_P].split(counts.tolist())
        picked = zip(experts.tolist(), parts, strict=True)
        y_PL = torch.cat([self._expert(self.weights[layer, expert], x) for expert, x in picked])
        weighted_PL = y_PL.float() * topk_weights_NK.flatten()[order_P, None]
        return torch.zeros(x_NL.shape).index_add_(0, rows_P, weighted_PL)

    def _expert(self, weights: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        up, down = weights
        hidden = F.linear(x, up).relu_()
        return F.linear(hidden.mul_(hidden), down)


def alternate(calls: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, float]:
    """Run each of `calls` once per round; return the median time of each call in microseconds, by name."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(num_rounds + 10):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if round_ >= 10:
                times[name].append(1e6 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def super_weights() -> Weights:
    """Return random weights for 64 experts of Nemotron 3 Super's size; a small machine cannot hold all 512 experts."""
    one = {"up": (2688, 1024), "down": (1024, 2688)}
    return {
        (SUPER.layer, expert): {name: torch.randn(*size) / size[1] ** 0.5 for name, size in one.items()}
        for expert in range(SUPER.num_experts)
    }


def exact_experts(shapes: Sequence[ExpertShape], weights: Weights, dtype: torch.dtype) -> LocalExperts:
    banks = {shape.layer: ExpertBank(shape, dtype) for shape in shapes}
    for (layer, expert), tensors in weights.items():
        banks[layer].load(expert, {name: StoredMatrix.plain(tensor) for name, tensor in tensors.items()})
    return LocalExperts(banks)


def layer_calls(
    shape: ExpertShape, plain: FloatExperts, exact: LocalExperts, num_rows: int
) -> dict[str, Callable[[], object]]:
    x_NL = torch.randn(num_rows, shape.input_dim)
    ids_NK = torch.stack([torch.randperm(shape.num_experts)[: shape.top_k] for _ in range(num_rows)])
    weights_NK = torch.rand(num_rows, shape.top_k)
    call = (shape.layer, x_NL, ids_NK, weights_NK)
    return {"plain": lambda: plain(*call)(), "exact": lambda: exact(*call)()}


def step_calls(
    family: ModelFamily, plain: FloatExperts, exact: LocalExperts, num_rows: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Return two functions that run one decode step of `num_rows` requests: "plain" and "exact"."""
    spec = family.config.state_spec
    tokens = torch.randint(0, family.config.vocab_size, (num_rows,))
    tables = tuple((i,) for i in range(num_rows))
    batch = Batch(tokens, (1,) * num_rows, (8,) * num_rows, tuple(range(num_rows)), tables)
    calls: dict[str, Callable[[], object]] = {}
    for name, experts in (("plain", plain), ("exact", exact)):
        model = family.load_backbone(experts, dtype)
        state = State(spec, num_rows, num_rows, dtype)
        calls[name] = lambda model=model, state=state: model.logits(model.forward(batch, state))  # type: ignore[misc]
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the time of exact sums with that of float sums.")
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    table = Table(title="exact sums against float sums, median µs")
    for column in ("dtype", "rows", "what", "plain", "exact", "ratio"):
        table.add_column(column, justify="right")
    family = load_family(args.model)
    places = [(shape.layer, expert) for shape in family.expert_shapes for expert in range(shape.num_experts)]
    stored = {place: family.load_expert(*place) for place in places}
    own = {place: {name: one.dequantized() for name, one in expert.items()} for place, expert in stored.items()}
    huge = super_weights()
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            plain, exact = FloatExperts(own, dtype), exact_experts(family.expert_shapes, own, dtype)
            plain_large, large = FloatExperts(huge, dtype), exact_experts([SUPER], huge, dtype)
            for num_rows in (1, 8, 64):
                layer = alternate(layer_calls(family.expert_shapes[0], plain, exact, num_rows), args.rounds)
                step = alternate(step_calls(family, plain, exact, num_rows, dtype), args.rounds // 4)
                large_layer = alternate(layer_calls(SUPER, plain_large, large, num_rows), args.rounds // 20)
                for what, times in (("layer", layer), ("decode step", step), ("layer of Super's size", large_layer)):
                    words = [f"{times[name]:.0f}" for name in ("plain", "exact")]
                    ratio = f"{times['exact'] / times['plain']:.2f}"
                    table.add_row(str(dtype).removeprefix("torch."), str(num_rows), what, *words, ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
