"""An `ExpertBank` holds routed experts in this process; MoE layers reach experts of any place through `Experts`.

Legend: N rows, L expert input (latent, or hidden in a plain MoE), M expert width, E experts, K picks per row, P = N·K
picks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import kernels
from model.blocks.expert_slots import ExpertSlots
from model.blocks.linear import RowBlocking, row_blocking
from model.configs.expert_memory import ExpertMemory, expert_memory, slot_bytes
from model.configs.expert_shape import ExpertShape
from model.cpu import moe as cpu
from model.cpu.packed_matrix import PackedMatrix, compile_products, pack_matrix, unpack_matrix
from model.exact_sums import (
    NOT_ADDABLE,
    add_on_grid,
    from_grid,
    gain_exponent,
    grid_exponents,
    log_wide_spread,
    scale_to_grid,
)
from model.stored_matrix import StoredMatrix


class Experts(Protocol):
    """`Experts` is the interface through which a MoE layer runs routed experts, in this process or on expert shards."""

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        """Start a layer call; return a function that waits for the weighted sums and returns the sums: fp32 (N, L)."""


def memory_on(shapes: Iterable[ExpertShape], dtype: torch.dtype, device: torch.device | str) -> dict[int, ExpertMemory]:
    """Return the memory that one expert of each layer takes on a shard on `device`, by layer."""
    is_pinned = torch.device(device).type == "cuda"
    return expert_memory(shapes, dtype, is_packed=kernels.is_compiled(device), is_pinned=is_pinned)


def memory_of_all(shapes: Iterable[ExpertShape], dtype: torch.dtype, device: torch.device | str) -> ExpertMemory:
    """Return the memory that all experts together take on shards on `device`, with one home and one standby each."""
    shapes = tuple(shapes)
    one = memory_on(shapes, dtype, device)
    return ExpertMemory(
        device=sum(shape.num_experts * one[shape.layer].device for shape in shapes),
        host=sum(shape.num_experts * one[shape.layer].host for shape in shapes),
    )


class ExpertBank:
    """An `ExpertBank` holds some of one layer's experts in this process and computes their outputs.

    Where the CPU kernels run, weights stay as they are stored, except weights with which no kernel can compute (see
    `pack_matrix`). Elsewhere the bank dequantizes weights to `dtype`, keeps them in `slots`, and does not keep the
    stored bytes. By default, a bank has slots of its own for all of the layer's experts.
    """

    def __init__(
        self,
        shape: ExpertShape,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        slots: ExpertSlots | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        self.is_compiled = kernels.is_compiled(device)
        if self.is_compiled:
            compile_products((matrix.format for matrix in shape.matrices), dtype)
        else:
            self._slots = slots or ExpertSlots(slot_bytes(shape, dtype), shape.num_experts, self.device)
        self._packed: dict[int, tuple[PackedMatrix, ...]] = {}  # by expert, in the order of `shape.matrices`
        self._matrices = np.zeros((len(shape.matrices), shape.num_experts, 3), np.int64)  # for `cpu.partial_sums`
        self._weights: dict[int, tuple[Tensor, ...]] = {}  # as `_packed`, where the kernels do not run
        self._slot_of: dict[int, int] = {}  # the slots of the experts in `_weights`
        self._gains: dict[int, int] = {}
        self._row_blocking: RowBlocking | None = None

    @property
    def held(self) -> frozenset[int]:
        return frozenset(self._gains)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the held experts' weights as they are stored."""
        return len(self._gains) * self.shape.nbytes(self.dtype)

    def used_memory(self) -> int:
        """Return the bytes of the buffers that hold the weights, with the padding of CPU kernels or slots."""
        if not self.is_compiled:
            return len(self._weights) * self._slots.slot_bytes
        return sum(one.nbytes for parts in self._packed.values() for one in parts)

    def load(self, expert: int, matrices: Mapping[str, StoredMatrix], gain: int | None = None) -> None:
        """Copy an expert's matrices, by the names of `ExpertShape.matrices`, into the bank.

        `gain` is the expert's `gain_exponent`. A caller that knows the exponent should pass it, because computing the
        exponent takes longer than the copy. One thread may load experts while another thread computes other experts.
        """
        assert 0 <= expert < self.shape.num_experts
        stored = tuple(matrices[matrix.name].to("cpu", self.dtype) for matrix in self.shape.matrices)
        sizes = [(one.format, one.shape) for one in stored]
        assert sizes == [(matrix.format, (matrix.rows, matrix.columns)) for matrix in self.shape.matrices]
        if self.is_compiled:
            packed = tuple(map(pack_matrix, stored))
            self._packed[expert] = packed
            self._matrices[:, expert] = [one.descriptor[:3] for one in packed]
        else:
            self._fill_slot(expert, stored)
        if gain is None:  # found from the numbers that the bank computes with, as a shard finds it
            gain = gain_exponent({matrix.name: one for matrix, one in zip(self.shape.matrices, stored, strict=True)})
        self._gains[expert] = gain

    def _fill_slot(self, expert: int, stored: tuple[StoredMatrix, ...]) -> None:
        """Dequantize an expert's matrices into a slot; the conversions run on the CPU, without other device memory."""
        self._empty_slot(expert)
        slot = self._slot_of[expert] = self._slots.take()
        weights = self._slots.matrices(slot, self.shape, self.dtype)
        for weight, one in zip(weights, stored, strict=True):
            weight.copy_(one.dequantized().to(self.dtype))
        self._weights[expert] = weights

    def _empty_slot(self, expert: int) -> None:
        self._weights.pop(expert, None)
        if (slot := self._slot_of.pop(expert, None)) is not None:
            self._slots.give_back(slot)

    def matrices(self, expert: int) -> dict[str, StoredMatrix]:
        """Return an expert's matrices on the CPU, bit for bit as loaded; plain matrices have the bank's dtype.

        Any thread may call this method. Raises KeyError if the bank lacks the expert, if another thread unloads the
        expert meanwhile, or if the bank keeps only dequantized numbers of a quantized expert.
        """
        if self.is_compiled:
            packed = self._packed[expert]
            if not all(one.has_stored_bits for one in packed):
                raise KeyError(expert)
            stored = tuple(unpack_matrix(one).to("cpu", self.dtype) for one in packed)
        else:
            weights = self._weights[expert]
            if any(matrix.format != "plain" for matrix in self.shape.matrices):
                raise KeyError(expert)
            stored = tuple(StoredMatrix.plain(weight.to("cpu", copy=True)) for weight in weights)
            if self._weights.get(expert) is not weights:  # another expert may be in the slot now
                raise KeyError(expert)
        return {matrix.name: one for matrix, one in zip(self.shape.matrices, stored, strict=True)}

    def unload(self, expert: int) -> None:
        for by_expert in (self._packed, self._gains):
            by_expert.pop(expert, None)
        self._matrices[:, expert] = 0
        if not self.is_compiled:
            self._empty_slot(expert)

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
        """Return a row blocking that makes the products of an expert batch-invariant; the bank keeps the result."""
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
        if not cpu.partial_sums(x_NL, *picks, self._matrices, self.shape.width, sums_NL):
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
        *gate, up, down = self._weights[expert]
        hidden = torch.nn.functional.linear(x, up)
        if gate:
            hidden = silu_by_row(torch.nn.functional.linear(x, gate[0])).mul_(hidden)
        else:
            hidden = hidden.relu_()
            hidden = hidden.mul_(hidden)
        return torch.nn.functional.linear(hidden, down)


def silu_by_row(x_NM: Tensor) -> Tensor:
    """Compute x·σ(x) so that a row's bits do not depend on the other rows.

    On a CPU, PyTorch computes the last numbers of a tensor with other instructions than the rest. So each row is
    computed alone.
    """
    silu = torch.nn.functional.silu
    return silu(x_NM) if x_NM.device.type != "cpu" else torch.stack([silu(row) for row in x_NM])


class LocalExperts:
    """`LocalExperts` runs every expert of every layer in this process."""

    def __init__(self, banks: Mapping[int, ExpertBank]) -> None:
        assert all(len(bank.held) == bank.shape.num_experts for bank in banks.values())
        self.banks = dict(banks)
        gains = {layer: [bank.gain_exponent(expert) for expert in bank.held] for layer, bank in banks.items()}
        self.gains = {layer: max(of_layer) for layer, of_layer in gains.items()}
        for layer, of_layer in gains.items():
            log_wide_spread(layer, Counter(of_layer))

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        grid_N = grid_exponents(x_NL, topk_weights_NK, self.gains[layer])
        row_P = torch.from_numpy(np.arange(x_NL.shape[0]).repeat(topk_ids_NK.shape[1]))
        picks = row_P, topk_ids_NK.flatten().cpu(), topk_weights_NK.flatten()
        return lambda: from_grid(self.banks[layer].partial_sums(x_NL, *picks, grid_N), grid_N)
