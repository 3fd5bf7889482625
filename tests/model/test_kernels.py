"""The tests check which implementation runs; `tests/model/cuda` compares the fused kernels with plain PyTorch."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from model import kernels
from tests.model.cuda.fused import ON_GPU

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
    assert kernels.describe("cuda") == f"plain PyTorch (no fused kernels can be loaded){DOUBT}"


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA, mamba-ssm and causal-conv1d")
def test_on_a_gpu_the_fused_kernels_run() -> None:
    modules = [get_kernel(torch.device("cuda")).__module__ for get_kernel in KERNEL_GETTERS]
    assert modules == ["model.cuda.fused_scan", "model.cuda.fused_scan", "model.cuda.fused_conv"]
    assert kernels.describe("cuda") == f"fused kernels from mamba_ssm and causal_conv1d{DOUBT}"


@pytest.fixture
def broken_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a mamba-ssm whose compiled part is no library, and a causal-conv1d whose import fails, on `sys.path`."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
    (tmp_path / "selective_scan_cuda.so").write_bytes(b"no library")
    (tmp_path / "causal_conv1d.py").write_text("raise RuntimeError('built for CUDA 12\\nfound CUDA 13')\n")
    for name in [n for n in sys.modules if n.partition(".")[0] in ("mamba_ssm", "causal_conv1d")]:
        monkeypatch.delitem(sys.modules, name)
    for function in ("fused_module", "has_fused"):
        monkeypatch.setattr(kernels, function, getattr(kernels, function).__wrapped__)
    for name in kernels.FUSED_MODULES.values():
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_broken_package_means_plain_pytorch_and_a_sentence_in_the_log(
    broken_packages: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.WARNING):
        assert [get_kernel(torch.device("cuda")) for get_kernel in KERNEL_GETTERS[1:]] == [None, None]
        assert kernels.describe("cuda") == f"plain PyTorch (no fused kernels can be loaded){DOUBT}"
    sentence = "The package {} is installed but cannot be loaded, so plain PyTorch runs: {}"
    messages = [record.message for record in caplog.records]
    assert messages[0].startswith(sentence.format("mamba_ssm", "ImportError: "))
    assert "selective_scan_cuda.so" in messages[0]
    assert messages[1] == sentence.format("causal_conv1d", "RuntimeError: built for CUDA 12")
