"""Batch-invariant matrix products give each row the same bits, whatever other rows are in the product.

A library chooses the kernel for a product by the number of rows, and two kernels may add the same terms in different
orders. So the last bits of a row's result can change when other rows join the product. A library always uses the same
kernel if the rows are padded to a multiple of the right number and cut into blocks of the right maximum size. Libraries
do not document the right numbers, so `find_row_blocking` finds them by measurement on this machine.

Legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.cpu.linear import linear
from model.cpu.packed_matrix import PackedMatrix, PackedMatrixDescriptor, pack_matrix
from model.stored_matrix import StoredMatrix

MULTIPLES = (1, 2, 4, 8, 16, 32)
MAX_ROWS = (256, 128, 64, 32)


@dataclass(frozen=True)
class RowBlocking:
    """A `RowBlocking` says how many rows keep a product batch-invariant: multiples of a number up to a maximum."""

    multiple: int
    max_rows: int

    def padded(self, num_rows: int) -> int:
        """Return `num_rows` rounded up to a multiple of `multiple`."""
        return -(-num_rows // self.multiple) * self.multiple


def is_batch_invariant(weight_OI: Tensor, blocking: RowBlocking) -> bool:
    """Return True if every number of rows that `blocking` allows gives each row the same bits as a full block.

    The function tries each number n twice: with the first n rows, and with the last n rows in reverse order.
    """
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(blocking.max_rows, weight_OI.shape[1], generator=generator).to(weight_OI)
    full_NO = F.linear(x_NI, weight_OI)
    return all(
        torch.equal(F.linear(x_NI[:n], weight_OI), full_NO[:n])
        and torch.equal(F.linear(x_NI[-n:].flip(0), weight_OI), full_NO[-n:].flip(0))
        for n in range(blocking.multiple, blocking.max_rows + 1, blocking.multiple)
    )


@cache
def find_row_blocking(
    num_inputs: int, num_outputs: int, dtype: torch.dtype, device: str, num_threads: int
) -> RowBlocking:
    """Find the cheapest batch-invariant row blocking for a weight (num_outputs, num_inputs) by trying candidates.

    The last candidate computes every row alone, which is slow, but works unless a product's bits are random.

    The search takes up to half a second, and the result is cached. Raises RuntimeError if no candidate is
    batch-invariant. `num_threads` is only a part of the cache's key: libraries also choose kernels by the number of
    threads.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(device, dtype)
    blocks = [RowBlocking(multiple, max_rows) for multiple in MULTIPLES for max_rows in MAX_ROWS]
    for blocking in (*blocks, RowBlocking(1, 1)):
        if is_batch_invariant(weight, blocking):
            return blocking
    raise RuntimeError(
        f"no number of rows makes {dtype} products of {num_inputs}x{num_outputs} on {device} "
        f"batch-invariant, so tokens could depend on the placement; use another device, dtype or number of threads"
    )


def row_blocking(weight_OI: Tensor) -> RowBlocking:
    """Return the row blocking for products with `weight_OI` on the weight's device and PyTorch's number of threads."""
    outputs, inputs = weight_OI.shape
    return find_row_blocking(inputs, outputs, weight_OI.dtype, str(weight_OI.device), torch.get_num_threads())


def as_array(parameter: Tensor | None) -> NDArray[np.float32]:
    """Return a parameter as an fp32 array for compiled code; None becomes an array of length 0."""
    array: NDArray[np.float32] = np.zeros(0, np.float32) if parameter is None else parameter.detach().float().numpy()
    return array


class Linear(nn.Module):
    """A `Linear` is a linear layer; its weight has the checkpoint's shape (O, I) and is uninitialised until loading."""

    weight: nn.Parameter | None
    stored: StoredMatrix | None = None  # a weight in a quantized format, until `pack`
    packed: PackedMatrix | None = None
    kernel_params: tuple[
        PackedMatrixDescriptor, NDArray[np.float32]
    ]  # weight and bias as `cpu.layers` takes them; a bias of length 0 stands for no bias

    def __init__(self, num_inputs: int, num_outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if bias else None

    def take_bias(self) -> Tensor:
        assert self.bias is not None
        return self.bias.detach().float()

    def keep_stored(self, weight: StoredMatrix) -> None:
        """Use a weight in a quantized format, with which only `pack` can compute."""
        self.stored, self.weight = weight, None

    def take_weight(self) -> StoredMatrix:
        """Hand the loaded weight over to the caller, so that this layer no longer keeps the weight in memory."""
        if self.stored is not None:
            stored, self.stored = self.stored, None
            return stored
        assert self.weight is not None
        weight, self.weight = self.weight, None
        return StoredMatrix.plain(weight.detach())

    def pack(self) -> None:
        """Copy the weight into the CPU kernels' layout and free the original; `forward` then takes and returns fp32."""
        if self.weight is None and self.stored is None:
            return  # another layer has taken the weight and packs the weight as a part of a larger matrix
        self.packed = pack_matrix(self.take_weight())
        self.bias = None if self.bias is None else nn.Parameter(self.take_bias(), requires_grad=False)
        self.kernel_params = (self.packed.descriptor, as_array(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        y = linear(x, self.packed)
        return y if self.bias is None else y + self.bias
