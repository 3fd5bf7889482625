from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s import pod_rules
from tests.k8s.manifests import Manifest, Manifests, Plant, container, of_kind, ray_cluster, worker_group
from tests.k8s.pod_rules import DRAIN, RESTRICTED

RULES = (
    pod_rules.security_faults,
    pod_rules.token_faults,
    pod_rules.termination_faults,
    pod_rules.environment_faults,
    pod_rules.probe_faults,
    pod_rules.memory_faults,
    pod_rules.model_faults,
    pod_rules.log_faults,
    pod_rules.image_faults,
)
REDIS = "StatefulSet expertmesh-redis"


@pytest.mark.parametrize("rule", RULES)
def test_every_pod_keeps_to_the_rules(rule: Callable[[Manifests], list[str]], manifests: Manifests) -> None:
    assert rule(manifests) == []


def spec_of(manifests: Manifests, group: str) -> Manifest:
    spec: Manifest = worker_group(manifests, group)["template"]["spec"]
    return spec


def variable(manifests: Manifests, group: str, name: str) -> Manifest:
    return next(one for one in container(manifests, group)["env"] if one["name"] == name)


def config_of(manifests: Manifests) -> Manifest:
    data: Manifest = next(
        each["data"]
        for each in of_kind(manifests, "ConfigMap")
        if each["metadata"]["name"].startswith("expertmesh-redis")
    )
    return data


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda m: of_kind(m, "Namespace")[0]["metadata"]["labels"].pop(RESTRICTED), "restricted profile"),
        (lambda m: spec_of(m, "backbone")["securityContext"].pop("runAsNonRoot"), "group backbone may run as root"),
        (lambda m: spec_of(m, "backbone")["securityContext"].pop("seccompProfile"), "has no seccompProfile"),
        (lambda m: spec_of(m, "backbone").update(hostNetwork=True), "has hostNetwork"),
        (
            lambda m: spec_of(m, "backbone")["volumes"][1].update(hostPath={"path": "/"}),
            "group backbone has the volume",
        ),
        (lambda m: container(m, REDIS)["securityContext"].pop("allowPrivilegeEscalation"), "may gain privileges"),
        (lambda m: container(m, "head")["securityContext"].pop("capabilities"), "does not drop all capabilities"),
        (
            lambda m: spec_of(m, "backbone")["initContainers"][0].update(securityContext={"runAsUser": 0}),
            "container check-model may run as root",
        ),
        (lambda m: ray_cluster(m)["autoscalerOptions"].pop("securityContext"), "the autoscaler's container may gain"),
        (lambda m: of_kind(m, "ServiceAccount")[0].pop("automountServiceAccountToken"), "hands out tokens"),
        (lambda m: spec_of(m, "experts-gpu").pop("automountServiceAccountToken"), "a token that it does not need"),
        (lambda m: spec_of(m, "experts-gpu").pop("serviceAccountName"), "a token that it does not need"),
        (
            lambda m: ray_cluster(m)["headGroupSpec"]["template"]["spec"].update(
                serviceAccountName="expertmesh-worker"
            ),
            "has no token of the account",
        ),
        (lambda m: spec_of(m, "backbone").pop("terminationGracePeriodSeconds"), "a node's draining 120 s, a pod 30 s"),
        (lambda m: variable(m, "experts-cpu", DRAIN).update(value="30"), "a node's draining 30 s"),
        (lambda m: container(m, "head").update(env=[]), "group head has EXPERTMESH_ADMIN_KEY from None"),
        (
            lambda m: (
                variable(m, "backbone", "EXPERTMESH_ADMIN_KEY").pop("valueFrom"),
                variable(m, "backbone", "EXPERTMESH_ADMIN_KEY").update(value="in the open"),
            ),
            "EXPERTMESH_ADMIN_KEY from value",
        ),
        (
            lambda m: variable(m, "experts-gpu", "EXPERTMESH_NODE")["valueFrom"]["fieldRef"].update(
                fieldPath="metadata.name"
            ),
            "not the Kubernetes node's name",
        ),
        (lambda m: container(m, REDIS).pop("readinessProbe"), "has no readinessProbe"),
        (
            lambda m: container(m, "backbone")["resources"]["requests"].update(memory="1Gi"),
            "the requested memory is not the limit",
        ),
        (lambda m: container(m, REDIS)["resources"].pop("limits"), "the requested memory is not the limit"),
        (lambda m: container(m, "backbone")["volumeMounts"].pop(0), "group backbone has no /dev/shm"),
        (lambda m: spec_of(m, "backbone")["volumes"][0]["emptyDir"].pop("medium"), "has no /dev/shm in memory"),
        (lambda m: spec_of(m, "backbone")["volumes"][0]["emptyDir"].update(sizeLimit="64Mi"), "does not hold"),
        (lambda m: spec_of(m, "backbone")["volumes"][0]["emptyDir"].update(sizeLimit="60Gi"), "less than half"),
        (lambda m: container(m, "head")["volumeMounts"].pop(), "group head does not mount /models/"),
        (lambda m: container(m, "experts-gpu")["volumeMounts"][1].pop("readOnly"), "does not mount /models/"),
        (lambda m: spec_of(m, "backbone").pop("initContainers"), "group backbone starts without a check"),
        (
            lambda m: spec_of(m, "backbone")["initContainers"][0].update(
                command=["expertmesh", "check", "--model", "/x"]
            ),
            "group backbone starts without a check",
        ),
        (lambda m: config_of(m).update({"valkey.conf": "dir /data\nappendonly no"}), "does not write its log"),
        (lambda m: config_of(m).update({"valkey.conf": "dir /tmp\nappendonly yes"}), "does not write its log"),
        (lambda m: container(m, REDIS).update(image="valkey/valkey:8.1"), "is not pinned by a digest"),
        (lambda m: container(m, "backbone").update(image="expertmesh:latest"), "any version of our image"),
    ],
)
def test_a_planted_fault_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(words in fault for rule in RULES for fault in rule(everything))
