"""The functions in this file find pods that break our rules for pods.

The rules are about security, images, API tokens, termination, environment variables, probes, memory, the model and the
log of Redis.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.app import SHARD_STOP_TIMEOUT_S
from tests.k8s.manifests import (
    Manifest,
    Manifests,
    Pods,
    app_args,
    named,
    of_kind,
    pods,
    quantity,
    ray_cluster,
    ray_pods,
    title,
)

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
RESTRICTED = "pod-security.kubernetes.io/enforce"
VARIABLES = {  # variable of every Ray container -> the field of `env` from which the value comes
    "EXPERTMESH_REDIS_URL": "value",
    "EXPERTMESH_REDIS_PASSWORD": "secretKeyRef",
    "EXPERTMESH_ADMIN_KEY": "secretKeyRef",
    "EXPERTMESH_NODE": "fieldRef",
    DRAIN: "value",
}


def security_faults(manifests: Manifests) -> list[str]:
    """Return the violations of Kubernetes' security profile "restricted"; the namespace must enforce the profile.

    Only the rules of the profile for fields that our pods use are checked.
    """
    faults = [
        f"{title(namespace)} does not enforce the restricted profile"
        for namespace in of_kind(manifests, "Namespace")
        if namespace["metadata"].get("labels", {}).get(RESTRICTED) != "restricted"
    ]
    for each in pods(manifests):
        faults += _pod_security_faults(each)
        for container in each.containers:
            faults += _container_faults(f"{each.owner}, container {container['name']}", container)
    autoscaler = ray_cluster(manifests).get("autoscalerOptions", {})
    return faults + list(_container_faults("the autoscaler's container", autoscaler))


def image_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each image whose reference may stand for different images at different times.

    A reference to our own image must have a version; a reference to another image must have a digest.
    """
    faults = []
    for each in pods(manifests):
        for container in each.containers:
            name, _, version = container["image"].rpartition("/")[2].partition(":")
            if name == "expertmesh" and version in ("", "latest"):
                faults.append(f"{each.owner} runs any version of our image")
            if name != "expertmesh" and "@sha256:" not in version:
                faults.append(f"{each.owner} runs {container['image']}, which is not pinned by a digest")
    return sorted(set(faults))


def _pod_security_faults(each: Pods) -> Iterator[str]:
    context = each.spec.get("securityContext", {})
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        yield f"{each.owner} may run as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{each.owner} has no seccompProfile RuntimeDefault"
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if each.spec.get(field):
            yield f"{each.owner} has {field}"
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected", "downwardAPI"}
    for volume in each.spec.get("volumes", ()):
        if not volume.keys() - {"name"} <= allowed:
            yield f"{each.owner} has the volume {volume}; allowed are {sorted(allowed)}"


def _container_faults(name: str, container: Manifest) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"{name} may gain privileges"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name} does not drop all capabilities"
    if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
        yield f"{name} may run as root"


def token_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each pod that wrongly has, or wrongly lacks, a token for the Kubernetes API.

    Only the head may call the API. The head's template names no account, so KubeRay makes an account for the head.
    """
    faults = [
        f"{title(account)} hands out tokens"
        for account in of_kind(manifests, "ServiceAccount")
        if account.get("automountServiceAccountToken") is not False
    ]
    for each in pods(manifests):
        if each.is_head:
            if "serviceAccountName" in each.spec or each.spec.get("automountServiceAccountToken") is False:
                faults.append(f"{each.owner} has no token of the account that KubeRay makes for the autoscaler")
        elif each.spec.get("automountServiceAccountToken") is not False or "serviceAccountName" not in each.spec:
            faults.append(f"{each.owner} may have a token that it does not need")
    return faults


def termination_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each pod whose termination times are in the wrong order.

    A Ray node must drain longer than a shard takes to stop. Kubernetes must wait longer than the Ray node drains.
    """
    faults = []
    for each in ray_pods(manifests):
        grace = each.spec.get("terminationGracePeriodSeconds", 30)
        drain = float(variable_of(each, DRAIN) or 0)
        if not grace > drain > SHARD_STOP_TIMEOUT_S:
            numbers = f"a shard {SHARD_STOP_TIMEOUT_S:g} s, a node's draining {drain:g} s, a pod {grace} s"
            faults.append(f"{each.owner}: {numbers}; each time must be longer than the time before it")
    return faults


def variable_of(each: Pods, name: str) -> str | None:
    """Return the value of the environment variable `name`, or None if the manifest does not contain the value."""
    return next((variable.get("value") for variable in each.main.get("env", ()) if variable["name"] == name), None)


def environment_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each environment variable that a Ray container lacks or gets from the wrong source.

    The head needs the variables too, because Serve may build the application on any node.
    """
    faults = []
    for each in ray_pods(manifests):
        given = {
            variable["name"]: "value" if "value" in variable else next(iter(variable["valueFrom"]))
            for variable in each.main.get("env", ())
        }
        for name, source in VARIABLES.items():
            if given.get(name) != source:
                faults.append(f"{each.owner} has {name} from {given.get(name)}, and not from {source}")
        node = [v for v in each.main.get("env", ()) if v["name"] == "EXPERTMESH_NODE" and "valueFrom" in v]
        if any(variable["valueFrom"].get("fieldRef", {}).get("fieldPath") != "spec.nodeName" for variable in node):
            faults.append(f"{each.owner} has an EXPERTMESH_NODE that is not the Kubernetes node's name")
    return faults


def probe_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each probe that a container lacks.

    The pods of Ray are left out, because KubeRay adds probes to these pods (see kuberay.py).
    """
    return [
        f"{each.owner}, container {container['name']}, has no {probe}"
        for each in pods(manifests)
        if not each.group
        for container in each.spec["containers"]
        for probe in ("readinessProbe", "livenessProbe")
        if probe not in container
    ]


def memory_faults(manifests: Manifests) -> list[str]:
    """Return the faults in the memory settings of pods.

    The memory request of a container must equal its memory limit. The shared memory must be large enough for Ray's
    object store; the shared memory counts towards the limit.
    """
    faults = []
    for each in pods(manifests):
        for container in each.containers:
            resources = container.get("resources", {})
            requested = resources.get("requests", {}).get("memory")
            if requested is None or requested != resources.get("limits", {}).get("memory"):
                faults.append(f"{each.owner}, container {container['name']}: the requested memory is not the limit")
    cluster = ray_cluster(manifests)
    starts = [each["rayStartParams"] for each in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for each, start in zip(ray_pods(manifests), starts, strict=True):
        faults += _shared_memory_faults(each, int(start.get("object-store-memory", 0)))
    return faults


def _shared_memory_faults(each: Pods, object_store: int) -> Iterator[str]:
    mounts = [mount["name"] for mount in each.main.get("volumeMounts", ()) if mount["mountPath"] == "/dev/shm"]
    volumes = [volume.get("emptyDir", {}) for volume in each.spec.get("volumes", ()) if volume["name"] in mounts]
    if [volume.get("medium") for volume in volumes] != ["Memory"] or "sizeLimit" not in volumes[0]:
        yield f"{each.owner} has no /dev/shm in memory with a limit"
    elif not 0 < object_store <= quantity(volumes[0]["sizeLimit"]):
        yield f"{each.owner} has an object store of {object_store} bytes, which /dev/shm does not hold"
    elif quantity(volumes[0]["sizeLimit"]) >= quantity(each.main["resources"]["limits"]["memory"]) / 2:
        yield f"{each.owner} has half of its memory or more as shared memory; less than half is allowed"


def model_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each Ray pod that does not mount the model read-only, or does not check the model.

    The pod must check the model before Ray starts.
    """
    model = app_args(manifests).get("model")
    if model is None:
        return []
    faults = []
    for each in ray_pods(manifests):
        mounts = [one for one in each.main.get("volumeMounts", ()) if model.startswith(one["mountPath"] + "/")]
        if not mounts or not all(mount.get("readOnly") for mount in mounts):
            faults.append(f"{each.owner} does not mount {model} read-only")
        if not any(
            one.get("command") == ["expertmesh", "check", "--model", model] and one.get("volumeMounts") == mounts
            for one in each.spec.get("initContainers", ())
        ):
            faults.append(f"{each.owner} starts without a check of {model}")
    return faults


def log_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each Redis pod whose log is not on a volume that outlives the pod."""
    faults = []
    for each in pods(manifests):
        if each.group:
            continue
        mounts = {mount["name"]: mount["mountPath"] for mount in each.main["volumeMounts"]}
        config = next(volume["configMap"]["name"] for volume in each.spec["volumes"] if "configMap" in volume)
        lines = named(manifests, "ConfigMap", config)["data"]["valkey.conf"].splitlines()
        if "appendonly yes" not in lines or f"dir {mounts.get(each.claims[0])}" not in lines:
            faults.append(f"{each.owner} does not write its log to the volume that stays")
    return faults
