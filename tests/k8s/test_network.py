"""These tests check that the NetworkPolicies allow every connection that is needed, and no other connection."""

from __future__ import annotations

import pytest

from tests.k8s.manifests import Manifest, Manifests, Plant, named, of_kind, pods, ray_cluster, ray_pods
from tests.k8s.network import Peer, allows

COMPONENT = "app.kubernetes.io/component"
OPERATOR = Peer({COMPONENT: "kuberay-operator"}, "kuberay-system")
DNS = Peer({"k8s-app": "kube-dns"}, "kube-system")
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, "monitoring")
STRANGER = Peer({"app": "stranger"}, "default")
NEIGHBOUR = Peer({"app": "neighbour"})  # a pod in our namespace that is not part of Expertmesh
OUTSIDE = Peer(namespace="")  # an end that is not a pod, such as the API server, a load balancer or the internet


def peer(manifests: Manifests, owner: str) -> Peer:
    return Peer(next(each.labels for each in pods(manifests) if owner in (each.owner, each.group)))


def ray(manifests: Manifests) -> list[Peer]:
    return [Peer(each.labels) for each in ray_pods(manifests)]


def unmet_needs(manifests: Manifests) -> list[str]:
    """Return the connections that are needed but that the policies refuse."""
    head, redis = peer(manifests, "head"), peer(manifests, "StatefulSet expertmesh-redis")
    needs = [("Ray and shards", one, other, 33333) for one in ray(manifests) for other in ray(manifests)]
    needs += [("the store", one, redis, 6379) for one in ray(manifests)]
    gateway = peer(manifests, "backbone")
    needs += [("clients", one, gateway, port) for one in (STRANGER, OUTSIDE) for port in (8001, 9001)]
    needs += [("metrics", PROMETHEUS, one, 8080) for one in ray(manifests)]
    needs += [("metrics of the head", PROMETHEUS, head, port) for port in (44217, 44227)]
    needs += [("the operator", OPERATOR, head, 8265), ("the API server", head, OUTSIDE, 443)]
    if ray_cluster(manifests).get("gcsFaultToleranceOptions"):
        needs.append(("the head's store", head, peer(manifests, "StatefulSet gcs-expertmesh-redis"), 6379))
    unmet = [f"{what}, port {port}" for what, one, other, port in needs if not allows(manifests, one, other, port)]
    return unmet + ["names" for one in ray(manifests) if not allows(manifests, one, DNS, 53, "UDP")]


def holes(manifests: Manifests) -> list[str]:
    """Return the connections that must not be possible but that the policies allow."""
    head, worker = peer(manifests, "head"), peer(manifests, "backbone")
    stores = [Peer(each.labels) for each in pods(manifests) if not each.group]
    others = [OPERATOR, DNS, PROMETHEUS, STRANGER, NEIGHBOUR, OUTSIDE]
    closed = [("a store", one, store, 6379) for one in others for store in stores]
    closed += [("a store calls", store, other, 443) for store in stores for other in [*others, *ray(manifests)]]
    closed += [("the dashboard", one, head, 8265) for one in (PROMETHEUS, STRANGER, NEIGHBOUR, OUTSIDE)]
    closed += [("Ray and shards", one, other, 33333) for one in others for other in ray(manifests)]
    closed += [("Serve's proxy", one, other, 8000) for one in (STRANGER, OUTSIDE) for other in ray(manifests)]
    closed += [("metrics", one, worker, 8080) for one in (STRANGER, NEIGHBOUR, OUTSIDE)]
    closed += [("a worker calls", worker, other, 443) for other in (STRANGER, OUTSIDE)]
    closed += [("another store", worker, one, 6379) for one in stores if one.labels.get(COMPONENT) == "gcs-redis"]
    return [f"{what}, port {port}" for what, one, other, port in closed if allows(manifests, one, other, port)]


def test_what_is_needed_gets_through_and_nothing_else(manifests: Manifests) -> None:
    assert unmet_needs(manifests) == []
    assert holes(manifests) == []


def rules(manifests: Manifests, name: str, direction: str) -> list[Manifest]:
    listed: list[Manifest] = named(manifests, "NetworkPolicy", f"expertmesh-{name}")["spec"][direction]
    return listed


def gcs_rule(manifests: Manifests) -> Manifest:
    rule: Manifest = named(manifests, "NetworkPolicy", "gcs-expertmesh-redis")["spec"]["ingress"][0]
    return rule


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda m: rules(m, "ray", "ingress").pop(0), "Ray and shards"),
        (lambda m: rules(m, "ray", "egress").pop(0), "Ray and shards"),
        (lambda m: rules(m, "ray", "egress").pop(1), "the store"),
        (lambda m: rules(m, "ray", "egress").pop(2), "names"),
        (lambda m: rules(m, "ray", "egress")[2]["ports"].pop(0), "names"),
        (lambda m: rules(m, "clients", "ingress")[0]["ports"].pop(), "clients, port 9001"),
        (lambda m: rules(m, "ray", "ingress").pop(), "metrics, port 8080"),
        (lambda m: rules(m, "head", "ingress").pop(0), "the operator"),
        (lambda m: rules(m, "head", "egress").clear(), "the API server"),
        (lambda m: rules(m, "head-to-redis", "egress").clear(), "the head's store"),
        (lambda m: rules(m, "redis", "ingress")[0]["from"][0]["podSelector"]["matchLabels"].update(x="y"), "the store"),
    ],
)
def test_a_need_that_is_not_met_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(need.startswith(words) for need in unmet_needs(everything))


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda m: m.remove(named(m, "NetworkPolicy", "expertmesh-redis")), "a store"),
        (lambda m: m.remove(named(m, "NetworkPolicy", "gcs-expertmesh-redis")), "a store calls"),
        (lambda m: rules(m, "redis", "ingress")[0].pop("from"), "a store, port 6379"),
        (lambda m: rules(m, "redis", "ingress")[0]["from"][0].update(podSelector={}), "a store, port 6379"),
        (lambda m: rules(m, "ray", "ingress")[1].pop("ports"), "Ray and shards"),
        (lambda m: rules(m, "ray", "ingress")[1].pop("from"), "metrics"),
        (lambda m: rules(m, "head", "ingress")[0]["from"][0].pop("podSelector"), "the dashboard"),
        (lambda m: rules(m, "ray", "egress").append({}), "a worker calls"),
        (lambda m: [rules(m, "ray", "egress").append({}), gcs_rule(m).pop("from")], "another store"),
        (
            lambda m: [one["spec"].update(policyTypes=["Ingress"]) for one in of_kind(m, "NetworkPolicy")],
            "a store calls",
        ),
    ],
)
def test_a_hole_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(hole.startswith(words) for hole in holes(everything))
