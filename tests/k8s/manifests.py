"""The functions in this file render manifests with `kubectl kustomize`, and look up objects and pods in them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]
Manifests = list[Manifest]
Plant = Callable[[Manifests], object]  # a function that puts a fault into manifests

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("cpu-demo", "gpu", "gpu-ha", "gpu-fp8", "gpu-nvfp4", "gpu-deepseek", "gpu-qwen")
SECRET_VALUE = "a-value-of-these-tests"


class NotRendered(ValueError):
    """A `NotRendered` error means that kubectl cannot render a kustomization; its message is kubectl's message."""


def need_kubectl() -> None:
    """Skip the test if kubectl is not installed."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders kustomizations, is not installed, and no package of PyPI does it")


def copy_with_secrets(target: Path) -> Path:
    """Copy k8s/ to `target` and return `target`; in the copy, every example of a Secret is filled in with values."""
    shutil.copytree(K8S, target, ignore=shutil.ignore_patterns("*.env"))
    for example in target.rglob("*.env.example"):
        lines = [f"{line.rstrip()}{SECRET_VALUE}" for line in example.read_text().splitlines()]
        example.with_suffix("").write_text("\n".join(lines))
    return target


def render(folder: Path) -> Manifests:
    """Return the manifests of the kustomization in a folder. Raise NotRendered if kubectl cannot render it."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise NotRendered(done.stderr.strip())
    return [manifest for manifest in yaml.load_all(done.stdout, yaml.CSafeLoader) if manifest]


def of_kind(manifests: Manifests, kind: str) -> Manifests:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def named(manifests: Manifests, kind: str, name: str) -> Manifest:
    return next(manifest for manifest in of_kind(manifests, kind) if manifest["metadata"]["name"] == name)


def title(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def ray_service(manifests: Manifests) -> Manifest:
    (service,) = of_kind(manifests, "RayService")
    return service


def ray_cluster(manifests: Manifests) -> Manifest:
    cluster: Manifest = ray_service(manifests)["spec"]["rayClusterConfig"]
    return cluster


def worker_group(manifests: Manifests, name: str) -> Manifest:
    groups: Manifests = ray_cluster(manifests)["workerGroupSpecs"]
    return next(group for group in groups if group["groupName"] == name)


def serve_config(manifests: Manifests) -> Manifest:
    config: Manifest = yaml.load(ray_service(manifests)["spec"]["serveConfigV2"], yaml.CSafeLoader)
    return config


def app_args(manifests: Manifests) -> Manifest:
    args: Manifest = serve_config(manifests)["applications"][0]["args"]
    return args


@dataclass(frozen=True)
class Pods:
    """A `Pods` describes all pods that are made from one template.

    - `owner`: kind and name of the object that contains the template, for messages
    - `group`: name of the group in the RayCluster; "head" for the head; empty for pods outside the RayCluster
    - `claims`: names of the volumes that a StatefulSet creates for each of its pods
    """

    owner: str
    group: str
    labels: dict[str, str]
    spec: Manifest
    claims: tuple[str, ...] = ()

    @property
    def is_head(self) -> bool:
        return self.group == "head"

    @property
    def main(self) -> Manifest:
        container: Manifest = self.spec["containers"][0]
        return container

    @property
    def containers(self) -> Manifests:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for each in self.containers for port in each.get("ports", ())}


def pods(manifests: Manifests) -> list[Pods]:
    return [*_pods_of_sets(manifests), *ray_pods(manifests)]


def _pods_of_sets(manifests: Manifests) -> Iterator[Pods]:
    for manifest in of_kind(manifests, "StatefulSet"):
        spec = manifest["spec"]
        claims = tuple(claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ()))
        template = spec["template"]
        yield Pods(title(manifest), "", template["metadata"]["labels"], template["spec"], claims)


def ray_pods(manifests: Manifests) -> list[Pods]:
    """Return one `Pods` for each group of the RayCluster; the head comes first.

    As in KubeRay, a pod has the labels of its template and also the labels of its group.
    """
    cluster = ray_cluster(manifests)
    groups = [("head", cluster["headGroupSpec"]), *((each["groupName"], each) for each in cluster["workerGroupSpecs"])]
    return [
        Pods(
            f"{title(ray_service(manifests))}, group {name}",
            name,
            {**group.get("labels", {}), **group["template"]["metadata"]["labels"]},
            group["template"]["spec"],
        )
        for name, group in groups
    ]


def quantity(text: str | int) -> float:
    """Convert a Kubernetes quantity, such as 500m, 4Gi or 2, to a number."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    text = str(text)
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


def container(manifests: Manifests, owner: str) -> Manifest:
    """Return the first container of the pods whose `owner` or `group` equals the argument `owner`."""
    return next(each for each in pods(manifests) if owner in (each.group, each.owner)).main


def rewrite_serve(manifests: Manifests, old: str, new: str) -> None:
    """Replace `old` by `new` in the text of serveConfigV2. The text must contain `old`."""
    spec = ray_service(manifests)["spec"]
    assert old in spec["serveConfigV2"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)
