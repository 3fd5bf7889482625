"""Matrix products whose rows do not depend on their company.

A library picks its kernel by the number of rows, and two kernels may add the same products in another order. So the
rows of one product can change in their last bits when other rows join. Rows padded to a multiple of `multiple` and cut
into blocks of at most `max_rows` rows always meet the same kernel; which numbers do that here is measured, not known.

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

from model.cpu.linear import Packed, Panels, linear, pack

MULTIPLES = (1, 2, 4, 8, 16, 32)
MAX_ROWS = (256, 128, 64, 32)


@dataclass(frozen=True)
class RowBlocking:
    """Row counts at which a product's rows are independent: multiples of `multiple`, at most `max_rows` at once."""

    multiple: int
    max_rows: int

    def padded(self, num_rows: int) -> int:
        return -(-num_rows // self.multiple) * self.multiple


def is_batch_invariant(weight_OI: Tensor, blocking: RowBlocking) -> bool:
    """Whether every row count of `blocking`, and every place in it, gives the rows of the full block, bit for bit."""
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
    """The cheapest blocking that holds for products of this shape here, found by trying (milliseconds to half a second).

    Raises RuntimeError if none does. `num_threads` is in the key because kernels are chosen by it too.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(device, dtype)
    for multiple in MULTIPLES:
        for max_rows in MAX_ROWS:
            if is_batch_invariant(weight, blocking := RowBlocking(multiple, max_rows)):
                return blocking
    raise RuntimeError(
        f"no row count from {MULTIPLES} makes {dtype} products of {num_inputs}x{num_outputs} on {device} independent of "
        f"their company, so the same tokens under any placement cannot be promised here"
    )


def row_blocking(weight_OI: Tensor) -> RowBlocking:
    outputs, inputs = weight_OI.shape
    return find_row_blocking(inputs, outputs, weight_OI.dtype, str(weight_OI.device), torch.get_num_threads())


def as_array(parameter: Tensor | None) -> NDArray[np.float32]:
    """A vector for compiled code, in fp32; nothing as one of length 0."""
    array: NDArray[np.float32] = np.zeros(0, np.float32) if parameter is None else parameter.detach().float().numpy()
    return array


class Linear(nn.Module):
    """A linear layer, weight (O, I) as in the checkpoint, uninitialised until it is loaded."""

    weight: nn.Parameter | None
    packed: Packed | None = None
    kernel_params: tuple[
        Panels, NDArray[np.float32]
    ]  # weight and bias (of length 0 where there is none) for `cpu.layers`

    def __init__(self, num_inputs: int, num_outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if bias else None

    def take_bias(self) -> Tensor:
        assert self.bias is not None
        return self.bias.detach().float()

    def take_weight(self) -> Tensor:
        """The loaded weight, which somebody else holds from now on."""
        assert self.weight is not None
        weight, self.weight = self.weight, None
        return weight.detach()

    def pack(self) -> None:
        """Lays the weight out for the CPU's kernels and lets go of the original; from then on fp32 in and out."""
        if self.weight is None:
            return  # part of a larger one
        self.packed = pack(self.take_weight())
        self.bias = None if self.bias is None else nn.Parameter(self.take_bias(), requires_grad=False)
        self.kernel_params = (self.packed.panels, as_array(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        y = linear(x, self.packed)
        return y if self.bias is None else y + self.bias
