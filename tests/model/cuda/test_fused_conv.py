"""The tests compare `model.cuda.fused_conv` with plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.blocks import mamba
from model.state import Batch
from tests.model.cuda.fused import DEVICE, agree, fused_conv
from tests.model.steps import seeded

CHANNELS = 64


@pytest.fixture(scope="module")
def fused() -> Iterator[Any]:
    with fused_conv() as module:
        yield module


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_taps", [2, 4])
@pytest.mark.parametrize("lens", [(1, 1, 1), (5,), (1, 9, 2)], ids=str)
def test_the_convolutions_agree(fused: Any, has_bias: bool, num_taps: int, lens: tuple[int, ...]) -> None:
    randn, num = seeded(0), len(lens)
    xbc, past = randn(sum(lens), CHANNELS).to(DEVICE), randn(num, num_taps - 1, CHANNELS).to(DEVICE)
    weight, bias = randn(CHANNELS, num_taps).to(DEVICE), randn(CHANNELS).to(DEVICE) if has_bias else None
    ids = torch.zeros(sum(lens), dtype=torch.long, device=DEVICE)
    batch = Batch(ids, lens, (0,) * num, tuple(range(num)), ((0,),) * num)
    before = past.clone()
    found = fused.causal_conv(xbc, weight, bias, past, batch)
    assert torch.equal(past, before)
    agree(found, mamba.causal_conv(xbc, weight, bias, past, batch))
