"""A weight format says which tensors of a checkpoint hold one matrix, and how many bytes these tensors have.

The formats are those of the public checkpoints:

- `plain`: the matrix's numbers as bf16, fp16 or fp32. They are served in the dtype of the deployment.
- `fp8`: one e4m3 code per number, and one fp32 scale for the matrix (NVIDIA Model Optimizer, FP8).
- `fp8_blocks`: one e4m3 code per number, and one fp32 scale for each block of 128 × 128 numbers (DeepSeek, Qwen). The
  last blocks of a row or a column may be smaller.
- `nvfp4`: two e2m1 codes per byte, one e4m3 scale for each 16 numbers of a row, and one fp32 scale for the matrix
  (NVIDIA Model Optimizer, NVFP4 and W4A16_NVFP4).

Quantized matrices are served as they are stored: in the same bytes, whatever the dtype of the deployment.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Literal, Protocol, get_args

WeightFormat = Literal["plain", "fp8", "fp8_blocks", "nvfp4"]
FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
PartDtype = Literal["plain", "e4m3", "float32", "uint8"]

BLOCK = 128  # rows and columns that share a scale in fp8_blocks
GROUP = 16  # columns that share a scale in nvfp4


class NumberType(Protocol):
    """A `NumberType` is the type of plain numbers, for example a `torch.dtype`."""

    @property
    def itemsize(self) -> int:
        """Return the size of one number in bytes."""


@dataclass(frozen=True)
class StoredPart:
    """A `StoredPart` describes one of the tensors that hold a matrix.

    `suffix` follows the name of the matrix's module in the checkpoint, for example "weight_scale".
    """

    suffix: str
    dtype: PartDtype
    shape: tuple[int, ...]

    def nbytes(self, plain: NumberType) -> int:
        """Return the part's size in bytes if plain numbers have the type `plain`."""
        itemsize = {"plain": plain.itemsize, "e4m3": 1, "float32": 4, "uint8": 1}[self.dtype]
        return prod(self.shape) * itemsize


def stored_parts(format: WeightFormat, rows: int, columns: int) -> tuple[StoredPart, ...]:
    """Return the tensors that hold a matrix (rows, columns): first the numbers or codes, then the scales.

    Raises ValueError if the format cannot hold a matrix of this shape.
    """
    match format:
        case "plain":
            return (StoredPart("weight", "plain", (rows, columns)),)
        case "fp8":
            return StoredPart("weight", "e4m3", (rows, columns)), StoredPart("weight_scale", "float32", ())
        case "fp8_blocks":
            grid = (ceil(rows / BLOCK), ceil(columns / BLOCK))
            return StoredPart("weight", "e4m3", (rows, columns)), StoredPart("weight_scale_inv", "float32", grid)
        case "nvfp4":
            if columns % GROUP:
                raise ValueError(f"NVFP4 needs rows of a multiple of {GROUP} numbers, not of {columns}")
            return (
                StoredPart("weight", "uint8", (rows, columns // 2)),
                StoredPart("weight_scale", "e4m3", (rows, columns // GROUP)),
                StoredPart("weight_scale_2", "float32", ()),
            )


def fills_words(columns: int) -> bool:
    """Return True if a row of `columns` numbers fills the words in which the CPU kernels read bf16 and FP8.

    A word holds two numbers. Rows that do not fill their words are kept in fp32.
    """
    return columns % 2 == 0


def matrix_bytes(format: WeightFormat, rows: int, columns: int, plain: NumberType) -> int:
    """Return the bytes of a matrix (rows, columns) with its scales, if plain numbers have the type `plain`."""
    return sum(part.nbytes(plain) for part in stored_parts(format, rows, columns))
