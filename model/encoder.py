"""The encoder writes weights in the quantized formats, with the rounding of NVIDIA Model Optimizer.

Serving needs no encoder. The encoder makes the quantized variants of the demo model and of the tests' checkpoints.

Legend: O outputs (rows), I inputs (columns), G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from model.configs.weight_format import BLOCK, GROUP, WeightFormat, stored_parts
from model.stored_matrix import E2M1, StoredMatrix

MAX_E4M3, MAX_E2M1 = 448.0, 6.0
MIN_GROUP_SCALE = 2.0**-9  # the smallest e4m3 number above 0
E2M1_TIES = tuple((a + b) / 2 for a, b in pairwise(E2M1))  # between the codes 0 and 1, 1 and 2, …


def encode(weight_OI: Tensor, format: WeightFormat) -> StoredMatrix:
    """Return the weight in `format`; a plain weight keeps its dtype."""
    match format:
        case "plain":
            return StoredMatrix.plain(weight_OI)
        case "fp8":
            return encode_fp8(weight_OI)
        case "fp8_blocks":
            return encode_fp8_blocks(weight_OI)
        case "nvfp4":
            return encode_nvfp4(weight_OI)


def encode_fp8(weight_OI: Tensor) -> StoredMatrix:
    """Return e4m3 codes with one scale, so that the largest number has the code of 448."""
    weight = weight_OI.float()
    scale = _scale(weight.abs().amax(), MAX_E4M3)
    return StoredMatrix("fp8", ((weight / scale).to(torch.float8_e4m3fn), scale))


def encode_fp8_blocks(weight_OI: Tensor) -> StoredMatrix:
    """Return e4m3 codes with one scale for each block of BLOCK × BLOCK numbers; the last blocks may be smaller."""
    weight = weight_OI.float()
    rows, columns = weight.shape
    padding = (0, -columns % BLOCK, 0, -rows % BLOCK)
    blocks = torch.nn.functional.pad(weight.abs(), padding).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    grid = _scale(blocks.amax((1, 3)), MAX_E4M3)
    scales = grid.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return StoredMatrix("fp8_blocks", ((weight / scales).to(torch.float8_e4m3fn), grid))


def encode_nvfp4(weight_OI: Tensor) -> StoredMatrix:
    """Return e2m1 codes, an e4m3 scale for each GROUP columns, and one scale; ties go to the even code.

    Raises ValueError if the number of columns is not a multiple of GROUP.
    """
    rows, columns = weight_OI.shape
    stored_parts("nvfp4", rows, columns)  # raises ValueError if the format cannot hold the weight
    groups_OGI = weight_OI.float().unflatten(1, (-1, GROUP))
    scale = _scale(groups_OGI.abs().amax(), MAX_E4M3 * MAX_E2M1)
    largest_OG = groups_OGI.abs().amax(-1)
    wanted_OG = torch.where(largest_OG == 0, 1.0, largest_OG / (MAX_E2M1 * scale))
    group_scales_OG = wanted_OG.clamp(MIN_GROUP_SCALE, MAX_E4M3).to(torch.float8_e4m3fn)
    numbers_OI = (groups_OGI / (group_scales_OG.float() * scale)[..., None]).flatten(1)
    codes_OI = _e2m1_codes(numbers_OI)
    return StoredMatrix("nvfp4", (codes_OI[:, 0::2] | codes_OI[:, 1::2] << 4, group_scales_OG, scale))


def _scale(largest: Tensor, maximum: float) -> Tensor:
    """Return the scale with which the number `largest` has the code of `maximum`; 1 where all numbers are 0."""
    return torch.where(largest == 0, 1.0, largest / maximum)


def _e2m1_codes(numbers: Tensor) -> Tensor:
    """Return the codes of the nearest e2m1 numbers as uint8; a tie goes to the even code."""
    sizes, ties = numbers.abs(), torch.tensor(E2M1_TIES)
    codes = torch.bucketize(sizes, ties)  # a tie gets the lower code …
    codes += (sizes[..., None] == ties[1::2]).any(-1).long()  # … unless the lower code is odd
    return (codes + 8 * (numbers < 0)).to(torch.uint8)


def linear_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the modules in layers that have a matrix as their weight."""
    names = (name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and ".layers." in f".{name}")
    return sorted(name for name in names if tensors[f"{name}.weight"].dim() == 2)


def encode_tensors(tensors: Mapping[str, Tensor], formats: Mapping[str, WeightFormat]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint with the weights of the modules in `formats` encoded, and their scales added.

    `formats` has a weight format by the module's name; the tensors of other modules are returned as they are.
    """
    encoded = dict(tensors)
    for module, format in formats.items():
        matrix = encode(tensors[f"{module}.weight"], format)
        for part, tensor in zip(stored_parts(format, *matrix.shape), matrix.parts, strict=True):
            encoded[f"{module}.{part.suffix}"] = tensor.contiguous()
    return encoded
