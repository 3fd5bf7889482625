from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s.manifests import (
    Manifest,
    Manifests,
    Plant,
    container,
    named,
    of_kind,
    ray_cluster,
    ray_service,
    rewrite_serve,
    worker_group,
)
from tests.k8s.references import expansion_faults, name_faults, port_faults, selector_faults


@pytest.mark.parametrize("faults", [selector_faults, port_faults, name_faults, expansion_faults])
def test_manifests_agree_with_one_another(faults: Callable[[Manifests], list[str]], manifests: Manifests) -> None:
    assert faults(manifests) == []


def spread(manifests: Manifests) -> Manifest:
    constraint: Manifest = worker_group(manifests, "experts-gpu")["template"]["spec"]["topologySpreadConstraints"][0]
    return constraint


def redis(manifests: Manifests) -> Manifest:
    return named(manifests, "StatefulSet", "expertmesh-redis")


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (
            lambda m: named(m, "Service", "expertmesh-redis")["spec"]["selector"].update(
                {"app.kubernetes.io/component": "reddis"}
            ),
            "Service expertmesh-redis selects",
        ),
        (
            lambda m: redis(m)["spec"]["selector"]["matchLabels"].update({"app.kubernetes.io/component": "gcs-redis"}),
            "StatefulSet expertmesh-redis selects",
        ),
        (
            lambda m: named(m, "PodDisruptionBudget", "expertmesh-backbone")["spec"]["selector"]["matchLabels"].update(
                {"ray.io/group": "backbone"}
            ),
            "PodDisruptionBudget expertmesh-backbone selects",
        ),
        (
            lambda m: named(m, "NetworkPolicy", "expertmesh-ray")["spec"]["podSelector"]["matchLabels"].update(
                {"expertmesh.io/runs": "rays"}
            ),
            "NetworkPolicy expertmesh-ray selects",
        ),
        (
            lambda m: named(m, "NetworkPolicy", "expertmesh-redis")["spec"]["ingress"][0]["from"][0]["podSelector"][
                "matchLabels"
            ].update({"expertmesh.io/runs": "rays"}),
            "NetworkPolicy expertmesh-redis, ingress selects",
        ),
        (
            lambda m: spread(m)["labelSelector"]["matchLabels"].update({"app.kubernetes.io/component": "backbone"}),
            "group experts-gpu, spread over kubernetes.io/hostname selects",
        ),
    ],
)
def test_a_selector_that_finds_nothing_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(words in fault for fault in selector_faults(everything))


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (
            lambda m: named(m, "Service", "expertmesh-redis")["spec"]["ports"][0].update(targetPort="valkey"),
            "sends to port valkey",
        ),
        (lambda m: container(m, "StatefulSet expertmesh-redis").pop("ports"), "sends to port redis"),
        (lambda m: rewrite_serve(m, "port: 8000", "port: 8080"), "has serve on port 8000, and serveConfigV2 on 8080"),
        (lambda m: container(m, "backbone")["ports"][2].update(containerPort=9001), "has serve-grpc on port 9001"),
        (lambda m: container(m, "head")["ports"].pop(), "has serve-grpc on port None"),
        (
            lambda m: rewrite_serve(m, "http_port: 8001", "http_port: 8002"),
            "rest on port 8001, and gateways listen on 8002",
        ),
        (lambda m: rewrite_serve(m, "grpc_port: 9001", ""), "has grpc on port 9001, and gateways listen on None"),
        (
            lambda m: named(m, "Service", "expertmesh")["spec"]["ports"][1].pop("appProtocol"),
            "the port grpc of Service expertmesh does not have the appProtocol",
        ),
        (
            lambda m: named(m, "Service", "expertmesh")["spec"]["selector"].update(
                {"app.kubernetes.io/component": "experts-gpu"}
            ),
            "Service expertmesh sends to port rest",
        ),
        (
            lambda m: ray_service(m)["spec"]["serveService"]["spec"]["ports"][1].update(name="grpc"),
            "do not both have a port grpc",
        ),
        (
            lambda m: ray_service(m)["spec"]["serveService"]["spec"]["ports"][0].update(targetPort=80),
            "serveService has serve on ports (8000, 80)",
        ),
        (
            lambda m: ray_service(m)["spec"]["serveService"]["spec"]["ports"][1].update(appProtocol="http"),
            "the port serve-grpc of serveService does not have the appProtocol",
        ),
        (
            lambda m: named(m, "NetworkPolicy", "expertmesh-ray")["spec"]["ingress"][1]["ports"].append({"port": 9999}),
            "allows ingress to port 9999",
        ),
        (
            lambda m: named(m, "NetworkPolicy", "expertmesh-ray")["spec"]["egress"][1]["ports"][0].update(port=6380),
            "allows egress to port 6380",
        ),
        (
            lambda m: container(m, "StatefulSet expertmesh-redis")["livenessProbe"]["tcpSocket"].update(port="data"),
            "livenessProbe asks port data",
        ),
        (
            lambda m: container(m, "head")["env"][0].update(value="redis://expertmesh-redis:6380/0"),
            "redis://expertmesh-redis:6380/0 is no Service's address",
        ),
        (
            lambda m: ray_cluster(m)["gcsFaultToleranceOptions"].update(redisAddress="gcs-redis:6379"),
            "redis://gcs-redis:6379 is no Service's address",
        ),
    ],
)
def test_a_port_that_does_not_match_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(words in fault for fault in port_faults(everything))


def without(kind: str, prefix: str) -> Plant:
    def plant(manifests: Manifests) -> None:
        (gone,) = [each for each in of_kind(manifests, kind) if each["metadata"]["name"].startswith(prefix)]
        manifests.remove(gone)

    return plant


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (without("Secret", "expertmesh-redis"), "names Secret expertmesh-redis, which does not exist"),
        (without("Secret", "expertmesh-admin"), "RayService expertmesh names Secret expertmesh-admin"),
        (without("Secret", "gcs-"), "RayService expertmesh names Secret gcs-expertmesh-redis"),
        (without("ConfigMap", "expertmesh-redis"), "names ConfigMap expertmesh-redis"),
        (without("PersistentVolumeClaim", ""), "names PersistentVolumeClaim expertmesh-models"),
        (without("ServiceAccount", "expertmesh-worker"), "names ServiceAccount expertmesh-worker"),
        (without("Service", "gcs-"), "StatefulSet gcs-expertmesh-redis names Service gcs-expertmesh-redis"),
        (
            lambda m: named(m, "Secret", "expertmesh-admin").update(data={"keys": ""}),
            "names key key of Secret expertmesh-admin, which has ['keys']",
        ),
        (lambda m: container(m, "backbone")["volumeMounts"][0].update(name="shm"), "mounts volume shm"),
        (
            lambda m: worker_group(m, "backbone")["template"]["spec"]["volumes"].append({"name": "x", "emptyDir": {}}),
            "has volume x, which it does not mount",
        ),
        (lambda m: redis(m)["spec"].pop("volumeClaimTemplates"), "mounts volume data, which it does not have"),
    ],
)
def test_a_name_that_is_not_there_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(words in fault for fault in name_faults(everything))


def test_a_variable_that_is_not_there_is_found(everything: Manifests) -> None:
    container(everything, "StatefulSet expertmesh-redis")["env"][0]["name"] = "PASSWORD"
    assert "$(REDISCLI_AUTH) is none of ['PASSWORD']" in " ".join(expansion_faults(everything))
