"""These tests check how much device memory `DeviceExperts` take, with fake tensors on `cuda:0` instead of a GPU."""

from __future__ import annotations

import pytest
import torch

from model import kernels
from model.configs.expert_shape import ExpertShape
from model.configs.weight_format import WeightFormat
from model.family import ModelFamily
from model.stored_matrix import CODE_DTYPES, StoredMatrix, stored_parts
from services.expert.weights.device_experts import DeviceExperts, NoDeviceMemory
from services.expert.weights.load_order import Key
from services.expert.weights.standbys import StandbyStore
from services.expert.weights.weights import Weights
from tests.cuda_allocators import CachingAllocator, fake_cuda

MIB = 1 << 20
LAYERS = (1, 3, 5)


def super_experts(layer: int, formats: tuple[WeightFormat, ...]) -> ExpertShape:
    return ExpertShape(layer, num_experts=512, top_k=22, input_dim=1024, width=2688, formats=formats)


def empty_weights(shape: ExpertShape) -> Weights:
    """Return weights of the right formats and sizes, whose numbers are not set."""

    def empty(format: WeightFormat, rows: int, columns: int) -> StoredMatrix:
        dtypes = CODE_DTYPES | {"plain": torch.bfloat16}
        parts = stored_parts(format, rows, columns)
        return StoredMatrix(format, tuple(torch.empty(part.shape, dtype=dtypes[part.dtype]) for part in parts))

    return Weights({matrix.name: empty(matrix.format, matrix.rows, matrix.columns) for matrix in shape.matrices})


@pytest.mark.parametrize("formats", [(), ("fp8", "fp8"), ("nvfp4", "nvfp4")], ids=str)
@pytest.mark.parametrize("budget", [1024 * MIB, 1333 * MIB])
def test_experts_on_a_gpu_fit_into_the_budget(formats: tuple[WeightFormat, ...], budget: int) -> None:
    """Check that torch's allocator reserves no more than the budget for as many experts as `pin` accepts.

    The experts are those of Nemotron 3 Super: 10.5 MiB each on a GPU, in every format.
    """
    shapes = {layer: super_experts(layer, formats) for layer in LAYERS}
    allocator = CachingAllocator()
    num_experts = int(budget // (10.5 * MIB))
    keys: list[Key] = [(LAYERS[i % 3], i) for i in range(num_experts)]
    with fake_cuda() as recorder:
        on_device = DeviceExperts(shapes, torch.bfloat16, torch.device("cuda:0"), budget, StandbyStore(0))
        assert on_device.pin(keys) == {*keys}
        weights = empty_weights(shapes[1])
        for layer, expert in keys:
            on_device.fill((layer, expert), weights, gain=0)
            on_device.mark_ready((layer, expert))
        with pytest.raises(NoDeviceMemory):
            on_device.pin([(5, 511)])
        on_device.free(keys[:7])
        on_device.pin([(5, 511)])
        on_device.fill((5, 511), weights, gain=0)
    assert on_device.used_bytes == on_device.nbytes([*keys[7:], (5, 511)]) == (num_experts - 6) * 10.5 * MIB
    for size in recorder.sizes:
        allocator.allocate(size)
    assert num_experts * 10.5 * MIB <= allocator.reserved
    assert allocator.reserved <= budget + 1 * MIB, "a segment is a multiple of 2 MiB"
    assert len(recorder.sizes) == 1


def test_no_more_slots_are_allocated_than_there_are_experts() -> None:
    shape = super_experts(1, ())
    with fake_cuda() as recorder:
        DeviceExperts({1: shape}, torch.bfloat16, torch.device("cuda:0"), 1 << 40, StandbyStore(0))
    assert recorder.sizes == [512 * 10.5 * MIB]


def test_the_cpu_kernels_count_stored_bytes_and_plain_pytorch_dequantized_ones(
    family: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = super_experts(1, ("nvfp4", "nvfp4"))

    def counted() -> int:
        device = torch.device("cpu")
        return DeviceExperts({1: shape}, torch.float32, device, 100 * MIB, StandbyStore(0)).nbytes([(1, 0), (1, 7)])

    assert counted() == 2 * shape.nbytes(torch.float32)
    monkeypatch.setattr(kernels, "has_compiled", lambda: False)
    assert counted() == 2 * 21 * MIB
