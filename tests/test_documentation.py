"""These tests check that the README and the documents name files, tests and sections that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.sizing.fit import GIB, Slo
from cluster.sizing.gpus import GB, MB, gpu_of
from cluster.sizing.known_models import known_config
from cluster.sizing.sizing import size
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


@pytest.mark.parametrize(("column", "model", "num_backbones"), [(2, "deepseek-v3", 2), (3, "qwen3-coder-next", 1)])
def test_the_table_of_network_and_volume_has_the_numbers_of_size(column: int, model: str, num_backbones: int) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("\n## Network and volume")[2].partition("\n## ")[0]
    found = [line.split("|")[column].strip() for line in section.splitlines() if line.startswith("|")][2:]
    made = size(known_config(model), gpu_of("h200"), "fp8", Slo(min_backbones=num_backbones))
    out, back = made.out_bytes_per_token / MB, made.back_bytes_per_token / MB
    assert found == [
        f"{made.backbone_gpus} + {made.expert_gpus}",
        f"{made.unique_shards:.2f}",
        f"{out:.2f} / {back:.2f} MB",
        f"{out / made.expert_gpus:.2f} / {back / made.expert_gpus:.2f} MB",
        f"{made.requests_per_backbone * 10}",
        f"{made.backbone_link_bits_per_s / GB:.0f} / {made.shard_link_bits_per_s / GB:.0f} Gbit/s",
        f"{made.checkpoint_bytes / GB:.1f} GB / {made.volume_bytes // GIB} GiB",
        f"{made.shard_read_bytes / GB:.1f} / {made.backbone_read_bytes / GB:.1f} GB",
        f"{made.start_bytes_per_s / GB:.2f} GB/s",
        f"{made.shard_read_bytes / (2 * GB):.0f} s",
    ]
