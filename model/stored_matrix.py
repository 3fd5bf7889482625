"""A `StoredMatrix` is a weight as a checkpoint stores it: plain numbers, or quantized codes with their scales.

Legend: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.configs.weight_format import BLOCK, GROUP, PartDtype, WeightFormat, stored_parts

CODE_DTYPES: dict[PartDtype, torch.dtype] = {
    "e4m3": torch.float8_e4m3fn,
    "float32": torch.float32,
    "uint8": torch.uint8,
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # values of the codes 0 to 7; the codes 8 to 15 are their negatives


@dataclass(frozen=True)
class StoredMatrix:
    """A `StoredMatrix` holds a weight (O, I) in the tensors that `stored_parts` names, in this order."""

    format: WeightFormat
    parts: tuple[Tensor, ...]

    @classmethod
    def plain(cls, weight_OI: Tensor) -> StoredMatrix:
        """Return a matrix of plain numbers."""
        return cls("plain", (weight_OI,))

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of rows and the number of columns."""
        rows, columns = self.parts[0].shape
        return rows, 2 * columns if self.format == "nvfp4" else columns

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> StoredMatrix:
        """Return a contiguous matrix on `device`; plain numbers are converted to `dtype`, quantized ones are kept."""
        if self.format == "plain":
            return StoredMatrix.plain(self.parts[0].to(device, dtype).contiguous())
        return StoredMatrix(self.format, tuple(part.to(device).contiguous() for part in self.parts))

    def dequantized(self) -> Tensor:
        """Return the weight (O, I): quantized numbers as fp32, plain numbers as they are stored.

        Each quantized number is code · scale, rounded once to fp32. The scale of a number in NVFP4 is the product of
        the group's scale and the matrix's scale, rounded to fp32.
        """
        match self.format:
            case "plain":
                return self.parts[0]
            case "fp8":
                codes, scale = self.parts
                return codes.float() * scale.float().reshape(())
            case "fp8_blocks":
                codes, grid = self.parts
                rows, columns = codes.shape
                scales = grid.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
                return codes.float() * scales
            case "nvfp4":
                codes, group_scales, scale = self.parts
                values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
                nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)  # the low nibble is the even column
                scales = group_scales.float() * scale.float().reshape(())
                return values[nibbles.int()] * scales.repeat_interleave(GROUP, 1)

    def views(self) -> list[memoryview]:
        """Return the bytes of the parts, which must be contiguous and on the CPU, in order."""
        return [memoryview(part.reshape(-1).view(torch.uint8).numpy()) for part in self.parts]  # type: ignore[arg-type]


def matrix_from_bytes(
    data: memoryview, format: WeightFormat, shape: tuple[int, int], dtype: torch.dtype
) -> StoredMatrix:
    """Return the matrix of `shape` whose bytes are `data`, in the order of `views`; plain numbers have `dtype`.

    The matrix shares the memory of `data`, except for parts that begin at an address that torch cannot read.
    """
    parts: list[Tensor] = []
    start = 0
    for part in stored_parts(format, *shape):
        own = dtype if part.dtype == "plain" else CODE_DTYPES[part.dtype]
        raw = torch.frombuffer(data, dtype=torch.uint8, count=part.nbytes(dtype), offset=start)
        start += len(raw)
        aligned = raw if raw.data_ptr() % own.itemsize == 0 else raw.clone()
        parts.append(aligned.view(own).view(part.shape))
    return StoredMatrix(format, tuple(parts))


def concatenated(matrices: Sequence[StoredMatrix]) -> Tensor:
    """Return the rows of all `matrices` as one weight, dequantized where necessary."""
    return torch.cat([matrix.dequantized() for matrix in matrices])
