"""These tests check that every kustomization renders, and that a missing Secret is an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.k8s.manifests import K8S, OVERLAYS, Manifests, NotRendered, copy_with_secrets, need_kubectl, of_kind, render


def test_every_kustomization_renders(tree: Path) -> None:
    folders = [file.parent for file in tree.rglob("kustomization.yaml")]
    assert {folder.name for folder in folders} >= {"base", "redis", *OVERLAYS}
    for folder in folders:
        if folder.parent.name != "components":  # A component changes an overlay, and has no manifests itself.
            assert render(folder)


def test_every_file_is_part_of_one() -> None:
    """Check that every file is named by a kustomization. No other check would find a file that is left out."""
    named = {
        (file.parent / name).resolve()
        for file in K8S.rglob("kustomization.yaml")
        for word in file.read_text().split()
        for name in [word.strip('",')]
        if (file.parent / name).exists()
    }
    there = {file.resolve() for file in K8S.rglob("*") if file.suffix in (".yaml", ".conf")}
    assert {file for file in there if file.name != "kustomization.yaml"} <= named


@pytest.mark.parametrize("overlay", ["gpu", "gpu-ha", "gpu-fp8"])
def test_nothing_renders_without_its_secrets(overlay: str, tree: Path, tmp_path: Path) -> None:
    bare = tmp_path / "k8s"
    shutil.copytree(tree, bare, ignore=shutil.ignore_patterns("*.env"))
    with pytest.raises(NotRendered, match=r"redis\.env|admin\.env"):
        render(bare / "overlays" / overlay)


def test_a_patch_that_meets_another_group_is_refused(tmp_path: Path) -> None:
    """Check that a patch is refused if it meets a group with another name.

    A patch addresses a group by its position in a list, so the patch itself must test the group's name.
    """
    need_kubectl()
    tree = copy_with_secrets(tmp_path / "k8s")
    base = tree / "base" / "rayservice.yaml"
    base.write_text(base.read_text().replace("groupName: experts-cpu", "groupName: experts-xpu"))
    for overlay in OVERLAYS:
        with pytest.raises(NotRendered, match="groupName failed"):
            render(tree / "overlays" / overlay)


def test_all_is_in_one_namespace(manifests: Manifests) -> None:
    (namespace,) = of_kind(manifests, "Namespace")
    assert {each["metadata"].get("namespace") for each in manifests if each is not namespace} == {
        namespace["metadata"]["name"]
    }
