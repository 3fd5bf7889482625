from __future__ import annotations

from pathlib import Path

import pytest
import ray

from tests.k8s.manifests import (
    Manifests,
    Plant,
    container,
    named,
    of_kind,
    ray_cluster,
    ray_service,
    render,
    worker_group,
)
from tests.k8s.schemas import SHARED, crd_version, is_builtin, schema_faults

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason=f"KubeRay's CRDs are not in {SHARED}")


def test_every_manifest_is_valid(manifests: Manifests) -> None:
    assert schema_faults(manifests) == []
    kinds = {each["kind"] for each in manifests if is_builtin(each)}
    assert kinds >= {"Namespace", "Secret", "ConfigMap", "Service", "ServiceAccount", "StatefulSet", "NetworkPolicy"}
    assert len(of_kind(manifests, "RayService")) == 1


def test_base_is_valid_by_itself(tree: Path) -> None:
    assert schema_faults(render(tree / "base")) == []


def test_the_versions_are_those_that_it_is_for(everything: Manifests) -> None:
    assert ray_cluster(everything)["rayVersion"] == ray.__version__
    assert crd_version() == "1.7"


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda m: ray_service(m)["spec"].update(serveConfig=""), "serveConfig"),
        (lambda m: ray_cluster(m).update(rayVersion=2.6), "rayVersion"),
        (lambda m: ray_cluster(m)["autoscalerOptions"].update(version="v3"), "version"),
        (lambda m: worker_group(m, "backbone").update(minReplica=1), "minReplica"),
        (lambda m: worker_group(m, "backbone").update(minReplicas="1"), "minReplicas"),
        (lambda m: worker_group(m, "backbone").pop("groupName"), "groupName"),
        (lambda m: container(m, "backbone").update(enviroment=[]), "enviroment"),
        (lambda m: container(m, "backbone")["ports"].append({"name": "serve", "containerPort": 1}), "serve occurs 2"),
        (lambda m: container(m, "head")["resources"]["limits"].update(memory="4 GB"), "memory"),
        (lambda m: ray_service(m).update(apiVersion="ray.io/v2"), "ray.io/v2"),
        (lambda m: named(m, "Service", "expertmesh-redis")["spec"].update(selectors={}), "selectors"),
        (lambda m: named(m, "Service", "expertmesh-redis")["spec"]["ports"][0].update(port="many"), "port"),
        (lambda m: container(m, "StatefulSet expertmesh-redis").update(readynessProbe={}), "readynessProbe"),
        (lambda m: of_kind(m, "PodDisruptionBudget")[0]["spec"].update(minAvailible=1), "minAvailible"),
        (lambda m: of_kind(m, "NetworkPolicy")[0]["spec"].update(ingres=[]), "ingres"),
        (lambda m: of_kind(m, "NetworkPolicy")[0].update(apiVersion="networking.k8s.io/v9"), "schema"),
    ],
)
def test_a_planted_fault_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(words in fault for fault in schema_faults(everything))
