"""The functions here load our modules that call fused kernels, with the real kernels if this machine can run them.

- On a GPU where both packages work, the kernels run on the GPU.
- Elsewhere, mamba-ssm's real Triton kernels run in Triton's interpreter, on CPU tensors. causal-conv1d is C++ and CUDA
  code, which no interpreter runs, so loops with the documented shapes stand in for the package's two functions. The
  tests then check the padding, the strides and the bookkeeping of Expertmesh.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from model import kernels
from tests.model import oracles
from tests.model.steps import relative_error

ON_GPU = kernels.has_fused("mamba_ssm") and kernels.has_fused("causal_conv1d")
DEVICE, BOUND = ("cuda", 5e-3) if ON_GPU else ("cpu", 1e-5)  # fused kernels multiply in TF32


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert relative_error(one, other) < BOUND


def _causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None, *, seq_idx: Tensor, activation: str) -> Tensor:
    assert (x.dim(), x.stride(1), seq_idx.dtype, activation) == (3, 1, torch.int32, "silu")
    assert x.stride(2) % 8 == 0
    zeros = torch.zeros(weight.shape[1] - 1, x.shape[1])
    own = [x[0].t()[seq_idx[0] == r] for r in seq_idx.unique()]
    return torch.cat([oracles.convolution(rows, weight, bias, zeros)[0] for rows in own]).float().t()[None]


def _causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    rows = []
    for r in range(len(x)):
        out, past = oracles.convolution(x[r : r + 1], weight, bias, conv_state[r].t())
        rows.append(out.float())
        conv_state[r] = past.t()
    return torch.cat(rows)


@contextmanager
def fused_conv() -> Iterator[Any]:
    """Return `model.cuda.fused_conv`; without a GPU, it calls the loops above instead of causal-conv1d."""
    if ON_GPU:
        yield importlib.import_module("model.cuda.fused_conv")
        return
    package = ModuleType("causal_conv1d")
    package.__dict__.update(causal_conv1d_fn=_causal_conv1d_fn, causal_conv1d_update=_causal_conv1d_update)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "causal_conv1d", package)
        yield importlib.import_module("model.cuda.fused_conv")
        sys.modules.pop("model.cuda.fused_conv")


@contextmanager
def fused_scan() -> Iterator[Any]:
    """Return `model.cuda.fused_scan`; without a GPU, mamba-ssm's kernels run in Triton's interpreter.

    mamba-ssm's `__init__` imports C++ code, which is not built for the tests, so that bare modules take the place of
    `mamba_ssm` and `mamba_ssm.ops`. The modules leave `sys.modules` at the end, because transformers would use them.
    """
    if ON_GPU:
        yield importlib.import_module("model.cuda.fused_scan")
        return
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None, "mamba-ssm is not installed; `make test` installs it"
    [folder] = spec.submodule_search_locations or []
    with pytest.MonkeyPatch.context() as patch:
        for name, path in (("mamba_ssm", folder), ("mamba_ssm.ops", f"{folder}/ops")):
            module = ModuleType(name)
            module.__path__ = [path]
            patch.setitem(sys.modules, name, module)
        patch.setattr(torch.cuda, "device", lambda index: nullcontext())  # the kernels select their tensors' GPU
        yield importlib.import_module("model.cuda.fused_scan")
        for name in [n for n in sys.modules if n.startswith("mamba_ssm.") or n == "model.cuda.fused_scan"]:
            sys.modules.pop(name)
