"""The tests check which implementation runs, and that the fused CUDA kernels give the numbers of plain PyTorch.

The packages of the fused kernels cannot be installed without CUDA. Without a GPU, the tests replace the packages'
public functions by loops with the documented shapes. The tests then check the padding, the strides and the bookkeeping
of Expertmesh, but not the kernels themselves.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from model import kernels
from model.blocks import mamba
from model.state import Batch, SubBatch
from tests.model import oracles
from tests.model.blocks.test_mamba import sub_batch_of
from tests.model.steps import relative_error, seeded

HEADS, HEAD_DIM, GROUPS, STATE_DIM, CHANNELS = 4, 16, 2, 16, 64
ON_GPU = kernels.has_fused("mamba_ssm") and kernels.has_fused("causal_conv1d")
DEVICE, BOUND = ("cuda", 5e-3) if ON_GPU else ("cpu", 1e-5)  # fused kernels multiply in TF32


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    initial_states: Tensor,
    dt_softplus: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    assert return_final_states
    assert not dt_softplus
    requests = zip(x, dt, B, C, initial_states, strict=True)
    results = [oracles.recurrence(x, dt, A, b, c, state) for x, dt, b, c, state in requests]
    return torch.stack([y for y, _ in results]).float(), torch.stack([final for _, final in results]).float()


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor, dt_softplus: bool
) -> Tensor:
    assert A.stride()[1:] == (0, 0)
    assert dt.stride(-1) == dt_bias.stride(-1) == 0
    assert not dt_softplus
    out = torch.empty_like(x)
    for r in range(len(x)):
        one = (x[r : r + 1], dt[r : r + 1, :, 0] + dt_bias[:, 0], A[:, 0, 0], B[r : r + 1], C[r : r + 1])
        y, final = oracles.recurrence(*one, state[r])
        out[r], state[r] = y[0], final
    return out


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None, *, seq_idx: Tensor, activation: str) -> Tensor:
    assert (x.dim(), x.stride(1), seq_idx.dtype, activation) == (3, 1, torch.int32, "silu")
    assert x.stride(2) % 8 == 0
    zeros = torch.zeros(weight.shape[1] - 1, x.shape[1])
    own = [x[0].t()[seq_idx[0] == r] for r in seq_idx.unique()]
    return torch.cat([oracles.convolution(rows, weight, bias, zeros)[0] for rows in own]).float().t()[None]


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    rows = []
    for r in range(len(x)):
        out, past = oracles.convolution(x[r : r + 1], weight, bias, conv_state[r].t())
        rows.append(out.float())
        conv_state[r] = past.t()
    return torch.cat(rows)


def stub_modules() -> dict[str, ModuleType]:
    modules = {
        name: ModuleType(name)
        for name in (
            "causal_conv1d",
            "mamba_ssm",
            "mamba_ssm.ops",
            "mamba_ssm.ops.triton",
            "mamba_ssm.ops.triton.selective_state_update",
            "mamba_ssm.ops.triton.ssd_combined",
        )
    }
    modules["causal_conv1d"].__dict__.update(
        causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update
    )
    triton = "mamba_ssm.ops.triton"
    modules[f"{triton}.selective_state_update"].__dict__.update(selective_state_update=selective_state_update)
    modules[f"{triton}.ssd_combined"].__dict__.update(mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    return modules


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if not ON_GPU:
        for name, module in stub_modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("model.cuda.fused_mamba")
    if not ON_GPU:
        sys.modules.pop("model.cuda.fused_mamba")


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(num_tokens: int, num_requests: int) -> tuple[Inputs, Tensor]:
    """Return random inputs (x, Δ, A, B, C) of a scan, and the requests' random states (R, H, D, N)."""
    randn = seeded(0)
    x, delta = randn(num_tokens, HEADS, HEAD_DIM), torch.exp(randn(num_tokens, HEADS) - 3)
    b, c = randn(num_tokens, GROUPS, STATE_DIM), randn(num_tokens, GROUPS, STATE_DIM)
    tensors = (x, delta, -torch.exp(randn(HEADS)), b, c)
    on_device: Any = tuple(v.to(DEVICE) for v in tensors)
    return on_device, randn(num_requests, HEADS, HEAD_DIM, STATE_DIM).to(DEVICE)


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert relative_error(one, other) < BOUND


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


KERNEL_GETTERS = (kernels.ssd_scan, kernels.ssd_step, kernels.causal_conv)


DOUBT = "; the last bits of a request's logits may depend on who shares the batch"


def test_the_cpu_runs_our_kernels_unless_they_are_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [get_kernel(torch.device("cpu")) for get_kernel in KERNEL_GETTERS] == [None, None, None]
    assert kernels.is_reproducible("cpu")
    assert kernels.describe("cpu") == ("compiled CPU kernels; a request's tokens are the same whoever shares the batch")
    monkeypatch.setattr(kernels, "has_compiled", kernels.has_compiled.__wrapped__)
    monkeypatch.setenv("EXPERTMESH_CPU_KERNELS", "0")
    assert not kernels.is_reproducible("cpu")
    assert kernels.describe("cpu") == f"plain PyTorch (EXPERTMESH_CPU_KERNELS=0){DOUBT}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without CUDA")
def test_without_cuda_nothing_is_fused() -> None:
    assert [get_kernel(torch.device("cuda")) for get_kernel in KERNEL_GETTERS] == [None, None, None]
    assert not kernels.is_reproducible("cuda")
    assert kernels.describe("cuda") == f"plain PyTorch (mamba-ssm is not installed){DOUBT}"


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA, mamba-ssm and causal-conv1d")
def test_on_a_gpu_the_fused_kernels_run() -> None:
    assert [get_kernel(torch.device("cuda")).__module__ for get_kernel in KERNEL_GETTERS] == [
        "model.cuda.fused_mamba"
    ] * 3
    assert kernels.describe("cuda") == f"fused kernels from mamba_ssm and causal_conv1d{DOUBT}"
