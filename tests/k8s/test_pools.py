from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s.manifests import OVERLAYS, Manifest, Manifests, Plant, container, named, rewrite_serve, worker_group
from tests.k8s.pools import apart_faults, pool_faults


def test_the_pods_are_what_the_application_asks_for(manifests: Manifests) -> None:
    assert pool_faults(manifests) == []


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if overlay != "cpu-demo"])
def test_what_is_there_twice_is_on_nodes_apart(overlay: str, rendered: Callable[[str], Manifests]) -> None:
    assert apart_faults(rendered(overlay)) == []


def spread_of(manifests: Manifests, group: str) -> list[Manifest]:
    constraints: list[Manifest] = worker_group(manifests, group)["template"]["spec"]["topologySpreadConstraints"]
    return constraints


def budget(manifests: Manifests, name: str) -> Manifest:
    spec: Manifest = named(manifests, "PodDisruptionBudget", f"expertmesh-{name}")["spec"]
    return spec


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda m: worker_group(m, "backbone").pop("labels"), "the backbone needs one group of nodes with"),
        (lambda m: worker_group(m, "experts-gpu")["labels"].update({"expertmesh.io/group": "x"}), "pool experts-gpu"),
        (lambda m: rewrite_serve(m, "group: experts-gpu", "group: experts-cpu"), "is on group experts-cpu"),
        (lambda m: rewrite_serve(m, "backbone_threads: 8", ""), "backbone_threads is not set"),
        (lambda m: rewrite_serve(m, "backbone_threads: 8", "backbone_threads: 32"), "has 10 CPUs, and needs 33.2"),
        (lambda m: container(m, "backbone")["resources"]["limits"].pop("nvidia.com/gpu"), "has 0 GPUs for a backbone"),
        (
            lambda m: container(m, "experts-gpu")["resources"]["limits"].update({"nvidia.com/gpu": "8"}),
            "has 8 GPUs for a shard that takes 1",
        ),
        (lambda m: rewrite_serve(m, "num_cpus: 8", "num_cpus: 4"), "exactly one shard of 4 must fit"),
        (lambda m: rewrite_serve(m, "num_cpus: 8", "num_cpus: 9"), "one shard of 9 must fit"),
        (lambda m: rewrite_serve(m, "host_budget: 79GiB", "host_budget: 95GiB"), "host_budget of pool experts-gpu"),
        (lambda m: worker_group(m, "experts-gpu").update(minReplicas=5), "has 5 to 7 pods for 4 to 6 replicas"),
        (lambda m: worker_group(m, "experts-gpu").update(maxReplicas=6), "has 4 to 6 pods for 4 to 6 replicas"),
        (lambda m: rewrite_serve(m, "backbone_replicas: 2", "backbone_replicas: 3"), "2 to 3 pods for 3 to 3 replicas"),
        (lambda m: worker_group(m, "experts-cpu").update(minReplicas=1), "and nothing is placed on them"),
        (
            lambda m: m.remove(named(m, "PodDisruptionBudget", "expertmesh-backbone")),
            "the budget of group backbone keeps None pods",
        ),
        (lambda m: budget(m, "experts-gpu").update(minAvailable=4), "keeps 4 pods; it must keep 3"),
        (
            lambda m: (budget(m, "experts-gpu").pop("minAvailable"), budget(m, "experts-gpu").update(maxUnavailable=1)),
            "the budget of group experts-gpu keeps None pods",
        ),
        (lambda m: spread_of(m, "backbone").clear(), "pods of group backbone are not spread"),
        (lambda m: spread_of(m, "experts-gpu")[0].pop("matchLabelKeys"), "pods of group experts-gpu are not spread"),
    ],
)
def test_a_planted_fault_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(words in fault for fault in pool_faults(everything))


@pytest.mark.parametrize("group", ["backbone", "experts-gpu"])
@pytest.mark.parametrize(
    "change", [{"whenUnsatisfiable": "ScheduleAnyway"}, {"minDomains": 1}, {"topologyKey": "zone"}]
)
def test_pods_that_may_share_a_node_are_found(group: str, change: Manifest, everything: Manifests) -> None:
    spread_of(everything, group)[0].update(change)
    assert apart_faults(everything) == [f"pods of group {group} may all be on one node"]
