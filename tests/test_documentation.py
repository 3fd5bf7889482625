"""These tests check that the README and the documents name files, tests and sections that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.gateway.limits import GatewayLimits

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
FOLDERS = "model|cluster|protos|services|tests|k8s|docs|benchmarks"
# Parts of the paths of files and folders that a user makes by the instructions of docs/kubernetes.md.
MADE_BY_USERS = ("k8s/overlays/next", "redis.env", "admin.env")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document: Path) -> None:
    paths = set(re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*[\w/])", document.read_text()))
    missing = [path for path in paths if not (ROOT / path).exists() and not any(made in path for made in MADE_BY_USERS)]
    assert sorted(missing) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*#?[^)\s]*)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        name, _, section = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), f"{document.name} links to {target}"
        if section:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert section in anchors, f"{document.name} links to {target}"


def test_every_guarantee_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    guarantees = [block for block in re.split(r"\n\n", text) if block.startswith("**")]
    assert len(guarantees) >= 15
    for guarantee in guarantees:
        proofs = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", guarantee)
        assert proofs, f"no test is named: {guarantee[:80]}"
        for file, name in proofs:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"


def test_the_api_reference_lists_every_limit_with_its_default() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    section = text.partition("## Limits")[2].partition("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE))
    assert set(listed) == set(GatewayLimits.model_fields)
    for name, field in GatewayLimits.model_fields.items():
        if field.default is not None:
            assert listed[name] == f"{field.default:,}", name
