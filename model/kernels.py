"""Which implementation runs: fused CUDA kernels where they are installed and the tensors lie there, else plain PyTorch.

This is the one place that decides. Both give the same numbers up to rounding; `tests/model/test_kernels.py` shows it
where a GPU is there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Kernel = Callable[..., Any]


@cache
def has_fused(package: str) -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec(package) is not None


def describe(device: torch.device | str) -> str:
    """What runs on `device`, in words, for the log at start."""
    if torch.device(device).type != "cuda":
        return "plain PyTorch (fused kernels need CUDA)"
    names = [name for name in ("mamba_ssm", "causal_conv1d") if has_fused(name)]
    return f"fused kernels from {' and '.join(names)}" if names else "plain PyTorch (mamba-ssm is not installed)"


def _pick(device: torch.device, package: str, name: str) -> Kernel | None:
    if device.type != "cuda" or not has_fused(package):
        return None
    module = importlib.import_module("model.fused")
    kernel: Kernel = getattr(module, name)
    return kernel


def ssd_scan(device: torch.device) -> Kernel | None:
    return _pick(device, "mamba_ssm", "ssd_scan")


def ssd_step(device: torch.device) -> Kernel | None:
    return _pick(device, "mamba_ssm", "ssd_step")


def causal_conv(device: torch.device) -> Kernel | None:
    return _pick(device, "causal_conv1d", "causal_conv")
