"""`MoE` is the sparse mixture of experts; it calls its routed experts through `Experts`, so that they may be remote.

LatentMoE routes on the full hidden vector, but sends the experts only the output of fc1, which has a quarter of the
hidden width. Then fc2 projects the weighted sum of the experts' outputs back to the hidden width. In a plain MoE, fc1
and fc2 are the identity.

Legend: N rows, D hidden, L expert input (latent, or hidden in a plain MoE), M expert width, E experts, K picks per row,
P = N·K picks.
Source: NVIDIA, "LatentMoE" (arXiv 2601.18089); router: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import kernels
from model.blocks.linear import Linear, RowBlocking, as_array, row_blocking
from model.blocks.mixer import Mixer
from model.blocks.norm import RMSNorm
from model.configs.expert_shape import ExpertShape
from model.cpu import layers as cpu_layers
from model.cpu import moe as cpu
from model.cpu.packed_matrix import PackedMatrix, pack_matrix, unpack_matrix
from model.cpu.thread_pool import THREAD_POOL
from model.exact_sums import NOT_ADDABLE, add_on_grid, from_grid, gain_exponent, grid_exponents, scale_to_grid
from model.state import Batch, State
from model.stored_matrix import StoredMatrix


class Experts(Protocol):
    """`Experts` is the interface through which a MoE layer runs routed experts, in this process or on expert shards."""

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        """Start a layer call; return a function that waits for the weighted sums and returns the sums: fp32 (N, L)."""


class ExpertBank:
    """An `ExpertBank` holds some of one layer's experts in this process and computes their outputs."""

    def __init__(self, shape: ExpertShape, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        self.is_compiled = kernels.is_compiled(device)
        if self.is_compiled and dtype == torch.bfloat16 and (shape.input_dim % 2 or shape.width % 2):
            sizes = f"{shape.input_dim} inputs and a width of {shape.width}"
            raise ValueError(f"experts of layer {shape.layer} have {sizes}; bfloat16 on a CPU needs even numbers")
        self._weights: dict[int, tuple[Tensor, ...]] = {}  # by expert, in the order of `shape.matrices`
        self._packed: dict[int, tuple[PackedMatrix, ...]] = {}
        self._addresses = np.zeros((len(shape.matrices), shape.num_experts), np.int64)  # addresses of packed matrices
        self._gains: dict[int, int] = {}
        self._row_blocking: RowBlocking | None = None

    @property
    def held(self) -> frozenset[int]:
        return frozenset(self._gains)

    @property
    def nbytes(self) -> int:
        return len(self._gains) * self.shape.nbytes(self.dtype)

    def load(self, expert: int, matrices: Mapping[str, StoredMatrix], gain: int | None = None) -> None:
        """Copy an expert's matrices, by the names of `ExpertShape.matrices`, into the bank.

        `gain` is the expert's `gain_exponent`. A caller that knows the exponent should pass it, because computing the
        exponent takes longer than the copy. One thread may load experts while another thread computes other experts.
        """
        assert 0 <= expert < self.shape.num_experts
        stored = [matrices[matrix.name].to(self.device, self.dtype) for matrix in self.shape.matrices]
        assert [one.shape for one in stored] == [(matrix.rows, matrix.columns) for matrix in self.shape.matrices]
        if self.is_compiled:
            packed = self._packed[expert] = tuple(pack_matrix(one.dequantized()) for one in stored)
            self._addresses[:, expert] = [part.descriptor.address for part in packed]
        else:
            self._weights[expert] = tuple(one.dequantized().to(self.device, self.dtype, copy=True) for one in stored)
        self._gains[expert] = gain_exponent(matrices) if gain is None else gain

    def matrices(self, expert: int) -> dict[str, StoredMatrix]:
        """Return an expert's matrices on the CPU, bit for bit as loaded; raise KeyError if the bank lacks the expert.

        Plain matrices have the bank's dtype.
        """
        if self.is_compiled:
            weights = [unpack_matrix(packed) for packed in self._packed[expert]]
        else:
            weights = [weight.cpu() for weight in self._weights[expert]]
        names = [matrix.name for matrix in self.shape.matrices]
        return {name: StoredMatrix.plain(weight) for name, weight in zip(names, weights, strict=True)}

    def unload(self, expert: int) -> None:
        for by_expert in (self._weights, self._packed, self._gains):
            by_expert.pop(expert, None)
        self._addresses[:, expert] = 0

    def gain_exponent(self, expert: int) -> int:
        return self._gains[expert]

    def warm_up(self, expert: int) -> None:
        """Compile the kernels, or find the row blocking, so that the first call from a backbone does not take longer.

        The bank must hold `expert`, which computes one example row.
        """
        if self.is_compiled:
            self.packed_sums(*self._example_message(expert))
        else:
            x_NL, row, picked = torch.zeros(1, self.shape.input_dim), torch.tensor([0]), torch.tensor([expert])
            self.partial_sums(x_NL, row, picked, torch.ones(1), torch.zeros(1, dtype=torch.int16))

    def _example_message(self, expert: int) -> tuple[NDArray[Any], ...]:
        """Return the arguments of `packed_sums` for one pick of `expert`, with the array types of received messages.

        Received arrays are read-only, and numba compiles one kernel for each combination of array types.
        """

        def received(array: NDArray[Any]) -> NDArray[Any]:
            return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)

        rows = np.zeros((1, self.shape.input_dim), np.int16 if self.dtype == torch.bfloat16 else np.float32)
        ids, weight, grid = np.array([[0], [expert]], np.int32), np.ones(1, np.float32), np.zeros(1, np.int16)
        return tuple(map(received, (rows, *ids, weight, grid)))

    def row_blocking(self) -> RowBlocking:
        """Return a row blocking that makes both products of an expert batch-invariant; the bank keeps the result."""
        if self._row_blocking is None:
            blockings = [row_blocking(weight) for weight in next(iter(self._weights.values()))]
            self._row_blocking = RowBlocking(max(p.multiple for p in blockings), min(p.max_rows for p in blockings))
        return self._row_blocking

    def partial_sums(self, x_NL: Tensor, row_P: Tensor, expert_P: Tensor, weight_P: Tensor, grid_N: Tensor) -> Tensor:
        """Return the sum of weight·expert(x[row]) over each row's picks: int64 (N, L), in units of 2**grid.

        - `row_P` and `expert_P` are each pick's row and expert, int64 on the CPU. The bank must hold the experts.
        - `weight_P` is the router's weight of each pick.
        - `grid_N` is the exponent of each row's unit, from `exact_sums.grid_exponents`.

        Raises ValueError if an expert's output is not finite or too large to add.
        """
        if self.is_compiled:
            picks = (row_P.numpy(), expert_P.numpy(), weight_P.numpy(), grid_N.numpy())
            return torch.from_numpy(self.packed_sums(x_NL.float().contiguous().numpy(), *picks))
        order_P = expert_P.numpy().argsort(kind="stable")
        rows_P = row_P.numpy()[order_P]
        blocks, place_P, num_padded = self._blocks(expert_P.numpy()[order_P])
        source = np.zeros(num_padded, dtype=np.int64)  # padding is a copy of row 0, whose result is ignored
        source[place_P] = rows_P
        x = x_NL.to(self.device, self.dtype)[torch.from_numpy(source).to(self.device)]
        y = torch.cat([self._expert(expert, x[start:stop]) for expert, start, stop in blocks])
        y_PL = y[torch.from_numpy(place_P).to(self.device)]
        scale_P = scale_to_grid(weight_P.cpu().numpy()[order_P], grid_N.cpu().numpy()[rows_P])
        scale, rows = (torch.from_numpy(v).to(self.device) for v in (scale_P, rows_P))
        return add_on_grid(y_PL, scale, rows, len(x_NL))

    def packed_sums(
        self,
        x_NL: NDArray[np.generic],
        row_P: NDArray[np.integer],
        expert_P: NDArray[np.integer],
        weight_P: NDArray[np.float32],
        grid_N: NDArray[np.int16],
    ) -> NDArray[np.int64]:
        """Compute `partial_sums` on numpy arrays with the CPU kernels; `x_NL` is fp32, or the bits of bf16 as int16."""
        sums_NL = np.zeros(x_NL.shape, np.int64)
        picks = (x_NL.dtype == np.int16, row_P, expert_P, weight_P, grid_N)
        is_bf16 = self.dtype == torch.bfloat16  # `_packed` must not be read while another thread loads experts
        if not cpu.partial_sums(x_NL, *picks, *self._addresses, is_bf16, self.shape.width, sums_NL):
            raise ValueError(NOT_ADDABLE)
        return sums_NL

    def _blocks(self, expert_P: NDArray[np.int64]) -> tuple[list[tuple[int, int, int]], NDArray[np.int64], int]:
        """Pad the rows of each expert and cut them into blocks of sizes that `row_blocking` allows.

        `expert_P` holds the expert of each pick, sorted. The result has three parts:

        - (expert, start, stop) of each block, where start .. stop is the range of the block's padded rows;
        - the padded row of each pick;
        - the number of padded rows.
        """
        blocking = self.row_blocking()
        starts = np.flatnonzero(np.diff(expert_P, prepend=-1)).tolist()
        blocks: list[tuple[int, int, int]] = []
        shift_P = np.empty(len(expert_P), dtype=np.int64)
        end = 0
        for start, stop in zip(starts, [*starts[1:], len(expert_P)], strict=True):
            shift_P[start:stop] = end - start
            first, end = end, end + blocking.padded(stop - start)
            expert = int(expert_P[start])
            blocks += [(expert, row, min(row + blocking.max_rows, end)) for row in range(first, end, blocking.max_rows)]
        return blocks, shift_P + np.arange(len(expert_P)), end

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        up, down = self._weights[expert]
        hidden = torch.nn.functional.linear(x, up).relu_()
        return torch.nn.functional.linear(hidden.mul_(hidden), down)


class LocalExperts:
    """`LocalExperts` runs every expert of every layer in this process."""

    def __init__(self, banks: Mapping[int, ExpertBank]) -> None:
        assert all(len(bank.held) == bank.shape.num_experts for bank in banks.values())
        self.banks = dict(banks)
        self.gains = {layer: max(map(bank.gain_exponent, bank.held)) for layer, bank in banks.items()}

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        grid_N = grid_exponents(x_NL, topk_weights_NK, self.gains[layer])
        row_P = torch.from_numpy(np.arange(x_NL.shape[0]).repeat(topk_ids_NK.shape[1]))
        picks = row_P, topk_ids_NK.flatten().cpu(), topk_weights_NK.flatten()
        return lambda: from_grid(self.banks[layer].partial_sums(x_NL, *picks, grid_N), grid_N)


class Router(nn.Module):
    """A `Router` picks K experts for each row: (N, D) -> expert ids (N, K) and weights (N, K).

    Scores are sigmoids in fp32. The correction bias influences which experts are picked, but never the picks' weights.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        shape: ExpertShape,
        scaling_factor: float,
        num_groups: int,
        topk_groups: int,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(shape.num_experts))
        self.top_k, self.scaling_factor, self.normalize = shape.top_k, scaling_factor, normalize
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.packed: PackedMatrix | None = None

    def pack(self) -> None:
        self.packed = pack_matrix(self.weight.float())

    def scores(self, h_ND: Tensor) -> Tensor:
        return torch.nn.functional.linear(h_ND.float(), self.weight.float()).sigmoid()

    def forward(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        scores_NE = self.scores(h_ND)
        choice_NE = self._keep_best_groups(scores_NE + self.e_score_correction_bias)
        topk_ids_NK = choice_NE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_NK = scores_NE.gather(1, topk_ids_NK)
        if self.normalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return topk_ids_NK, weights_NK * self.scaling_factor

    @property
    def kernel_params(self) -> tuple[Any, ...]:
        """Return the router's parameters in the order in which `cpu.layers.route` takes them."""
        assert self.packed is not None
        groups, bias = (self.num_groups, self.topk_groups), as_array(self.e_score_correction_bias)
        return self.packed.descriptor, bias, *groups, self.normalize, np.float32(self.scaling_factor)

    def _keep_best_groups(self, choice_NE: Tensor) -> Tensor:
        if self.topk_groups == self.num_groups:
            return choice_NE
        by_group: Tensor = choice_NE.unflatten(-1, (self.num_groups, -1))
        best = by_group.topk(2, dim=-1).values.sum(-1).topk(self.topk_groups, dim=-1).indices
        is_kept = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=choice_NE.device).scatter_(1, best, True)
        return by_group.masked_fill(~is_kept[..., None], -torch.inf).flatten(-2)


class DenseMLP(Mixer):
    """A `DenseMLP` computes down·relu(up·h)², as the shared expert of MoE layers and as the mixer of `-` layers."""

    def __init__(self, hidden_size: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, width, bias)
        self.down_proj = Linear(width, hidden_size, bias)

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the parameters of the CPU kernels, including the parameters of `norm`, the norm before the mixer."""
        self.up_proj.pack()
        self.down_proj.pack()
        self.norm_params = norm.kernel_params

    @property
    def kernel_params(self) -> tuple[Any, ...]:
        return *self.up_proj.kernel_params, *self.down_proj.kernel_params

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += mlp(norm(x)) in place with the CPU kernels."""
        num_threads = torch.get_num_threads()
        cpu_layers.add_mlp(
            THREAD_POOL.start_workers(num_threads), num_threads, x_TD.numpy(), *self.norm_params, *self.kernel_params
        )

    def forward(self, h: Tensor, batch: Batch | None = None, state: State | None = None) -> Tensor:
        hidden = self.up_proj(h).relu()
        out: Tensor = self.down_proj(hidden * hidden)
        return out


class MoE(Mixer):
    """A `MoE` layer maps (N, D) -> (N, D) and computes the shared expert while the routed experts work elsewhere."""

    def __init__(
        self,
        hidden_size: int,
        shape: ExpertShape,
        shared_width: int,
        router: Router,
        experts: Experts,
        *,
        is_latent: bool,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.experts, self.gate, self.is_latent = shape, experts, router, is_latent
        if is_latent:
            self.fc1_latent_proj = Linear(hidden_size, shape.input_dim, bias)
            self.fc2_latent_proj = Linear(shape.input_dim, hidden_size, bias)
        self.shared_experts = DenseMLP(hidden_size, shared_width, bias)

    def pack(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        """Prepare the parameters of the CPU kernels and of `norm`; rows go to the experts in `dtype`."""
        self.gate.pack()
        self.shared_experts.pack(norm, dtype)
        fc1_params = self.fc2_params = (
            self.gate.kernel_params[0],
            as_array(None),
        )  # placeholders of the types that the kernels expect; the kernels do not read them
        if self.is_latent:
            self.fc1_latent_proj.pack()
            self.fc2_latent_proj.pack()
            fc1_params, self.fc2_params = self.fc1_latent_proj.kernel_params, self.fc2_latent_proj.kernel_params
        self.route_params = (*norm.kernel_params, *self.gate.kernel_params, self.is_latent, *fc1_params)
        self.shared_params = self.shared_experts.kernel_params
        self.wire_dtype = dtype

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += moe(norm(x)) in place with the CPU kernels."""
        num_threads, x, shape = torch.get_num_threads(), x_TD.numpy(), self.shape
        control = THREAD_POOL.start_workers(num_threads)
        is_bf16 = self.wire_dtype == torch.bfloat16
        ids_NK, weights_NK = np.empty((len(x), shape.top_k), np.int64), np.empty((len(x), shape.top_k), np.float32)
        wire_NL = np.empty((len(x), shape.input_dim), np.int16 if is_bf16 else np.float32)
        h_ND = cpu_layers.route(control, num_threads, x, *self.route_params, ids_NK, weights_NK, wire_NL, is_bf16)
        x_NL, topk_ids_NK, topk_weights_NK = map(torch.from_numpy, (wire_NL, ids_NK, weights_NK))
        x_NL = x_NL.view(torch.bfloat16) if is_bf16 else x_NL
        wait = self.experts(shape.layer, x_NL, topk_ids_NK, topk_weights_NK)
        shared_ND = cpu_layers.mlp(control, num_threads, h_ND, *self.shared_params)
        cpu_layers.add_routed(control, num_threads, wait().numpy(), self.is_latent, *self.fc2_params, shared_ND, x)

    def forward(self, h_ND: Tensor, batch: Batch | None = None, state: State | None = None) -> Tensor:
        topk_ids_NK, topk_weights_NK = self.gate(h_ND)
        x_NL = self.fc1_latent_proj(h_ND) if self.is_latent else h_ND
        wait = self.experts(self.shape.layer, x_NL, topk_ids_NK, topk_weights_NK)
        shared_ND = self.shared_experts(h_ND)
        y_NL = wait().to(h_ND.dtype)
        routed_ND = self.fc2_latent_proj(y_NL) if self.is_latent else y_NL
        out: Tensor = routed_ND + shared_ND
        return out
