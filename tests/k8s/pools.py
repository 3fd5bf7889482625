"""`pool_faults` finds contradictions between the application's arguments and the groups of pods.

The checks cover labels, CPUs, GPUs, the number of pods, the spread of pods over nodes, and disruption budgets.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.app import CONTROLLER_CPUS, GATEWAY_CPUS
from services.args import AppArgs, PoolArgs
from tests.k8s.manifests import Manifest, Manifests, app_args, of_kind, quantity, ray_cluster, ray_pods
from tests.k8s.references import selects

HOSTNAME = "kubernetes.io/hostname"


def pool_faults(manifests: Manifests) -> list[str]:
    args = AppArgs(**app_args(manifests))
    groups = ray_cluster(manifests)["workerGroupSpecs"]
    faults = list(_backbone_faults(args, groups))
    for pool in args.pools:
        faults += _pool_faults(pool, groups)
    used = [args.labels, *(pool.labels for pool in args.pools)]
    for group in groups:
        if group.get("labels") not in used and group["minReplicas"] > 0:
            faults.append(f"group {group['groupName']} always has pods, and nothing is placed on them")
    return faults + list(_budget_faults(args, manifests)) + _spread_faults(manifests)


def _group_of(labels: dict[str, str], groups: list[Manifest], what: str) -> Manifest | str:
    """Return the group whose Ray nodes have `labels`. If not exactly one group has these labels, return a fault.

    The fault is a sentence; `what` is the sentence's subject.
    """
    found = [group for group in groups if labels and labels.items() <= group.get("labels", {}).items()]
    if len(found) != 1:
        return f"{what} needs one group of nodes with {labels}, and there are {[group['groupName'] for group in found]}"
    return found[0]


def _backbone_faults(args: AppArgs, groups: list[Manifest]) -> Iterator[str]:
    group = _group_of(args.labels, groups, "the backbone")
    if isinstance(group, str):
        yield group
        return
    if args.device == "cuda" and args.backbone_threads is None:
        yield "backbone_threads is not set, so it depends on the machine that builds the application"
    cpus, gpus = _limits(group)
    beside = GATEWAY_CPUS * args.gateway_replicas + CONTROLLER_CPUS * args.controller_replicas
    wanted = (args.backbone_threads or 1) + beside  # one pod may have to run a backbone, all gateways and controllers
    if cpus < wanted:
        yield f"a pod of group {group['groupName']} has {cpus:g} CPUs, and needs {wanted:g}"
    if gpus != args.gpus:
        yield f"a pod of group {group['groupName']} has {gpus:g} GPUs for a backbone that takes {args.gpus:g}"
    yield from _number_faults(group, args.backbone_replicas, args.backbone_replicas)


def _pool_faults(pool: PoolArgs, groups: list[Manifest]) -> Iterator[str]:
    group = _group_of(pool.labels, groups, f"pool {pool.name}")
    if isinstance(group, str):
        yield group
        return
    if pool.name != group["groupName"]:
        yield f"pool {pool.name} is on group {group['groupName']}; the pool and the group must have the same name"
    cpus, gpus = _limits(group)
    if gpus != pool.gpus:
        yield f"a pod of group {pool.name} has {gpus:g} GPUs for a shard that takes {pool.gpus:g}"
    if not pool.num_cpus <= cpus < 2 * pool.num_cpus:
        yield f"a pod of group {pool.name} has {cpus:g} CPUs; exactly one shard of {pool.num_cpus:g} must fit"
    if pool.host_budget is not None and pool.host_budget >= _memory(group):
        yield f"host_budget of pool {pool.name} must be less than the memory of its pods"
    if pool.device == "cpu" and pool.memory_budget is not None and pool.memory_budget >= _memory(group):
        yield f"memory_budget of pool {pool.name} must be less than the memory of its pods"
    yield from _number_faults(group, pool.least_shards, pool.most_shards)


def _number_faults(group: Manifest, least: int, most: int) -> Iterator[str]:
    """Yield a fault if the minimum or the maximum number of pods of `group` is wrong.

    `least` and `most` are the minimum and maximum number of replicas. The maximum number of pods must be `most` + 1,
    because an old and a new replica run together while a replica is replaced.
    """
    if group["minReplicas"] > least or group["maxReplicas"] != most + 1:
        bounds = f"{group['minReplicas']} to {group['maxReplicas']}"
        yield f"group {group['groupName']} has {bounds} pods for {least} to {most} replicas and one more"


def _limits(group: Manifest) -> tuple[float, float]:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return quantity(limits["cpu"]), quantity(limits.get("nvidia.com/gpu", 0))


def _memory(group: Manifest) -> float:
    return quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])


def _budget_faults(args: AppArgs, manifests: Manifests) -> Iterator[str]:
    """Yield a fault for each group whose disruption budget is wrong.

    One pod of a pool may be evicted at a time. A backbone may be evicted only if there are several backbones. The head
    may be evicted only if the head's state is in a Redis.
    """
    wanted = {pool.name: pool.least_shards - 1 for pool in args.pools}
    wanted["backbone"] = max(1, args.backbone_replicas - 1)
    if not ray_cluster(manifests).get("gcsFaultToleranceOptions"):
        wanted["head"] = 1
    found: dict[str, object] = {}
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        for each in ray_pods(manifests):
            if selects(budget["spec"]["selector"], each.labels):
                found[each.group] = budget["spec"].get("minAvailable")
    for group in sorted(wanted.keys() | found.keys()):
        if found.get(group) != wanted.get(group):
            yield f"the budget of group {group} keeps {found.get(group)} pods; it must keep {wanted.get(group)}"


def _spread_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each group whose workers are not spread over nodes.

    During an upgrade there are two clusters. Each cluster's workers must be spread, whatever the other cluster does.
    """
    return [
        f"pods of group {each.group} are not spread over nodes"
        for each in ray_pods(manifests)
        if not each.is_head
        and not any(
            constraint["topologyKey"] == HOSTNAME and constraint.get("matchLabelKeys") == ["ray.io/cluster"]
            for constraint in each.spec.get("topologySpreadConstraints", ())
        )
    ]


def apart_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each group whose pods may all be on one node.

    If all pods are on one node, the loss of this node ends all homes of an expert, or all backbones.
    """
    several = AppArgs(**app_args(manifests)).backbone_replicas > 1
    return [
        f"pods of group {each.group} may all be on one node"
        for each in ray_pods(manifests)
        if (each.group.startswith("experts-") or (each.group == "backbone" and several))
        and not any(
            constraint["topologyKey"] == HOSTNAME
            and constraint["whenUnsatisfiable"] == "DoNotSchedule"
            and constraint.get("minDomains", 1) >= 2
            for constraint in each.spec.get("topologySpreadConstraints", ())
        )
    ]
