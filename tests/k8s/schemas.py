"""`schema_faults` checks each manifest against the schema of its kind. An unknown field is a fault."""

from __future__ import annotations

import importlib.util
import json
import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.k8s.manifests import ROOT, Manifest, Manifests, title

SHARED = ROOT.parent / "shared"
CRDS = SHARED / "crds" / "ray.io_rayservices.yaml"
VALIDATOR = SHARED / "tools" / "validate_crd.py"
KUBERNETES = "1.33"  # the oldest version of Kubernetes that the manifests support


@cache
def _validator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("validate_crd", VALIDATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _schemas(path: Path) -> dict[tuple[str, str], tuple[Any, jsonschema.Draft202012Validator]]:
    """Return, for each (apiVersion, kind) in a file of CRDs, a pair (schema of the CRD, validator).

    The schema contains the default values. The validator checks the same schema, but also refuses unknown fields.
    """
    crd = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
    schemas = {
        (f"{crd['group']}/{version['name']}", crd["names"]["kind"]): version["schema"]["openAPIV3Schema"]
        for version in crd["versions"]
        if version["served"]
    }
    closed = {key: jsonschema.Draft202012Validator(_validator().strictify(one)) for key, one in schemas.items()}
    return {key: (schemas[key], closed[key]) for key in schemas}


def is_builtin(manifest: Manifest) -> bool:
    """Return True if the manifest's API group is part of Kubernetes: v1, apps/v1, or a group that ends in .k8s.io."""
    group = manifest["apiVersion"].rpartition("/")[0]
    return "." not in group or group.endswith(".k8s.io")


def schema_faults(manifests: Manifests) -> list[str]:
    return [fault for manifest in manifests for fault in _faults(json.dumps(manifest))]


@cache
def _faults(text: str) -> list[str]:
    """Return the faults of one manifest. The manifest is JSON text, because the cache needs a hashable argument."""
    manifest: Manifest = json.loads(text)
    return _builtin_faults(manifest) if is_builtin(manifest) else _crd_faults(manifest)


def _builtin_faults(manifest: Manifest) -> list[str]:
    """Return a list with the first fault of a manifest, or an empty list. The library reports only the first fault."""
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{title(manifest)}: {'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{title(manifest)}: {error.message}"]
    return []


def _crd_faults(manifest: Manifest) -> list[str]:
    known = _schemas(CRDS)
    key = (manifest["apiVersion"], manifest["kind"])
    if key not in known:
        return [f"{title(manifest)}: {manifest['apiVersion']} is in none of the CRDs, {CRDS.name}"]
    crd, closed = known[key]
    complete = deepcopy(manifest)
    _validator().apply_defaults(crd, complete)
    return [
        f"{title(manifest)}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in closed.iter_errors(complete)
    ] + _duplicates(manifest)


def _duplicates(value: Any, path: str = "") -> list[str]:
    """Return a fault for each name that occurs twice in a list, such as two ports with one name.

    Kubernetes treats such a list as a map from name to item. JSON Schema has no rule for this, so the test checks it.
    """
    if isinstance(value, dict):
        return [fault for key, one in value.items() for fault in _duplicates(one, f"{path}.{key}")]
    if not isinstance(value, list):
        return []
    names = [one.get("name") or one.get("groupName") for one in value if isinstance(one, dict)]
    twice = {name for name in names if name and names.count(name) > 1}
    faults = [f"{path.lstrip('.')}: {name} occurs {names.count(name)} times" for name in sorted(twice)]
    return faults + [fault for i, one in enumerate(value) for fault in _duplicates(one, f"{path}.{i}")]


def crd_version() -> str:
    """Return the version of KubeRay from which the CRDs in `SHARED` come."""
    found = re.search(r"v(\d+\.\d+)", (SHARED / "crds" / "VERSION").read_text())
    assert found is not None
    return found.group(1)
