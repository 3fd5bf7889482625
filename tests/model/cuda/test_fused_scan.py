"""The tests compare `model.cuda.fused_scan`, with mamba-ssm's real kernels, with plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.blocks import mamba
from model.state import SubBatch
from tests.model.blocks.test_mamba import sub_batch_of
from tests.model.cuda.fused import DEVICE, ON_GPU, agree, fused_scan
from tests.model.steps import seeded

HEADS, HEAD_DIM, GROUPS, STATE_DIM = 4, 16, 2, 16
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def fused() -> Iterator[Any]:
    with fused_scan() as module:
        yield module


def inputs(num_tokens: int, num_requests: int) -> tuple[Inputs, Tensor]:
    """Return random inputs (x, Δ, A, B, C) of a scan, and the requests' random states (R, H, D, N)."""
    randn = seeded(0)
    x, delta = randn(num_tokens, HEADS, HEAD_DIM), torch.exp(randn(num_tokens, HEADS) - 3)
    b, c = randn(num_tokens, GROUPS, STATE_DIM), randn(num_tokens, GROUPS, STATE_DIM)
    tensors = (x, delta, -torch.exp(randn(HEADS)), b, c)
    on_device: Any = tuple(v.to(DEVICE) for v in tensors)
    return on_device, randn(num_requests, HEADS, HEAD_DIM, STATE_DIM).to(DEVICE)


def test_the_kernels_are_mamba_ssms(fused: Any) -> None:
    from triton.runtime.interpreter import InterpretedFunction  # imported here, because a GPU must not interpret

    step, scan = fused.selective_state_update, fused.mamba_chunk_scan_combined
    assert {kernel.__module__.partition(".")[0] for kernel in (step, scan)} == {"mamba_ssm"}
    launched = step.__globals__["_selective_scan_update_kernel"]
    while not ON_GPU and not isinstance(launched, InterpretedFunction):
        launched = launched.fn  # heuristics wrap the kernel


@pytest.mark.parametrize(
    ("lens", "context_lens"), [((37,), (0,)), ((9, 2, 33, 16), (0, 16, 3, 16)), ((5, 70), (23, 0))], ids=str
)
def test_the_scans_agree(fused: Any, lens: tuple[int, ...], context_lens: tuple[int, ...]) -> None:
    tensors, state = inputs(sum(lens), len(lens))
    sub_batch: SubBatch = sub_batch_of(lens, context_lens)
    before = state.clone()
    found = fused.ssd_scan(*tensors, state, sub_batch, 16)
    assert torch.equal(state, before)
    agree(found, mamba.packed_scan(*tensors, state, sub_batch, 16))


def test_the_rectangle_starts_requests_within_a_chunk(fused: Any) -> None:
    request_T, column_T = fused.rectangle(sub_batch_of((3, 5), (6, 8)), 4, torch.device("cpu"))
    assert request_T.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert column_T.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]


def test_the_steps_agree(fused: Any) -> None:
    tensors, state = inputs(5, 5)
    before = state.clone()
    found = fused.ssd_step(*tensors, state)
    assert torch.equal(state, before)
    agree(found, mamba.ssd_step(*tensors, state))
