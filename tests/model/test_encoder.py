"""The tests compare encoded weights with the definitions of the formats, and with numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from model.configs.weight_format import FORMATS, WeightFormat, stored_parts
from model.encoder import encode, encode_fp8, encode_fp8_blocks, encode_nvfp4
from model.stored_matrix import E2M1, StoredMatrix
from tests.model.steps import seeded

VALUES = torch.tensor([*E2M1, *(-value for value in E2M1)])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(40, 64), (152, 320), (1, 16), (129, 144)], ids=str)
def test_encoded_weights_have_the_format_s_tensors(format: WeightFormat, shape: tuple[int, int]) -> None:
    matrix = encode(seeded(0)(*shape), format)
    parts = stored_parts(format, *shape)
    assert matrix.shape == shape
    assert [part.shape for part in matrix.parts] == [part.shape for part in parts]
    assert matrix.nbytes == sum(part.nbytes(torch.float32) for part in parts)


def error(matrix: StoredMatrix, weight: torch.Tensor) -> torch.Tensor:
    return (matrix.dequantized() - weight).abs()


def test_fp8_is_within_half_a_step() -> None:
    """Check that an e4m3 number with 3 bits of mantissa is off by at most 1/16 of itself, or by half the least step."""
    weight = seeded(1)(200, 300)
    scale = weight.abs().max() / 448
    assert (error(encode_fp8(weight), weight) <= (weight.abs() / 16).clamp(min=scale * 2.0**-10) * 1.001).all()
    assert encode_fp8(weight).dequantized().abs().max() == pytest.approx(float(weight.abs().max()))


def test_each_block_has_a_scale_of_its_own() -> None:
    weight = seeded(2)(200, 300)
    weight[128:, 256:] *= 1e-6  # the last block, of 72 × 44 numbers
    weight[:128, 128:256] *= 1e6
    blocks = encode_fp8_blocks(weight)
    assert (error(blocks, weight) <= weight.abs() / 16 + 1e-10).float().mean() > 0.98
    assert blocks.parts[1].shape == (2, 3)
    for row, column in ((0, 1), (1, 2)):
        block = weight[128 * row :, 128 * column :][:128, :128]
        assert blocks.parts[1][row, column] == block.abs().max() / 448


def test_nvfp4_takes_the_nearest_number() -> None:
    """Check every code against all 16 numbers that the code's group could hold."""
    weight = seeded(3)(24, 96)
    matrix = encode_nvfp4(weight)
    _, group_scales, scale = matrix.parts
    steps = (group_scales.float() * scale).repeat_interleave(16, 1)
    best = (VALUES * steps[..., None] - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close(error(matrix, weight), best, rtol=1e-5, atol=1e-7)


def test_nvfp4_rounds_ties_to_even_codes() -> None:
    """Check ties between neighbours, the order of the two codes in a byte, and the signs; both scales are 1."""
    row = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0]
    anchor = [0.0] * 15 + [6.0 * 448]  # makes the matrix's scale 1 and the group's scale 448
    codes, group_scales, scale = encode_nvfp4(torch.tensor([row, anchor])).parts
    assert (float(scale), group_scales.flatten().tolist()) == (1.0, [1.0, 448.0])
    assert codes[0].tolist() == [0x07, 0x22, 0x44, 0x66, 0x8F, 0xAA, 0xCC, 0xEE]
    assert codes[1].tolist() == [0] * 7 + [0x70]
    expected = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -6.0, 0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]
    assert encode_nvfp4(torch.tensor([row, anchor])).dequantized()[0].tolist() == expected


def test_zeros_stay_zeros() -> None:
    for format in FORMATS:
        matrix = encode(torch.zeros(130, 32), format)
        assert torch.equal(matrix.dequantized(), torch.zeros(130, 32))
        assert all(part.float().isfinite().all() for part in matrix.parts)
    weight = torch.ones(1, 48)
    weight[:, 16:32] = 0
    weight[:, 32:] = 1e-9  # the group's scale would be 0 in e4m3
    _, group_scales, _ = encode_nvfp4(weight).parts
    assert group_scales.flatten().tolist() == [448.0, 1.0, 2.0**-9]


def test_rows_that_do_not_fit_nvfp4_are_refused() -> None:
    with pytest.raises(ValueError, match="NVFP4 needs rows of a multiple of 16 numbers, not of 24"):
        encode_nvfp4(torch.zeros(4, 24))
