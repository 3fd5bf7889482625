from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_as_serve_does
from ray.serve._private.build_app import build_app as deployments_of

from services.app import SHARD_STOP_TIMEOUT_S, build_app
from services.args import AppArgs
from tests.k8s.manifests import Manifests, app_args, ray_pods, ray_service, rewrite_serve, serve_config
from tests.k8s.pod_rules import DRAIN, variable_of
from tests.k8s.pools import CONTROLLER_CPUS, GATEWAY_CPUS
from tests.k8s.serve_config import serve_faults


def test_every_serve_config_is_valid(manifests: Manifests) -> None:
    assert serve_faults(serve_config(manifests)) == []


@pytest.fixture(scope="module")
def demo(rendered: Callable[[str], Manifests]) -> dict[str, Any]:
    """Build the application from the demo's Serve config, as Serve does. Return the deployments by name."""
    args = app_args(rendered("cpu-demo"))
    assert AppArgs(**args).name == "demo"
    built = deployments_of(build_as_serve_does(build_app, args), name="expertmesh")
    return {each.name: each for each in built.deployments}


def test_the_demo_is_what_serve_would_build(demo: dict[str, Any]) -> None:
    assert demo.keys() == {"gateway", "backbone", "controller", "experts-cpu"}
    cpus = {name: each._replica_config.ray_actor_options["num_cpus"] for name, each in demo.items()}
    assert cpus == {"gateway": GATEWAY_CPUS, "controller": CONTROLLER_CPUS, "backbone": 1, "experts-cpu": 1}


def test_a_node_drains_longer_than_any_replica_takes_to_stop(demo: dict[str, Any], manifests: Manifests) -> None:
    longest = max(each._deployment_config.graceful_shutdown_timeout_s for each in demo.values())
    assert longest >= SHARD_STOP_TIMEOUT_S
    assert all(float(variable_of(each, DRAIN) or 0) > longest for each in ray_pods(manifests))


def test_an_application_is_reached_on_every_node(manifests: Manifests) -> None:
    config = serve_config(manifests)
    assert (config["proxy_location"], config["http_options"]["host"]) == ("EveryNode", "0.0.0.0")
    assert [each["route_prefix"] for each in config["applications"]] == ["/"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("proxy_location: EveryNode", "proxy_location: Everywhere", "proxy_location"),
        ("http_options:", "http_optionz:", "http_optionz is no field of ServeDeploySchema"),
        ("port: 8000", "prot: 8000", "http_options.prot is no field of HTTPOptionsSchema"),
        ("grpc_servicer_functions:", "servicers:", "grpc_options.servicers is no field of gRPCOptionsSchema"),
        ("route_prefix:", "route_prefixx:", "applications.0.route_prefixx is no field of ServeApplicationSchema"),
        (
            "args:",
            "deployments: [{name: backbone, num_replica: 2}]\n    args:",
            "deployments.0.num_replica is no field",
        ),
        (
            "args:",
            "deployments: [{name: backbone, ray_actor_options: {num_gpu: 1}}]\n    args:",
            "ray_actor_options.num_gpu is no field of RayActorOptionsSchema",
        ),
        (
            "args:",
            "deployments: [{name: backbone, autoscaling_config: {min_replica: 1}}]\n    args:",
            "autoscaling_config.min_replica is no field of AutoscalingConfig",
        ),
        ("services.app:build_app", "services.app:build_apps", "build_apps cannot be imported"),
        ("services.app:build_app", "services.apps:build_app", "services.apps:build_app cannot be imported"),
        ("add_HealthServicer_to_server", "add_HealthService_to_server", "cannot be imported"),
        ("inference_pb2_grpc:add_InferenceServicer", "inference_pb2:add_InferenceServicer", "cannot be imported"),
        ("backbone_replicas:", "backbones:", "args: backbones: Extra inputs"),
        ("max_shards:", "most_shards:", "args: pools.0.most_shards: Extra inputs"),
        ("device: cuda", "device: gpu", "args: device: Input should be"),
        ("memory_budget: 118GiB", "memory_budget: much", "args: pools.0.memory_budget"),
    ],
)
def test_a_planted_fault_is_found(old: str, new: str, words: str, everything: Manifests) -> None:
    rewrite_serve(everything, old, new)
    assert any(words in fault for fault in serve_faults(serve_config(everything)))


def test_a_service_that_is_left_out_is_missed(everything: Manifests) -> None:
    config = serve_config(everything)
    config["grpc_options"]["grpc_servicer_functions"].pop()
    ray_service(everything)["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    assert "servicers are" in " ".join(serve_faults(serve_config(everything)))
