"""These tests check which standbys a `StandbyStore` keeps in host memory when its budget is too small for all."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from model.configs.expert_memory import PINNED_SLAB, pinned_bytes
from model.configs.weight_format import WeightFormat
from model.stored_matrix import StoredMatrix
from services.expert.weights.standbys import PinnedMemory, StandbyStore
from services.expert.weights.weights import Weights
from tests.cuda_allocators import pinned_block
from tests.model.stored_matrices import random_matrix, same_bits


def make_weights(num_rows: int = 2) -> Weights:
    up, down = (StoredMatrix.plain(torch.ones(size)) for size in ((num_rows, 4), (4, num_rows)))
    return Weights({"up": up, "down": down})


ONE = make_weights().nbytes


def in_memory(standbys: StandbyStore) -> list[int]:
    return sorted(expert for _, expert in standbys.in_host_memory)


def test_who_comes_first_stands_by_in_host_memory() -> None:
    standbys = StandbyStore(2 * ONE)
    for expert in range(4):
        standbys.add((1, expert), make_weights())
    assert (in_memory(standbys), len(standbys.keys), standbys.used_bytes) == ([0, 1], 4, 2 * ONE)


def test_what_was_promoted_last_replaces_what_was_promoted_longest_ago() -> None:
    standbys = StandbyStore(2 * ONE)
    for expert in range(4):
        standbys.add((1, expert), make_weights())
    standbys.note_promotion((1, 0), None)
    standbys.note_promotion((1, 3), make_weights())
    assert in_memory(standbys) == [0, 3]
    standbys.note_promotion((1, 2), make_weights())
    assert in_memory(standbys) == [2, 3]
    standbys.note_promotion((1, 1), make_weights(4))  # these weights have the size of two other standbys
    assert (in_memory(standbys), standbys.used_bytes) == ([1], 2 * ONE)


def test_what_is_larger_than_the_budget_stays_on_disk_and_harms_nobody() -> None:
    standbys = StandbyStore(2 * ONE)
    standbys.add((1, 0), make_weights())
    standbys.add((1, 1), None)
    standbys.note_promotion((1, 1), make_weights(5))
    assert in_memory(standbys) == [0]


def test_what_leaves_gives_its_memory_back() -> None:
    standbys = StandbyStore(2 * ONE)
    standbys.add((1, 0), make_weights())
    standbys.add((1, 0), make_weights())
    assert standbys.used_bytes == ONE
    standbys.remove((1, 0))
    standbys.remove((1, 0))
    assert (standbys.keys, standbys.used_bytes) == ([], 0)


class Slabs:
    """`Slabs` note the sizes of slabs; they are ordinary memory, because torch needs a GPU for page-locked memory."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, num_bytes: int) -> Tensor:
        self.sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)


def quantized_weights(format: WeightFormat, seed: int = 0) -> Weights:
    up, down = (random_matrix(format, *size, seed=seed).to("cpu", torch.bfloat16) for size in ((48, 32), (32, 48)))
    return Weights({"up": up, "down": down}, gain=seed)


@pytest.mark.parametrize("format", ["plain", "fp8", "fp8_blocks", "nvfp4"])
def test_page_locked_copies_have_the_same_bits(format: WeightFormat) -> None:
    memory, originals = PinnedMemory(1 << 20, Slabs()), [quantized_weights(format, seed) for seed in range(5)]
    for original, copy in [(one, memory.copy(one)) for one in originals]:
        assert copy is not None
        assert (copy.checksum, copy.gain) == (original.checksum, original.gain)
        for name, matrix in original.matrices.items():
            assert all(map(same_bits, matrix.parts, copy.matrices[name].parts))


@pytest.mark.parametrize("budget", [511, 4096, 5 * 4096, 100_000, 2**20 - 1])
def test_no_more_than_the_budget_is_page_locked(budget: int) -> None:
    slabs, one = Slabs(), make_weights(256)  # 8 KiB
    memory, kept = PinnedMemory(budget, slabs), []
    while (copy := memory.copy(one)) is not None:
        kept.append(copy)
    assert sum(map(pinned_block, slabs.sizes)) == memory.allocated_bytes <= budget
    assert len(kept) == budget // 8192, "slots of a power of two fill the slabs"


def test_a_large_slab_is_almost_filled() -> None:
    """Check the figures of Nemotron 3 Super, of which a standby has 10.5 MiB: 195 of them fit into 2 GiB."""
    slabs, one = Slabs(), Weights({"up": StoredMatrix.plain(torch.empty(1024, 5376, dtype=torch.bfloat16))})
    memory = PinnedMemory(PINNED_SLAB, slabs)
    slab, first = memory._take(one.nbytes) or pytest.fail("no slot")
    assert (slabs.sizes, first, len(slab.free)) == ([2 << 30], 0, 194)
    assert pinned_bytes(one.part_sizes) == (2 << 30) // 195


def test_page_locked_memory_is_used_again_when_nobody_reads_it() -> None:
    slabs = Slabs()
    memory = PinnedMemory(16_384, slabs)
    first, second = memory.copy(make_weights(256)), memory.copy(make_weights(256))
    assert memory.copy(make_weights(2)) is None
    assert first is not None
    reader = first.chunks()
    next(reader)
    del first
    gc.collect()
    assert memory.copy(make_weights(256)) is None, "a peer still reads the copy"
    reader.close()
    del reader
    gc.collect()
    third = memory.copy(make_weights(256))
    assert third is not None
    del second, third
    gc.collect()
    assert memory.copy(make_weights(2)) is not None, "an unused slab is cut into slots of another size"
    assert slabs.sizes == [16_384]


def test_a_standby_of_page_locked_memory_replaces_another() -> None:
    standbys = StandbyStore(16_384, is_pinned=True)
    standbys.pinned = PinnedMemory(16_384, Slabs())
    one = make_weights(256)
    for expert in range(3):
        standbys.add((1, expert), standbys.copy(one))
    assert (in_memory(standbys), standbys.used_bytes) == ([0, 1], 2 * pinned_bytes(one.part_sizes))
    assert standbys.copy(one) is None
    standbys.make_room(standbys.nbytes(one))
    standbys.note_promotion((1, 2), standbys.copy(one))
    assert in_memory(standbys) == [1, 2]


def test_a_standby_is_replaced_although_the_smallest_slabs_hold_no_slot() -> None:
    """Check a budget whose bytes would hold four standbys, while its slabs hold three slots."""
    budget, one = 8192 + 4096 + 2048 + 1024, Weights({"up": StoredMatrix.plain(torch.ones(3, 256))})  # 3 KiB
    standbys = StandbyStore(budget, is_pinned=True)
    standbys.pinned = PinnedMemory(budget, Slabs())
    for expert in range(4):
        standbys.add((1, expert), standbys.copy(one))
    num_bytes = standbys.nbytes(one)
    standbys.make_room(num_bytes)
    assert (in_memory(standbys), standbys.copy(one)) == ([0, 1, 2], None)
    assert standbys.drop_coldest(num_bytes)
    standbys.note_promotion((1, 3), standbys.copy(one))
    assert in_memory(standbys) == [1, 2, 3]
    assert not standbys.drop_coldest(num_bytes + 1)
