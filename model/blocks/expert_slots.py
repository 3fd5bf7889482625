"""`ExpertSlots` are memory for experts with dequantized matrices, on a GPU or, in plain PyTorch, on a CPU.

All slots are in one tensor, which is allocated once. `model/configs/expert_memory.py` gives the reason.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from model.configs.expert_memory import dequantized_sizes, slot_offsets
from model.configs.expert_shape import ExpertShape


class ExpertSlots:
    """`ExpertSlots` hand out slots of equal size in the memory of a device; any thread may call the methods.

    Raises RuntimeError with one sentence if the device does not have the memory.
    """

    def __init__(self, slot_bytes: int, num_slots: int, device: torch.device) -> None:
        self.slot_bytes, self.num_slots = slot_bytes, num_slots
        try:
            self._memory = torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError for CUDA, and RuntimeError for a CPU
            needed = f"{num_slots:,} experts of {slot_bytes:,} bytes"
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RuntimeError(f"{device} has no memory for {needed}; lower memory_budget ({why})") from error
        self._free = deque(range(num_slots))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Return the number of a free slot, which is then in use until `give_back`; one slot must be free."""
        return self._free.popleft()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def matrices(self, slot: int, shape: ExpertShape, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return an expert's matrices (rows, columns) in `slot`, in the order of `ExpertShape.matrices`."""
        sizes = dequantized_sizes(shape, dtype)
        offsets = slot_offsets(sizes)
        assert offsets[-1] <= self.slot_bytes
        start = slot * self.slot_bytes
        return tuple(
            self._memory.narrow(0, start + offset, size).view(dtype).view(matrix.rows, matrix.columns)
            for matrix, offset, size in zip(shape.matrices, offsets, sizes, strict=False)
        )
