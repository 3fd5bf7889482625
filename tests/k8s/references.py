"""The functions in this file find faulty references between manifests: selectors, ports, names and variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from tests.k8s.manifests import (
    Manifest,
    Manifests,
    Pods,
    app_args,
    named,
    of_kind,
    pods,
    ray_pods,
    ray_service,
    serve_config,
    title,
)


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Return True if `selector` selects pods that have the labels `labels`. An empty selector selects every pod.

    The only supported field of a selector is matchLabels.
    """
    assert not selector.get("matchExpressions"), f"no test understands matchExpressions yet: {selector}"
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def selector_faults(manifests: Manifests) -> list[str]:
    all_pods = pods(manifests)
    return [
        f"{where} selects {selector.get('matchLabels')}, which no pod has"
        for where, selector, candidates in _selectors(manifests, all_pods)
        if not any(selects(selector, each.labels) for each in candidates)
    ]


def _selectors(manifests: Manifests, all_pods: list[Pods]) -> Iterator[tuple[str, Manifest, list[Pods]]]:
    """Yield, for every selector in the manifests, the tuple (owner of the selector, selector, candidates).

    The candidates are pods; the selector must select at least one of the candidates.
    """
    for service in of_kind(manifests, "Service"):
        yield title(service), {"matchLabels": service["spec"]["selector"]}, all_pods
    for owner in of_kind(manifests, "StatefulSet"):
        own = [each for each in all_pods if each.owner == title(owner)]
        yield title(owner), owner["spec"]["selector"], own
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        yield title(budget), budget["spec"]["selector"], all_pods
    for policy in of_kind(manifests, "NetworkPolicy"):
        yield title(policy), policy["spec"]["podSelector"], all_pods
        for direction, peer, _ in peers(policy):
            if "podSelector" in peer and "namespaceSelector" not in peer:  # the pods of other namespaces are not known
                yield f"{title(policy)}, {direction}", peer["podSelector"], all_pods
    for each in all_pods:
        for constraint in each.spec.get("topologySpreadConstraints", ()):
            yield f"{each.owner}, spread over {constraint['topologyKey']}", constraint["labelSelector"], [each]


def peers(policy: Manifest) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Yield the tuple (direction, peer, rule) for every peer in the rules of a NetworkPolicy.

    The direction is "ingress" or "egress". For a rule that names no peers, and thus allows all, the peer is {}.
    """
    for direction, key in (("ingress", "from"), ("egress", "to")):
        for rule in policy["spec"].get(direction, ()):
            for peer in rule.get(key, [{}]):
                yield direction, peer, rule


def port_faults(manifests: Manifests) -> list[str]:
    all_pods = pods(manifests)
    return [
        *_service_port_faults(manifests, all_pods),
        *_serve_port_faults(manifests),
        *_gateway_port_faults(manifests),
        *_policy_port_faults(manifests, all_pods),
        *_probe_port_faults(all_pods),
        *_url_faults(manifests, all_pods),
    ]


def _service_port_faults(manifests: Manifests, all_pods: list[Pods]) -> Iterator[str]:
    for service in of_kind(manifests, "Service"):
        chosen = [each for each in all_pods if selects({"matchLabels": service["spec"]["selector"]}, each.labels)]
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            for each in chosen:
                if target not in (*each.ports, *each.ports.values()):
                    yield f"{title(service)} sends to port {target}, and {each.owner} has {each.ports}"


def _serve_port_faults(manifests: Manifests) -> Iterator[str]:
    """Yield the faults in the ports of Serve's proxies.

    KubeRay publishes each port of the head whose name is serve or starts with serve-. The field serveService may
    contain a description of each such port, under the port's name.
    """
    config, spec = serve_config(manifests), ray_service(manifests)["spec"]
    wanted = {"serve": config["http_options"]["port"], "serve-grpc": config["grpc_options"]["port"]}
    for each in ray_pods(manifests):
        for name, port in wanted.items():
            if each.ports.get(name) != port:
                yield f"{each.owner} has {name} on port {each.ports.get(name)}, and serveConfigV2 on {port}"
    described = {port["name"]: port for port in spec["serveService"]["spec"]["ports"]}
    for name in sorted(described.keys() ^ wanted.keys()):
        yield f"serveService and serveConfigV2 do not both have a port {name}"
    for name in described.keys() & wanted.keys():
        numbers = described[name]["port"], described[name].get("targetPort", described[name]["port"])
        if numbers != (wanted[name],) * 2:
            yield f"serveService has {name} on ports {numbers}, and serveConfigV2 on {wanted[name]}"
    if described.get("serve-grpc", {}).get("appProtocol") != "kubernetes.io/h2c":
        yield "the port serve-grpc of serveService does not have the appProtocol kubernetes.io/h2c"


def _gateway_port_faults(manifests: Manifests) -> Iterator[str]:
    """Yield the faults in the ports on which the gateways listen, without Serve's proxies.

    The application's arguments contain these ports, and the labels of the pods that run gateways.
    """
    args = app_args(manifests)
    wanted = {"rest": args.get("http_port"), "grpc": args.get("grpc_port")}
    for each in ray_pods(manifests):
        if args["labels"].items() <= each.labels.items():
            for name, port in wanted.items():
                if each.ports.get(name) != port:
                    yield f"{each.owner} has {name} on port {each.ports.get(name)}, and gateways listen on {port}"
    described = {port["name"]: port for port in named(manifests, "Service", "expertmesh")["spec"]["ports"]}
    if described.get("grpc", {}).get("appProtocol") != "kubernetes.io/h2c":
        yield "the port grpc of Service expertmesh does not have the appProtocol kubernetes.io/h2c"


def _policy_port_faults(manifests: Manifests, all_pods: list[Pods]) -> Iterator[str]:
    for policy in of_kind(manifests, "NetworkPolicy"):
        for direction, peer, rule in peers(policy):
            if direction == "egress" and ("podSelector" not in peer or "namespaceSelector" in peer):
                continue  # the rule is for pods that are not in the manifests
            selector = policy["spec"]["podSelector"] if direction == "ingress" else peer["podSelector"]
            offered = {port for each in all_pods if selects(selector, each.labels) for port in each.ports.values()}
            for port in rule.get("ports", ()):
                if port["port"] not in offered:
                    yield f"{title(policy)} allows {direction} to port {port['port']}, which no container there has"


def _probe_port_faults(all_pods: list[Pods]) -> Iterator[str]:
    for each in all_pods:
        for container in each.containers:
            own = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                for how in ("tcpSocket", "httpGet", "grpc"):
                    port = container.get(probe, {}).get(how, {}).get("port")
                    if port is not None and port not in (*own, *own.values()):
                        yield f"{each.owner}: {probe} asks port {port} of {container['name']}, which has {own}"


def _url_faults(manifests: Manifests, all_pods: list[Pods]) -> Iterator[str]:
    """Yield a fault for each URL of a Redis whose host and port are not the name and port of a Service."""
    offered = {
        (service["metadata"]["name"], port["port"])
        for service in of_kind(manifests, "Service")
        for port in service["spec"]["ports"]
    }
    urls = {
        variable["value"]
        for each in all_pods
        for variable in each.main.get("env", ())
        if variable["name"].endswith("_URL")
    }
    gcs = ray_service(manifests)["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions")
    addresses = [*urls, *([f"redis://{gcs['redisAddress']}"] if gcs else [])]
    for url in sorted(addresses):
        parts = urlsplit(url)
        if (parts.hostname, parts.port) not in offered:
            yield f"{url} is no Service's address; there are {sorted(offered)}"


def name_faults(manifests: Manifests) -> list[str]:
    there = {(each["kind"], each["metadata"]["name"]): _keys(each) for each in manifests}
    faults = []
    for manifest in manifests:
        for kind, name, key in _named(manifest):
            if (kind, name) not in there:
                faults.append(f"{title(manifest)} names {kind} {name}, which does not exist")
            elif key is not None and key not in there[kind, name]:
                faults.append(f"{title(manifest)} names key {key} of {kind} {name}, which has {there[kind, name]}")
    return faults + [fault for each in pods(manifests) for fault in _volume_faults(each)]


def _keys(manifest: Manifest) -> list[str]:
    return sorted({**manifest.get("data", {}), **manifest.get("stringData", {})})


def _named(value: Any) -> Iterator[tuple[str, str, str | None]]:
    """Yield, for each reference in a manifest, the kind and name of the object and the key to which it refers.

    The key is None if the reference is to the whole object.
    """
    if isinstance(value, list):
        for one in value:
            yield from _named(one)
    if not isinstance(value, dict):
        return
    for field, one in value.items():
        match field, one:
            case "secretKeyRef", {"name": name, "key": key}:
                yield "Secret", name, key
            case "configMapKeyRef", {"name": name, "key": key}:
                yield "ConfigMap", name, key
            case "secretRef", {"name": name}:
                yield "Secret", name, None
            case "configMapRef" | "configMap", {"name": name}:
                yield "ConfigMap", name, None
            case "secret", {"secretName": name}:
                yield "Secret", name, None
            case "persistentVolumeClaim", {"claimName": name}:
                yield "PersistentVolumeClaim", name, None
            case "serviceAccountName", str(name):
                yield "ServiceAccount", name, None
            case "serviceName", str(name):
                yield "Service", name, None
            case _:
                yield from _named(one)


def _volume_faults(each: Pods) -> Iterator[str]:
    volumes = {*(volume["name"] for volume in each.spec.get("volumes", ())), *each.claims}
    mounted = {mount["name"] for container in each.containers for mount in container.get("volumeMounts", ())}
    for name in sorted(mounted - volumes):
        yield f"{each.owner} mounts volume {name}, which it does not have"
    for name in sorted(volumes - mounted):
        yield f"{each.owner} has volume {name}, which it does not mount"


def expansion_faults(manifests: Manifests) -> list[str]:
    """Return a fault for each $(NAME) in a container's command if the container has no environment variable NAME.

    Kubernetes would not replace this $(NAME) by a value.
    """
    return [
        f"{each.owner}: $({name}) is none of {sorted(known)}"
        for each in pods(manifests)
        for container in each.containers
        for known in [{variable["name"] for variable in container.get("env", ())}]
        for word in [*container.get("command", ()), *container.get("args", ())]
        for name in re.findall(r"\$\((\w+)\)", word)
        if name not in known
    ]
