"""A `PackedMatrix` holds a weight in a layout for batch-invariant products.

The products run at the speed of the memory or of the FMA units. What surprises: every output is one chain of fused
multiply-adds in fp32, from the first input to the last. So a row's bits do not depend on the number of rows, on the
row's position or on the number of threads: the bits are the same alone and among 2,048 other rows. The fixed order
costs no speed, because the lanes of a vector are different outputs rather than different inputs.

Layout: a panel holds the weights of 32 outputs; `model.cpu.panel_tiles` describes the panels. Weights stay in memory as
they are stored: bf16 as bf16, FP8 and NVFP4 as codes with scales. They become fp32 numbers in registers, the same
numbers as in the dequantized matrix, so a quantized weight gives the same bits as its dequantized copy.

Legend: N rows, I inputs, O outputs, P panels of 32 outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from model.configs.weight_format import BLOCK, WeightFormat, fills_words
from model.cpu.panel_products import product_address
from model.cpu.panel_tiles import E2M1_GROUP, E4M3_GROUP, PANEL, Kind
from model.stored_matrix import StoredMatrix

log = logging.getLogger(__name__)

PANELS_PER_BLOCK = BLOCK // PANEL
MAX_SCALE = 2.0**90  # the kernels multiply scales by up to 2**22, which must not overflow


class PackedMatrixDescriptor(NamedTuple):
    """A `PackedMatrixDescriptor` tells compiled code the addresses and the sizes of a `PackedMatrix`."""

    product: int  # address of the compiled function that multiplies by the panels
    panels: int
    scales: int
    num_inputs: int
    num_outputs: int
    padded_outputs: int


@dataclass(frozen=True)
class PackedMatrix:
    """A `PackedMatrix` holds a weight (O, I) in panels of 32 outputs, and the scales that are not in the panels.

    | kind | `panels` | `scales` |
    |---|---|---|
    | fp32 | int32 (P, I, 32) | none |
    | bf16 | int32 (P, I/2, 32), two numbers in a word | none |
    | e4m3 | int16 (P, I/2, 32), two codes in a word | fp32 (P, G) |
    | e2m1 | int16 (P, G, 16 + 4·32), 32 scales of a group and its codes, four in a word | fp32 (1,) |

    A quantized weight has the kind fp32 if no kernel can compute with its codes; the codes are then not kept.
    """

    kind: Kind
    format: WeightFormat
    panels: Tensor
    scales: Tensor
    num_inputs: int
    num_outputs: int

    @property
    def has_stored_bits(self) -> bool:
        """Return True if `unpack_matrix` can return the weight bit for bit."""
        return self.format == "plain" or self.kind != "fp32"

    @cached_property
    def descriptor(self) -> PackedMatrixDescriptor:
        addresses = product_address(self.kind), self.panels.data_ptr(), self.scales.data_ptr()
        return PackedMatrixDescriptor(*addresses, self.num_inputs, self.num_outputs, len(self.panels) * PANEL)

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that the matrix takes."""
        return self.panels.nbytes + self.scales.nbytes


def compile_products(formats: Iterable[WeightFormat], dtype: torch.dtype) -> None:
    """Compile the products for weights of `formats`, so that packing a weight later does not; plain ones have `dtype`.

    A function compiles in about a second, or is read from the disk if it was compiled before.
    """
    for format in formats:
        product_address(_usual_kind(format, dtype))


def pack_matrix(weight: StoredMatrix) -> PackedMatrix:
    """Copy a weight (O, I) into panels of the numbers or codes in which the weight is stored.

    If no kernel can compute with the stored numbers (see `_kind`), the panels hold the dequantized weight as fp32, and
    the log gives the reason.
    """
    num_outputs, num_inputs = weight.shape
    kind = _kind(weight)
    numbers, scales = weight.parts[0].detach(), torch.empty(0)
    match kind:
        case "fp32":
            panels = _to_panels(weight.dequantized().detach().float().view(torch.int32))
        case "bf16":
            panels = _to_panels(numbers.contiguous().view(torch.int32))
        case "e4m3":
            panels = _to_panels(numbers.contiguous().view(torch.uint8).view(torch.int16))
            grid, num_groups = weight.parts[1].float(), -(-num_inputs // E4M3_GROUP)
            rows = grid.reshape(1, 1) if weight.format == "fp8" else grid.repeat_interleave(PANELS_PER_BLOCK, 0)
            scales = rows[: len(panels)].expand(len(panels), num_groups).contiguous()
        case "e2m1":
            codes = _to_panels(numbers.contiguous().view(torch.int16)).view(-1, num_inputs // E2M1_GROUP, 4 * PANEL)
            _, group_scales, scale = weight.parts
            panels, scales = torch.cat([_to_scale_words(group_scales), codes], dim=2), scale.float().reshape(1).clone()
    return PackedMatrix(kind, weight.format, panels, scales, num_inputs, num_outputs)


def unpack_matrix(packed: PackedMatrix) -> StoredMatrix:
    """Return the weight that `packed` was made of, bit for bit; plain numbers are fp32 if the panels hold fp32.

    `packed.has_stored_bits` must be True.
    """
    assert packed.has_stored_bits
    panels, num_outputs = packed.panels, packed.num_outputs
    match packed.kind:
        case "fp32":
            return StoredMatrix.plain(_from_panels(panels, num_outputs).view(torch.float32))
        case "bf16":
            return StoredMatrix.plain(_from_panels(panels, num_outputs).view(torch.bfloat16))
        case "e4m3":
            codes = _from_panels(panels, num_outputs).view(torch.float8_e4m3fn)
            is_one_scale = packed.format == "fp8"
            scales = packed.scales[0, 0] if is_one_scale else packed.scales[::PANELS_PER_BLOCK]
            return StoredMatrix(packed.format, (codes, scales.clone()))
        case "e2m1":
            words, codes = panels.split([PANEL // 2, 4 * PANEL], dim=2)
            codes = _from_panels(codes.reshape(len(panels), -1, PANEL), num_outputs).view(torch.uint8)
            return StoredMatrix("nvfp4", (codes, _from_scale_words(words, num_outputs), packed.scales[0].clone()))


def _kind(weight: StoredMatrix) -> Kind:
    """Return the kind of panels that give the same products as the dequantized weight."""
    kind = _usual_kind(weight.format, weight.parts[0].dtype)
    reason = None if kind == "fp32" else _reason_for_fp32(weight)
    if reason is None:
        return kind
    _log_fp32("bf16" if weight.format == "plain" else weight.format, reason)
    return "fp32"


def _reason_for_fp32(weight: StoredMatrix) -> str | None:
    """Return why the kernels cannot compute with the stored numbers of a weight; None if they can.

    An odd number of inputs does not fill the words of bf16 and FP8. Scales of 2**90 or more would overflow in the
    kernels, and the kernels do not know the codes that mean NaN.
    """
    if not fills_words(weight.shape[1]):
        return "an odd number of inputs"
    if weight.format == "plain":
        return None
    codes, scales = weight.parts[-2], weight.parts[-1]  # in NVFP4, the codes of the groups' scales
    if bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any()):
        return "a code that means NaN"
    return None if bool((scales.abs() < MAX_SCALE).all()) else "a scale that is not below 2**90"


@cache
def _log_fp32(format: str, reason: str) -> None:
    """Log once that weights of `format` take the memory of fp32 numbers because of `reason`."""
    text = "Weights in %s with %s are kept in fp32, which takes more memory: no CPU kernel computes with such weights."
    log.warning(text, format, reason)


def _usual_kind(format: WeightFormat, dtype: torch.dtype) -> Kind:
    """Return the kind of panels that hold weights of `format`; plain numbers have `dtype`."""
    if format == "plain":
        return "bf16" if dtype == torch.bfloat16 else "fp32"
    return "e2m1" if format == "nvfp4" else "e4m3"


def _to_panels(words_OW: Tensor) -> Tensor:
    """Return the rows of words in panels: (O, W) -> (P, W, 32); missing outputs are zeros."""
    num_outputs, num_words = words_OW.shape
    num_missing = -num_outputs % PANEL
    if num_missing:
        words_OW = torch.cat([words_OW, words_OW.new_zeros(num_missing, num_words)])
    return words_OW.view(-1, PANEL, num_words).transpose(1, 2).contiguous()


def _from_panels(panels: Tensor, num_outputs: int) -> Tensor:
    """Return the words that `_to_panels` put into panels: (P, W, 32) -> (O, W)."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:num_outputs].contiguous()


def _to_scale_words(scales_OG: Tensor) -> Tensor:
    """Return the scales of each group as 16 words, output j with output 16 + j: e4m3 (O, G) -> int16 (P, G, 16)."""
    codes_OG = scales_OG.contiguous().view(torch.uint8)
    codes_OG = torch.cat([codes_OG, codes_OG.new_zeros(-len(codes_OG) % PANEL, codes_OG.shape[1])])
    pairs = codes_OG.view(-1, 2, PANEL // 2, codes_OG.shape[1]).permute(0, 3, 2, 1).contiguous()
    return pairs.view(torch.int16).squeeze(3)


def _from_scale_words(words: Tensor, num_outputs: int) -> Tensor:
    """Return the scales that `_to_scale_words` put into words: int16 (P, G, 16) -> e4m3 (O, G)."""
    pairs = words.unsqueeze(3).contiguous().view(torch.uint8)
    codes_OG = pairs.permute(0, 3, 2, 1).reshape(-1, words.shape[1])[:num_outputs].contiguous()
    return codes_OG.view(torch.float8_e4m3fn)
