from __future__ import annotations

import pytest

from tests.k8s.kuberay import kuberay_faults
from tests.k8s.manifests import Manifests, Plant, container, ray_cluster, ray_service, worker_group


def test_the_operator_takes_every_overlay(manifests: Manifests) -> None:
    assert kuberay_faults(manifests) == []


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda m: ray_service(m)["spec"]["upgradeStrategy"].update(type="Bogus"), "upgradeStrategy.type is Bogus"),
        (lambda m: ray_service(m)["spec"].pop("upgradeStrategy"), "upgradeStrategy.type is None"),
        (lambda m: ray_service(m)["metadata"].update(name="x" * 48), "at most 47 characters"),
        (lambda m: ray_service(m)["spec"].pop("excludeHeadPodFromServeSvc"), "clients are sent to the head"),
        (lambda m: ray_cluster(m).pop("enableInTreeAutoscaling"), "the autoscaler is off"),
        (lambda m: ray_cluster(m)["autoscalerOptions"].update(version="v1"), "not version v2"),
        (lambda m: ray_cluster(m)["autoscalerOptions"].pop("idleTimeoutSeconds"), "idleTimeoutSeconds"),
        (
            lambda m: ray_cluster(m)["gcsFaultToleranceOptions"].update(externalStorageNamespace="x"),
            "externalStorageNamespace",
        ),
        (lambda m: ray_cluster(m)["gcsFaultToleranceOptions"].pop("redisPassword"), "redisPassword"),
        (lambda m: ray_cluster(m)["headGroupSpec"]["rayStartParams"].pop("num-cpus"), "num-cpus of the head"),
        (lambda m: ray_cluster(m).pop("authOptions"), "authOptions do not ask for a token"),
        (lambda m: container(m, "head")["ports"][1].update(name="ui"), "has no port dashboard 8265"),
        (lambda m: worker_group(m, "experts-cpu").update(groupName="backbone"), "each needs a name of its own"),
        (lambda m: worker_group(m, "backbone").update(minReplicas=9), "group backbone has 9 replicas of 9 to 3"),
        (lambda m: worker_group(m, "backbone")["rayStartParams"].update(labels="a=b"), "labels in rayStartParams"),
        (
            lambda m: worker_group(m, "backbone").update(resources={}, rayStartParams={"num-cpus": "1"}),
            "resources twice",
        ),
        (lambda m: worker_group(m, "backbone")["template"]["spec"].update(restartPolicy="Always"), "must be Never"),
        (
            lambda m: ray_cluster(m)["headGroupSpec"]["template"]["metadata"]["labels"].update(
                {"app.kubernetes.io/name": "expertmesh"}
            ),
            "sets app.kubernetes.io/name",
        ),
        (lambda m: container(m, "experts-gpu").update(readinessProbe={}), "sets readinessProbe"),
        (lambda m: container(m, "backbone").update(livenessProbe={}), "sets livenessProbe"),
        (lambda m: container(m, "backbone").pop("readinessProbe"), "is not Ready by its gateway's own word"),
        (
            lambda m: container(m, "backbone")["readinessProbe"]["httpGet"].update(path="/health/live"),
            "is not Ready by its gateway's own word",
        ),
        (lambda m: container(m, "head")["env"].append({"name": "REDIS_PASSWORD", "value": ""}), "KubeRay's to set"),
        (lambda m: container(m, "head").update(command=["sleep"]), "a command of its own"),
    ],
)
def test_a_planted_fault_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(words in fault for fault in kuberay_faults(everything))
