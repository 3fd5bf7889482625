"""The functions here make weights in every stored format, with codes and scales that are hard to compute with."""

from __future__ import annotations

import torch
from torch import Tensor

from model.configs.weight_format import BLOCK, GROUP, WeightFormat, stored_parts
from model.stored_matrix import StoredMatrix

QUANTIZED: tuple[WeightFormat, ...] = ("fp8", "fp8_blocks", "nvfp4")


def random_codes(*shape: int, generator: torch.Generator) -> Tensor:
    """Return random e4m3 codes, every code with the same probability except the two that mean NaN."""
    codes = torch.randint(0, 254, shape, generator=generator)
    return torch.where(codes < 127, codes, codes + 1).to(torch.uint8).view(torch.float8_e4m3fn)


def random_matrix(format: WeightFormat, rows: int, columns: int, seed: int = 0, scale: float = 0.01) -> StoredMatrix:
    """Return a weight with random codes; `scale` is about the size of its scales, some of which are negative."""
    generator = torch.Generator().manual_seed(seed)
    if format == "plain":
        return StoredMatrix.plain(torch.randn(rows, columns, generator=generator))
    shapes = [part.shape for part in stored_parts(format, rows, columns)]
    scales = scale * torch.randn(shapes[-1], generator=generator)
    if format == "nvfp4":
        codes = torch.randint(0, 256, shapes[0], generator=generator).to(torch.uint8)
        return StoredMatrix(format, (codes, random_codes(*shapes[1], generator=generator), scales))
    return StoredMatrix(format, (random_codes(*shapes[0], generator=generator), scales))


def with_all_codes(format: WeightFormat) -> StoredMatrix:
    """Return a quantized weight that has every code in each of its rows, and in NVFP4 also every group scale."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    turned = torch.stack([codes.roll(shift) for shift in range(40)])
    if format == "nvfp4":
        columns = GROUP * len(codes)
        pairs = torch.arange(columns // 2, dtype=torch.uint8).repeat(40, 1)
        return StoredMatrix(format, (pairs, turned.view(torch.float8_e4m3fn), torch.tensor(0.037)))
    grid = torch.tensor(0.037) if format == "fp8" else torch.tensor([[0.037, -1.7]])
    assert BLOCK < len(codes) <= 2 * BLOCK
    return StoredMatrix(format, (turned.view(torch.float8_e4m3fn), grid))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors have the same dtype, shape and bits, which tells -0 from 0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
