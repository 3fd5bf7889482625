"""These tests run the commands of docs/kubernetes.md that need no cluster.

The other commands name objects; the tests check that these objects exist.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from typer.main import get_command

from services.cli.main import app
from tests.k8s.documentation import BLOCKS, CLUSTER, DOCUMENT, HERE, NEXT, run_here
from tests.k8s.manifests import ROOT, Manifests, need_kubectl, of_kind, ray_cluster, ray_pods


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with copies of the files that the commands use; a user's filled-in Secrets are not copied."""
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
    """Run the blocks of commands in the order of the document: some blocks make files that later blocks read."""
    run_here(HERE[number], checkout)


def test_overlays_that_are_applied_exist() -> None:
    named = set(re.findall(r"(?:tests/)?k8s/[\w./-]+", DOCUMENT.replace(f"k8s/overlays/{NEXT}", "")))
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


def test_pods_that_get_another_image_exist(rendered: Callable[[str], Manifests]) -> None:
    (groups,) = re.findall(r"^for group in ([\w/ ]+);", CLUSTER, re.MULTILINE)
    paths = re.findall(r"path: /spec/\$group/([\w/]+),", CLUSTER)
    assert len(paths) == 2
    for group, path in product(groups.split(), paths):
        value = ray_cluster(rendered("gpu"))
        for key in f"{group}/{path}".split("/"):
            value = value[int(key)] if key.isdigit() else value[key]
        assert str(value).startswith("expertmesh:")


def test_pods_that_are_selected_exist(rendered: Callable[[str], Manifests]) -> None:
    selected = set(re.findall(r"app\.kubernetes\.io/component=([\w-]+)", CLUSTER))
    assert selected
    assert selected <= {each.labels["app.kubernetes.io/component"] for each in ray_pods(rendered("gpu"))}


def test_our_commands_exist() -> None:
    commands: dict[str, object] = getattr(get_command(app), "commands")  # noqa: B009  click's types lack the attribute
    assert set(re.findall(r"^expertmesh (\w+)", "\n".join([*HERE, CLUSTER]), re.MULTILINE)) <= commands.keys()


def test_metrics_that_alerts_are_on_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "services" / "gateway" / "metrics").glob("*.py"))
    names = set(re.findall(r"expertmesh:([a-z]\w+?)(?:_bucket)?\b", DOCUMENT))
    assert len(names) >= 5
    assert [name for name in sorted(names) if f'"{name}"' not in sources] == []
