"""The tests check that packed quantized weights give the bits of their dequantized copies, and that no bit is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.configs.weight_format import FORMATS, WeightFormat
from model.cpu import packed_matrix
from model.cpu.linear import linear
from model.cpu.packed_matrix import MAX_SCALE, pack_matrix, unpack_matrix
from model.cpu.panel_tiles import PANEL
from model.stored_matrix import StoredMatrix
from tests.model.steps import relative_error, seeded
from tests.model.stored_matrices import QUANTIZED, random_matrix, same_bits, with_all_codes

NUMS_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 23, 32, 100)
SHAPES = ((64, 256), (1, 16), (33, 128), (100, 144), (300, 1040), (130, 528))
UNEVEN = ((64, 130), (40, 1), (129, 383), (70, 1026))


def dequantized(weight: StoredMatrix) -> StoredMatrix:
    return StoredMatrix.plain(weight.dequantized().float())


def rows_for(num_rows: int, num_inputs: int) -> Tensor:
    """Return rows with numbers of very different sizes, zeros of both signs among them."""
    randn = seeded(num_rows)
    x = randn(num_rows, num_inputs) * torch.exp2(20 * randn(num_rows, num_inputs))
    x[randn(num_rows, num_inputs) > 1.5] = 0.0
    x[randn(num_rows, num_inputs) > 1.5] = -0.0
    return x


def assert_same_products(weight: StoredMatrix) -> None:
    packed, copy = pack_matrix(weight), pack_matrix(dequantized(weight))
    for num_rows in NUMS_ROWS:
        x = rows_for(num_rows, weight.shape[1])
        assert same_bits(linear(x, packed), linear(x, copy)), (weight.format, weight.shape, num_rows)


def assert_same_parts(one: StoredMatrix, other: StoredMatrix) -> None:
    assert one.format == other.format
    assert all(same_bits(*parts) for parts in zip(one.parts, other.parts, strict=True))


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_weights_give_the_bits_of_dequantized_ones(format: WeightFormat, shape: tuple[int, int]) -> None:
    assert_same_products(random_matrix(format, *shape))


@pytest.mark.parametrize("format", ["fp8", "fp8_blocks"])
@pytest.mark.parametrize("shape", UNEVEN, ids=str)
def test_inputs_that_fill_no_word_or_no_block_give_the_same_bits(format: WeightFormat, shape: tuple[int, int]) -> None:
    assert_same_products(random_matrix(format, *shape))


@pytest.mark.parametrize("format", QUANTIZED)
def test_every_code_gives_the_same_bits(format: WeightFormat) -> None:
    assert_same_products(with_all_codes(format))


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-36, 1e-30, 0.0, 2.0**80, 2.0**92, 2.0**118], ids=str)
def test_tiny_and_huge_scales_give_the_same_bits(format: WeightFormat, scale: float) -> None:
    weight = random_matrix(format, 40, 144, scale=scale)
    assert_same_products(weight)
    packed = pack_matrix(weight)
    assert packed.has_stored_bits == (scale < MAX_SCALE)
    if packed.has_stored_bits:
        assert_same_parts(unpack_matrix(packed), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *UNEVEN], ids=str)
def test_plain_weights_give_the_bits_of_fp32(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = StoredMatrix.plain(random_matrix("plain", *shape).parts[0].to(dtype))
    assert_same_products(weight)
    x = seeded(1)(9, shape[1])
    assert relative_error(linear(x, pack_matrix(weight)), x.double() @ weight.parts[0].double().T) < 1e-5


@pytest.mark.parametrize("format", QUANTIZED)
def test_products_are_near_those_in_float64(format: WeightFormat) -> None:
    weight, x = random_matrix(format, 100, 528), seeded(1)(9, 528)
    assert relative_error(linear(x, pack_matrix(weight)), x.double() @ weight.dequantized().double().T) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [*SHAPES, (192, 272)], ids=str)
def test_a_weight_comes_back_bit_for_bit(format: WeightFormat, shape: tuple[int, int]) -> None:
    weight = random_matrix(format, *shape)
    packed = pack_matrix(weight)
    assert_same_parts(unpack_matrix(packed), weight)


@pytest.mark.parametrize("format", ["fp8", "fp8_blocks"])
@pytest.mark.parametrize("shape", UNEVEN, ids=str)
def test_a_weight_of_uneven_sizes_comes_back_unless_its_inputs_are_odd(
    format: WeightFormat, shape: tuple[int, int]
) -> None:
    weight = random_matrix(format, *shape)
    packed = pack_matrix(weight)
    assert packed.has_stored_bits == (shape[1] % 2 == 0)
    if packed.has_stored_bits:
        assert_same_parts(unpack_matrix(packed), weight)
    else:
        assert packed.nbytes == 4 * -(-shape[0] // PANEL) * PANEL * shape[1]


def test_the_log_says_once_why_weights_are_kept_in_fp32(caplog: pytest.LogCaptureFixture) -> None:
    packed_matrix._log_fp32.cache_clear()
    codes, scale = random_matrix("fp8", 64, 128).parts
    nan = codes.clone()
    nan.view(torch.uint8)[0, 0] = 0x7F
    odd = StoredMatrix("fp8", (codes[:, :127], scale))
    bf16 = StoredMatrix.plain(torch.ones(64, 127, dtype=torch.bfloat16))
    huge = StoredMatrix("fp8", (codes, torch.tensor(2.0**90)))
    for weight in (odd, bf16, huge, StoredMatrix("fp8", (nan, scale)), odd, StoredMatrix("fp8", (codes, scale))):
        pack_matrix(weight)
    end = "are kept in fp32, which takes more memory: no CPU kernel computes with such weights."
    assert caplog.messages == [
        f"Weights in fp8 with an odd number of inputs {end}",
        f"Weights in bf16 with an odd number of inputs {end}",
        f"Weights in fp8 with a scale that is not below 2**90 {end}",
        f"Weights in fp8 with a code that means NaN {end}",
    ]


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_nan_code_makes_the_product_nan(format: WeightFormat) -> None:
    codes, *scales = random_matrix(format, 40, 144).parts
    damaged = scales[0] if format == "nvfp4" else codes
    damaged.view(torch.uint8)[7, 3] = 0xFF
    y = linear(torch.ones(1, 144), pack_matrix(StoredMatrix(format, (codes, *scales))))
    assert y.isnan().nonzero().tolist() == [[0, 7]]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(512, 256), (256, 512), (1856, 2688)], ids=str)
def test_memory_is_at_most_a_twentieth_more_than_the_stored_bytes(format: WeightFormat, shape: tuple[int, int]) -> None:
    weight = random_matrix(format, *shape)
    assert weight.nbytes <= pack_matrix(weight).nbytes <= 1.05 * weight.nbytes
