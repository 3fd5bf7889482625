"""`ExpertMemory` says how many bytes one expert takes on a shard, in device memory and as a standby in host memory.

The shards, the planner, the capacity check and `expertmesh size` all take their figures from `expert_memory`.

| a shard that computes with | device memory | host memory of a standby |
|---|---|---|
| the CPU kernels | the stored bytes; fp32 if the number of inputs is odd | the stored bytes |
| CUDA | one slot: the dequantized matrices | an equal part of a pinned slab |
| plain PyTorch on a CPU | one slot: the dequantized matrices | the stored bytes |

Slots and slabs exist because torch's allocators reserve more memory than a tensor has bytes. For CUDA, a tensor of 1 to
10 MiB takes a part of a segment of 20 MiB, so that three matrices of 5.25 MiB fill a segment. Page-locked (pinned) host
memory comes in powers of two. Therefore all slots of a device are in one large tensor, and pinned slabs are powers of
two. tests/cuda_allocators.py models both allocators, and compares the constants with the headers of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from model.configs.expert_shape import ExpertShape
from model.configs.weight_format import NumberType, fills_words, stored_parts

# Tensors in a slot start at multiples of this number of bytes, as tensors from torch's allocator for CUDA do.
ALIGNMENT = 512
FP32_BYTES = 4
PINNED_SLAB = 2 << 30  # bytes of one allocation of page-locked memory; large, so that little is left beside the slots


@dataclass(frozen=True)
class ExpertMemory:
    """An `ExpertMemory` holds the bytes that one expert takes on a shard: on the device, and as a standby."""

    device: int
    host: int


def expert_memory(
    shapes: Iterable[ExpertShape], plain: NumberType, *, is_packed: bool, is_pinned: bool
) -> dict[int, ExpertMemory]:
    """Return the memory that one expert of each layer takes on a shard, by layer.

    - `plain`: the type of plain numbers, to which a shard without packed weights also dequantizes the other numbers.
    - `is_packed`: True if the shard computes with the stored numbers where it can, as the CPU kernels do.
    - `is_pinned`: True if standbys are in page-locked memory, which is so if the device is a GPU.
    """
    shapes = tuple(shapes)
    slot = max((slot_bytes(shape, plain) for shape in shapes), default=0)
    return {
        shape.layer: ExpertMemory(
            device=packed_bytes(shape, plain) if is_packed else slot,
            host=pinned_bytes(stored_sizes(shape, plain)) if is_pinned else shape.nbytes(plain),
        )
        for shape in shapes
    }


def slot_offsets(sizes: Iterable[int]) -> list[int]:
    """Return where tensors of `sizes` bytes start in a slot, and at last the bytes of the slot."""
    return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))


def dequantized_sizes(shape: ExpertShape, plain: NumberType) -> list[int]:
    """Return the bytes of each of an expert's matrices if all numbers have the type `plain`."""
    return [matrix.rows * matrix.columns * plain.itemsize for matrix in shape.matrices]


def packed_bytes(shape: ExpertShape, plain: NumberType) -> int:
    """Return the bytes of one expert for the CPU kernels, which keep matrices with an odd number of inputs in fp32."""
    return sum(
        matrix.nbytes(plain) if fills_words(matrix.columns) else FP32_BYTES * matrix.rows * matrix.columns
        for matrix in shape.matrices
    )


def stored_sizes(shape: ExpertShape, plain: NumberType) -> list[int]:
    """Return the bytes of each of the tensors that store an expert."""
    return [
        part.nbytes(plain)
        for matrix in shape.matrices
        for part in stored_parts(matrix.format, matrix.rows, matrix.columns)
    ]


def slot_bytes(shape: ExpertShape, plain: NumberType) -> int:
    """Return the bytes of device memory that one expert with dequantized matrices takes."""
    return slot_offsets(dequantized_sizes(shape, plain))[-1]


def pinned_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes of page-locked memory that an expert takes whose stored tensors have `sizes` bytes."""
    slot = slot_offsets(sizes)[-1]
    slab = max(PINNED_SLAB, 1 << (slot - 1).bit_length())
    return slab // (slab // slot)
