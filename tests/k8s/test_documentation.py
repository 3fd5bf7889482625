"""docs/kubernetes.md: what it says to run here runs, and what it says to run on a cluster names what there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from services.cli import app
from tests.k8s.manifests import ROOT, Manifests, need_kubectl, of_kind

DOCUMENT = (ROOT / "docs" / "kubernetes.md").read_text()
BLOCKS = re.findall(r"^```(.*?)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
HERE = [code for kind, code in BLOCKS if kind == "sh here"]
CLUSTER = "\n".join(code for kind, code in BLOCKS if kind == "sh cluster")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the commands touch, without anybody's Secrets."""
    need_kubectl()
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "k8s", folder / "k8s", ignore=shutil.ignore_patterns("*.env"))
    (folder / "model").symlink_to(ROOT / "model")
    return folder


def test_every_block_says_where_it_runs() -> None:
    assert {kind for kind, _ in BLOCKS} == {"sh here", "sh cluster"}
    assert len(HERE) >= 5


@pytest.mark.parametrize("number", range(len(HERE)))
def test_what_runs_here_runs(number: int, checkout: Path) -> None:
    """In their order: some make the files that later ones read."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["/bin/bash", "-euo", "pipefail", "-c", HERE[number]]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_overlays_that_are_applied_exist() -> None:
    named = set(re.findall(r"(?:tests/)?k8s/[\w./-]+", DOCUMENT))
    assert {"k8s/overlays/cpu-demo", "k8s/overlays/gpu", "k8s/overlays/gpu-ha"} <= named
    paths = [f"{name}.example" if name.endswith(".env") else name.rstrip(".") for name in sorted(named)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_objects_that_are_asked_for_exist(rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered("gpu-ha")
    kinds = {"rayservice": "RayService", "service": "Service", "secret": "Secret"}
    asked = re.findall(r"\b(rayservice|service|secret)[/ ](expertmesh[\w-]*)", CLUSTER)
    assert len(asked) >= 4
    for kind, name in asked:
        assert name in {one["metadata"]["name"] for one in of_kind(manifests, kinds[kind])}


def test_our_commands_exist() -> None:
    commands: dict[str, object] = getattr(get_command(app), "commands")  # noqa: B009  click's types do not tell
    assert set(re.findall(r"^expertmesh (\w+)", "\n".join([*HERE, CLUSTER]), re.MULTILINE)) <= commands.keys()


def test_metrics_that_alerts_are_on_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "services" / "gateway").glob("*metrics.py"))
    names = set(re.findall(r"expertmesh:([a-z]\w+?)(?:_bucket)?\b", DOCUMENT))
    assert len(names) >= 5
    assert [name for name in sorted(names) if f'"{name}"' not in sources] == []
