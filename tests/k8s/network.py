"""`allows` tells whether the NetworkPolicies allow a connection, according to the rules of Kubernetes."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.k8s.manifests import Manifest, Manifests, of_kind
from tests.k8s.references import peers, selects


@dataclass(frozen=True)
class Peer:
    """A `Peer` is one end of a connection.

    `namespace` is None for a pod in our namespace, and "" for an end that is not a pod. For any other pod, it is the
    name of the pod's namespace.
    """

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str | None = None


def allows(manifests: Manifests, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Return True if the NetworkPolicies allow a connection from `source` to `target`.

    The policies for `source` and the policies for `target` must both allow the connection.
    """
    return _lets(manifests, source, target, port, protocol, "egress") and _lets(
        manifests, target, source, port, protocol, "ingress"
    )


def _lets(manifests: Manifests, own: Peer, other: Peer, port: int, protocol: str, direction: str) -> bool:
    """Return True if the policies for the pod `own` allow the connection between `own` and `other`.

    `direction` is "ingress" if the connection goes to `own`, and "egress" if the connection comes from `own`. If no
    policy for the direction selects `own`, the connection is allowed. Otherwise one of these policies must allow it.
    """
    if own.namespace is not None:
        return True  # the manifests contain no policies for other namespaces
    policies = [
        policy
        for policy in of_kind(manifests, "NetworkPolicy")
        if direction.capitalize() in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], own.labels)
    ]
    return not policies or any(
        _is_meant(peer, other) and _is_open(rule, port, protocol)
        for policy in policies
        for way, peer, rule in peers(policy)
        if way == direction
    )


def _is_meant(peer: Manifest, other: Peer) -> bool:
    if not peer:
        return True  # an empty peer allows everybody
    if other.namespace == "" or "ipBlock" in peer:
        return False  # our policies allow no peers by IP address
    if "namespaceSelector" in peer:
        namespace = {"kubernetes.io/metadata.name": other.namespace or "expertmesh"}
        return selects(peer["namespaceSelector"], namespace) and selects(peer.get("podSelector", {}), other.labels)
    return other.namespace is None and selects(peer["podSelector"], other.labels)


def _is_open(rule: Manifest, port: int, protocol: str) -> bool:
    return "ports" not in rule or any(
        one.get("port", port) == port and one.get("protocol", "TCP") == protocol for one in rule["ports"]
    )
