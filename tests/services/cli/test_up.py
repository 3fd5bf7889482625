"""The tests check what `expertmesh up` refuses before it starts any process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from services.args import AppArgs
from services.cli.start_steps import StepReport
from services.cli.up import check_gpus_of_this_machine, checked_args
from tests.services.application import expertmesh
from tests.services.demo import write_served

ON_CUDA: dict[str, Any] = {"device": "cuda", "pools": [{"device": "cuda", "shards": 3}]}


class Silent:
    def report(self, report: StepReport) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Do nothing."""


@pytest.fixture
def usable_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make PyTorch report four GPUs, whatever this machine has."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    return monkeypatch


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without CUDA")
@pytest.mark.parametrize("options", [(), ("--local-experts",)], ids=str)
def test_cuda_without_a_gpu_fails_at_once_with_one_sentence(options: tuple[str, ...]) -> None:
    started = time.monotonic()
    answer = expertmesh("up", "--device", "cuda", *options)
    assert time.monotonic() - started < 60  # mostly the time for importing torch; Ray would take longer
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("expertmesh: --device cuda needs a ")
    assert answer.stderr.endswith("or use --device cpu\n")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        (
            {"backbone_replicas": 2},
            r"the backbones \(2\) and the shards \(3\) need 5 GPUs, but this machine has 4",
        ),
        ({"pools": [{"device": "cuda", "shards": 4}]}, r"the backbones \(1\) and the shards \(4\) need 5 GPUs"),
        ({"pools": [{"device": "cuda", "shards": 8, "num_gpus": 0.25}]}, None),
        ({"experts": "local", "backbone_replicas": 5}, r"the backbones \(5\) need 5 GPUs"),
        ({"device": "cpu", "pools": [{"device": "cpu", "shards": 9}]}, None),
    ],
    ids=str,
)
def test_the_gpus_must_suffice(usable_gpus: object, changes: dict[str, Any], sentence: str | None) -> None:
    args = AppArgs(**(ON_CUDA | changes))
    if sentence is None:
        check_gpus_of_this_machine(args)
        return
    with pytest.raises(ValueError, match=sentence):
        check_gpus_of_this_machine(args)


def test_a_driver_that_is_too_old_is_one_sentence(usable_gpus: pytest.MonkeyPatch) -> None:
    usable_gpus.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"finds none that it can use; .* its driver supports CUDA 13\.0"):
        check_gpus_of_this_machine(AppArgs(**ON_CUDA))


def test_blocks_that_no_compiled_kernel_supports_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked_args({"model": str(write_served(tmp_path, "odd"))}, Silent(), is_joining=False)
    assert [line for line in capsys.readouterr().out.splitlines() if "plain PyTorch" in line] == [
        "The convolution and the state space of the Mamba-2 layers run plain PyTorch, which is slower: the compiled "
        "CPU kernels do not support ssm_state_size = 24, which is not a multiple of 16."
    ]


@pytest.mark.parametrize("is_joining", [False, True])
def test_a_model_without_routed_experts_is_served_without_shards(
    tmp_path: Path, is_joining: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write_served(tmp_path, "dense", hybrid_override_pattern="M-*")
    args = checked_args({"model": str(dense)}, Silent(), is_joining)
    assert args.experts == "local"
    assert "The model has no routed experts, so it is served without expert shards." in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without CUDA")
def test_in_a_cluster_other_nodes_may_have_the_gpus() -> None:
    assert checked_args(ON_CUDA, Silent(), is_joining=True).device == "cuda"
    with pytest.raises(ValueError, match="--device cuda needs a"):
        checked_args(ON_CUDA, Silent(), is_joining=False)
