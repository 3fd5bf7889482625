"""These tests check `ExpertSlots`: the places of matrices, and what happens if a device has too little memory."""

from __future__ import annotations

import pytest
import torch

from model.blocks.expert_slots import ExpertSlots
from model.configs.expert_memory import slot_bytes
from model.configs.expert_shape import ExpertShape

SHAPE = ExpertShape(1, num_experts=3, top_k=1, input_dim=29, width=37, kind="swiglu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_of_different_experts_share_no_memory(dtype: torch.dtype) -> None:
    slots = ExpertSlots(slot_bytes(SHAPE, dtype), 3, torch.device("cpu"))
    taken = [slots.matrices(slots.take(), SHAPE, dtype) for _ in range(3)]
    for number, matrices in enumerate(taken):
        for place, matrix in enumerate(matrices):
            matrix.fill_(10 * number + place)
    for number, matrices in enumerate(taken):
        assert [(one.dtype, one.shape) for one in matrices] == [
            (dtype, size) for size in ((37, 29), (37, 29), (29, 37))
        ]
        assert all((matrix == 10 * number + place).all() for place, matrix in enumerate(matrices))
        assert all(matrix.data_ptr() % 64 == matrices[0].data_ptr() % 64 for matrix in matrices)


def test_a_slot_is_taken_again_only_after_it_is_given_back() -> None:
    slots = ExpertSlots(512, 2, torch.device("cpu"))
    first, second = slots.take(), slots.take()
    assert (first != second, slots.num_free) == (True, 0)
    slots.give_back(first)
    assert slots.take() == first


def test_too_little_memory_is_told_in_a_sentence() -> None:
    with pytest.raises(
        RuntimeError, match=r"^cpu has no memory for 1,000,000 experts of 1,099,511,627,776 bytes; lower"
    ):
        ExpertSlots(1 << 40, 10**6, torch.device("cpu"))
