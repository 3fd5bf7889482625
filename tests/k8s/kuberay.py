"""`kuberay_faults` finds the settings of a RayService that KubeRay refuses or handles badly.

The schema of a RayService does not exclude any of these faults.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.k8s.manifests import Manifest, Manifests, Pods, app_args, ray_cluster, ray_pods, ray_service

UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
MAX_NAME = 47  # maximum number of characters in the name of a RayService
# KubeRay selects the head by these labels.
OPERATORS_LABELS = (
    "app.kubernetes.io/name",
    "app.kubernetes.io/created-by",
)
OPERATORS_VARIABLES = (  # environment variables that KubeRay itself sets
    *("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_ADDRESS", "FQ_RAY_IP", "RAY_IP"),
    *("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"),
)


def kuberay_faults(manifests: Manifests) -> list[str]:
    cluster = ray_cluster(manifests)
    return [
        *_service_faults(ray_service(manifests)),
        *_cluster_faults(cluster),
        *(fault for group in cluster["workerGroupSpecs"] for fault in _group_faults(group)),
        *(fault for each in ray_pods(manifests) for fault in _pod_faults(each, app_args(manifests))),
    ]


def _service_faults(service: Manifest) -> Iterator[str]:
    name, upgrade = service["metadata"]["name"], service["spec"].get("upgradeStrategy", {}).get("type")
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"{name} is not a DNS label of at most {MAX_NAME} characters"
    if upgrade not in UPGRADES:
        yield f"upgradeStrategy.type is {upgrade}; it must say one of {UPGRADES}"
    if not service["spec"].get("excludeHeadPodFromServeSvc"):
        yield "excludeHeadPodFromServeSvc is not set, so clients are sent to the head"


def _cluster_faults(cluster: Manifest) -> Iterator[str]:
    autoscaler, gcs = cluster.get("autoscalerOptions", {}), cluster.get("gcsFaultToleranceOptions")
    if not cluster.get("enableInTreeAutoscaling") or autoscaler.get("version") != "v2":
        yield "the autoscaler is off, or is not version v2; only version v2 chooses nodes by labels"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions do not ask for a token, so whoever reaches a port of Ray may run code"
    if "idleTimeoutSeconds" not in autoscaler:
        yield "autoscalerOptions do not say idleTimeoutSeconds"
    if gcs and "externalStorageNamespace" in gcs:
        yield "both clusters of an upgrade would write into externalStorageNamespace"
    if gcs and "valueFrom" not in gcs.get("redisPassword", {}):
        yield "redisPassword of gcsFaultToleranceOptions is not from a Secret"
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "num-cpus of the head is not 0, so replicas may start there"
    ports = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    if ("dashboard", 8265) not in [(port["name"], port["containerPort"]) for port in ports]:
        yield "the head has no port dashboard 8265, by which KubeRay deploys serveConfigV2"
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    if len(set(names)) < len(names):
        yield f"worker groups are named {names}; each needs a name of its own"


def _group_faults(group: Manifest) -> Iterator[str]:
    name, least, most = group["groupName"], group.get("minReplicas", 0), group.get("maxReplicas", 0)
    if not least <= group.get("replicas", least) <= most:
        yield f"group {name} has {group.get('replicas', least)} replicas of {least} to {most}"
    if "labels" in group.get("rayStartParams", {}):
        yield f"group {name} has labels in rayStartParams, which KubeRay refuses; they belong into labels of the group"
    if "resources" in group and {"num-cpus", "num-gpus", "memory", "resources"} & group["rayStartParams"].keys():
        yield f"group {name} has resources twice, in resources and in rayStartParams"


def _pod_faults(each: Pods, args: Manifest) -> Iterator[str]:
    if each.spec.get("restartPolicy", "Never") != "Never":
        yield f"{each.owner} has restartPolicy {each.spec['restartPolicy']}; under autoscaler v2 it must be Never"
    for label in OPERATORS_LABELS:
        if label in each.labels:
            yield f"{each.owner} sets {label}, by which KubeRay's Service finds the head"
    has_gateway = args["labels"].items() <= each.labels.items()
    asked = each.main.get("readinessProbe", {}).get("httpGet", {})
    port = each.ports.get(asked.get("port"), asked.get("port"))
    if has_gateway and (asked.get("path"), port) != ("/health/ready", args.get("http_port")):
        yield f"{each.owner} is not Ready by its gateway's own word, /health/ready on port {args.get('http_port')}"
    for probe in ("livenessProbe",) if has_gateway else ("readinessProbe", "livenessProbe"):
        if probe in each.main:
            yield f"{each.owner} sets {probe}, so KubeRay leaves out its own"
    for variable in each.main.get("env", ()):
        if variable["name"] in OPERATORS_VARIABLES:
            yield f"{each.owner} sets {variable['name']}, which is KubeRay's to set"
    if "command" in each.main or "args" in each.main:
        yield f"{each.owner} has a command of its own in front of KubeRay's ray start"
