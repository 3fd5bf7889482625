"""These tests compare the memory of an expert with what torch's allocators reserve, and the allocators with torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from model.configs.expert_memory import ALIGNMENT, PINNED_SLAB, expert_memory, pinned_bytes, stored_sizes
from model.configs.expert_shape import ExpertShape
from model.configs.weight_format import WeightFormat
from model.cpu.packed_matrix import pack_matrix
from tests import cuda_allocators as cuda
from tests.cuda_allocators import CachingAllocator, pinned_block
from tests.model.stored_matrices import random_matrix

MIB, GIB = 1 << 20, 1 << 30
INCLUDE = Path(torch.__file__).parent / "include"


def super_experts(*formats: WeightFormat, layer: int = 1) -> ExpertShape:
    """Return the shape of the experts of Nemotron 3 Super, whose matrices have 5.25 MiB in bf16."""
    return ExpertShape(layer, num_experts=512, top_k=22, input_dim=1024, width=2688, formats=formats)


def test_the_allocators_round_as_the_headers_of_torch_say() -> None:
    text = (INCLUDE / "c10/core/AllocatorConfig.h").read_text()
    constants = {name: int(value) for name, value in re.findall(r"constexpr size_t (k\w+) = (\d+);", text)}
    assert constants == {
        "kMinBlockSize": cuda.MIN_BLOCK,
        "kSmallSize": cuda.SMALL,
        "kSmallBuffer": cuda.SMALL_SEGMENT,
        "kMinLargeAlloc": cuda.LARGE,
        "kRoundLarge": cuda.SEGMENT_STEP,
    }
    assert f"large_segment_size_{{{cuda.LARGE_SEGMENT}}}" in text
    assert "pinned_max_round_threshold_{std::numeric_limits<size_t>::max()}" in text
    assert "return c10::llvm::PowerOf2Ceil(size);" in (INCLUDE / "ATen/core/CachingHostAllocator.h").read_text()
    assert ALIGNMENT == cuda.MIN_BLOCK
    assert pinned_block(PINNED_SLAB) == PINNED_SLAB


def test_one_tensor_per_matrix_would_not_fit_into_the_budget() -> None:
    """Check the reason for slots: three matrices of Super, of 5.25 MiB each, fill a segment of 20 MiB."""
    allocator, matrix = CachingAllocator(), 2688 * 1024 * 2
    for _ in range(12):
        allocator.allocate(matrix)
    assert (matrix, allocator.reserved) == (5.25 * MIB, 80 * MIB)
    in_one = CachingAllocator()
    in_one.allocate(12 * matrix)
    assert in_one.reserved == 64 * MIB


def test_one_block_per_standby_would_not_fit_into_the_budget() -> None:
    """Check the reason for slabs: page-locked tensors of 5.25 MiB take 8 MiB each."""
    shape = super_experts()
    sizes = stored_sizes(shape, torch.bfloat16)
    assert sum(map(pinned_block, sizes)) == 16 * MIB
    assert sum(sizes) == 10.5 * MIB
    memory = expert_memory([shape], torch.bfloat16, is_packed=False, is_pinned=True)[1]
    assert sum(sizes) <= memory.host <= 1.001 * sum(sizes)


@pytest.mark.parametrize(
    ("formats", "stored", "is_packed", "device"),
    [
        ((), 10.5 * MIB, True, 10.5 * MIB),
        ((), 10.5 * MIB, False, 10.5 * MIB),
        (("fp8", "fp8"), 5.25 * MIB + 8, True, 5.25 * MIB + 8),
        (("fp8", "fp8"), 5.25 * MIB + 8, False, 10.5 * MIB),
        (("nvfp4", "nvfp4"), 10.5 * MIB * 9 / 32 + 8, True, 10.5 * MIB * 9 / 32 + 8),
        (("nvfp4", "nvfp4"), 10.5 * MIB * 9 / 32 + 8, False, 10.5 * MIB),
    ],
)
def test_only_packed_experts_take_their_stored_bytes(
    formats: tuple[WeightFormat, ...], stored: float, is_packed: bool, device: float
) -> None:
    shape = super_experts(*formats)
    assert shape.nbytes(torch.bfloat16) == stored == sum(stored_sizes(shape, torch.bfloat16))
    memory = expert_memory([shape], torch.bfloat16, is_packed=is_packed, is_pinned=False)[1]
    assert (memory.device, memory.host) == (device, stored)


@pytest.mark.parametrize("format", ["plain", "fp8", "fp8_blocks"])
def test_the_kernels_keep_an_odd_number_of_inputs_in_fp32(format: WeightFormat) -> None:
    """Compare the memory of an expert with 33 inputs and 64 hidden numbers with the packed matrices.

    The 33 outputs of `down` take two panels of 32 outputs. The outputs that are missing in panels are not counted.
    """
    shape = ExpertShape(1, num_experts=4, top_k=1, input_dim=33, width=64, kind="swiglu", formats=(format,) * 3)
    up, down = (pack_matrix(random_matrix(format, *size).to("cpu", torch.bfloat16)) for size in ((64, 33), (33, 64)))
    assert (up.kind, up.nbytes) == ("fp32", 64 * 33 * 4)
    assert down.kind != "fp32"
    memory = expert_memory([shape], torch.bfloat16, is_packed=True, is_pinned=False)[1]
    assert memory.device == 2 * up.nbytes + shape.matrices[2].nbytes(torch.bfloat16)
    assert memory.host == shape.nbytes(torch.bfloat16) < memory.device


def test_all_slots_of_a_device_are_as_large_as_the_largest() -> None:
    small = ExpertShape(2, num_experts=4, top_k=1, input_dim=1024, width=256)
    memory = expert_memory([super_experts(), small], torch.bfloat16, is_packed=False, is_pinned=False)
    assert memory[1].device == memory[2].device == 10.5 * MIB
    assert memory[2].host == small.nbytes(torch.bfloat16)


@pytest.mark.parametrize("sizes", [(1,), (513, 4), (5 << 20, 5 << 20), (300 << 20,), (3 << 30,)], ids=str)
def test_as_many_experts_fit_into_a_slab_as_their_bytes_say(sizes: tuple[int, ...]) -> None:
    one = pinned_bytes(sizes)
    slab = max(PINNED_SLAB, pinned_block(sum(sizes)))
    assert slab // one * one <= slab
    assert slab // one == slab // sum(-(-size // 512) * 512 for size in sizes)
