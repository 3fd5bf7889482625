"""The functions here decide which implementation of the layers runs on a device.

- On a CPU: the compiled kernels of `model/cpu`, with which a token's bits depend only on the token's own sequence.
- On a GPU: the fused kernels of mamba-ssm and causal-conv1d where the packages are installed and can be loaded.
- Otherwise: plain PyTorch. A block on a CPU runs plain PyTorch, too, if its shape is one that the compiled kernels do
  not support.

All implementations give the same numbers up to rounding; `tests/model/test_kernels.py` compares them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

log = logging.getLogger(__name__)

Kernel = Callable[..., Any]
FUSED_MODULES = {"mamba_ssm": "model.cuda.fused_scan", "causal_conv1d": "model.cuda.fused_conv"}  # by package


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
def fused_module(package: str) -> ModuleType | None:
    """Return our module that calls the fused kernels of `package`, or None if the package is missing or broken.

    A package is broken, for example, if it was built for another version of torch or of the C library. The import then
    fails in any way that the package's code can fail; a sentence in the log gives the reason.
    """
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.import_module(FUSED_MODULES[package])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning("The package %s is installed but cannot be loaded, so plain PyTorch runs: %s", package, reason)
        return None


@cache
def has_fused(package: str) -> bool:
    """Return True if there is a CUDA device and the package `package` of fused kernels can be loaded."""
    return torch.cuda.is_available() and fused_module(package) is not None


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
    names = [name for name in FUSED_MODULES if has_fused(name)]
    return f"fused kernels from {' and '.join(names)}" if names else "plain PyTorch (no fused kernels can be loaded)"


def _fused_kernel(device: torch.device, package: str, name: str) -> Kernel | None:
    if device.type != "cuda" or not has_fused(package):
        return None
    kernel: Kernel = getattr(fused_module(package), name)
    return kernel


def plain_note(block: str, reason: str) -> str:
    """Return a sentence that says that all blocks of the kind `block` run plain PyTorch on a CPU."""
    return f"{block} run plain PyTorch, which is slower: the compiled CPU kernels do not support {reason}."


@cache
def log_plain(block: str, reason: str) -> None:
    """Log `plain_note` once.

    A plain block on a CPU must compute each token or row in calls of one fixed size, because `is_reproducible` promises
    that a token's bits do not depend on the other tokens of the batch.
    """
    log.warning(plain_note(block, reason))


def ssd_scan(device: torch.device) -> Kernel | None:
    """Return the fused kernel that scans packed requests, or None if plain PyTorch must run."""
    return _fused_kernel(device, "mamba_ssm", "ssd_scan")


def ssd_step(device: torch.device) -> Kernel | None:
    """Return the fused kernel that advances the state by one token per request, or None if plain PyTorch must run."""
    return _fused_kernel(device, "mamba_ssm", "ssd_step")


def causal_conv(device: torch.device) -> Kernel | None:
    """Return the fused kernel of the causal convolution, or None if plain PyTorch must run."""
    return _fused_kernel(device, "causal_conv1d", "causal_conv")
