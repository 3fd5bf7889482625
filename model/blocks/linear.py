"""Matrix products whose rows do not depend on their company.

A library picks its kernel by the number of rows, and two kernels may add the same products in another order. So the
rows of one product can change in their last bits when other rows join. Rows padded to a multiple of `quantum` and cut
into blocks of at most `limit` rows always meet the same kernel; which numbers do that here is measured, not known.

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

QUANTA = (1, 2, 4, 8, 16, 32)
LIMITS = (256, 128, 64, 32)


@dataclass(frozen=True)
class RowPlan:
    """Row counts at which a product's rows are independent: multiples of `quantum`, at most `limit` at once."""

    quantum: int
    limit: int

    def padded(self, num_rows: int) -> int:
        return -(-num_rows // self.quantum) * self.quantum


def is_row_invariant(weight_OI: Tensor, plan: RowPlan) -> bool:
    """Whether every row count of `plan`, and every place in it, gives the rows of the full block, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(plan.limit, weight_OI.shape[1], generator=generator).to(weight_OI)
    full_NO = F.linear(x_NI, weight_OI)
    return all(
        torch.equal(F.linear(x_NI[:n], weight_OI), full_NO[:n])
        and torch.equal(F.linear(x_NI[-n:].flip(0), weight_OI), full_NO[-n:].flip(0))
        for n in range(plan.quantum, plan.limit + 1, plan.quantum)
    )


@cache
def find_row_plan(num_inputs: int, num_outputs: int, dtype: torch.dtype, device: str, num_threads: int) -> RowPlan:
    """The cheapest plan that holds for products of this shape here, found by trying (milliseconds to half a second).

    Raises RuntimeError if none does. `num_threads` is in the key because kernels are chosen by it too.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(device, dtype)
    for quantum in QUANTA:
        for limit in LIMITS:
            if is_row_invariant(weight, plan := RowPlan(quantum, limit)):
                return plan
    raise RuntimeError(
        f"no row count from {QUANTA} makes {dtype} products of {num_inputs}x{num_outputs} on {device} independent of "
        f"their company, so the same tokens under any placement cannot be promised here"
    )


def row_plan(weight_OI: Tensor) -> RowPlan:
    outputs, inputs = weight_OI.shape
    return find_row_plan(inputs, outputs, weight_OI.dtype, str(weight_OI.device), torch.get_num_threads())


def as_array(parameter: Tensor | None) -> NDArray[np.float32]:
    """A vector for compiled code, in fp32; nothing as one of length 0."""
    array: NDArray[np.float32] = np.zeros(0, np.float32) if parameter is None else parameter.detach().float().numpy()
    return array


class Linear(nn.Module):
    """A linear layer, weight (O, I) as in the checkpoint, uninitialised until it is loaded."""

    weight: nn.Parameter | None
    packed: Packed | None = None
    compiled: tuple[Panels, NDArray[np.float32]]  # weight and bias (of length 0 where there is none) for `cpu.layers`

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
        self.compiled = (self.packed.panels, as_array(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        y = linear(x, self.packed)
        return y if self.bias is None else y + self.bias
