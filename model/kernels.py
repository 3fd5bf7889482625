"""The functions here decide which implementation of the layers runs on a device.

- On a CPU: the compiled kernels of `model/cpu`, with which a token's bits depend only on the token's own sequence.
- On a GPU: the fused CUDA kernels of mamba-ssm and causal-conv1d where they are installed.
- Otherwise: plain PyTorch.

All implementations give the same numbers up to rounding; `tests/model/test_kernels.py` compares them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Kernel = Callable[..., Any]


@cache
def has_compiled() -> bool:
    """Return True unless EXPERTMESH_CPU_KERNELS=0 turns the CPU kernels off."""
    return os.environ.get("EXPERTMESH_CPU_KERNELS", "1") != "0"


def is_compiled(device: torch.device | str) -> bool:
    """Return True if a model on `device` runs on the CPU kernels."""
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return kind == "cpu" and has_compiled()


def is_reproducible(device: torch.device | str) -> bool:
    """Return True if a request's tokens on `device` depend on the request alone.

    The request's tokens then do not depend on the other requests in the batches, on preemptions or on drafts.
    """
    return is_compiled(device)


@cache
def has_fused(package: str) -> bool:
    """Return True if there is a CUDA device and the package `package` of fused kernels is installed."""
    return torch.cuda.is_available() and importlib.util.find_spec(package) is not None


def describe(device: torch.device | str) -> str:
    """Return a text for the log at start that says what runs on `device` and whether tokens are reproducible."""
    if is_reproducible(device):
        return f"{_arithmetic(device)}; a request's tokens are the same whoever shares the batch"
    return f"{_arithmetic(device)}; the last bits of a request's logits may depend on who shares the batch"


def _arithmetic(device: torch.device | str) -> str:
    if is_compiled(device):
        return "compiled CPU kernels"
    if torch.device(device).type != "cuda":
        return "plain PyTorch (EXPERTMESH_CPU_KERNELS=0)"
    names = [name for name in ("mamba_ssm", "causal_conv1d") if has_fused(name)]
    return f"fused kernels from {' and '.join(names)}" if names else "plain PyTorch (mamba-ssm is not installed)"


def _fused_kernel(device: torch.device, package: str, name: str) -> Kernel | None:
    if device.type != "cuda" or not has_fused(package):
        return None
    module = importlib.import_module("model.cuda.fused_mamba")
    kernel: Kernel = getattr(module, name)
    return kernel


def ssd_scan(device: torch.device) -> Kernel | None:
    """Return the fused kernel that scans packed requests, or None if plain PyTorch must run."""
    return _fused_kernel(device, "mamba_ssm", "ssd_scan")


def ssd_step(device: torch.device) -> Kernel | None:
    """Return the fused kernel that advances the state by one token per request, or None if plain PyTorch must run."""
    return _fused_kernel(device, "mamba_ssm", "ssd_step")


def causal_conv(device: torch.device) -> Kernel | None:
    """Return the fused kernel of the causal convolution, or None if plain PyTorch must run."""
    return _fused_kernel(device, "causal_conv1d", "causal_conv")
