"""These tests compare the GPU overlays with the sizes from `expertmesh size` for their models on H200s."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.placement.capacity import check_capacity
from cluster.sizing.fit import Slo
from cluster.sizing.gpus import gpu_of
from cluster.sizing.known_models import known_config
from cluster.sizing.model_sizes import model_sizes
from cluster.sizing.sizing import size
from cluster.sizing.weight_formats import Dtype
from cluster.topology import Shard
from services.args import NUM_HOMES, AppArgs
from tests.k8s.manifests import Manifest, Manifests, Plant, app_args, container, named, quantity, rewrite_serve

SUPER = "NVIDIA-Nemotron-3-Super-120B-A12B"
DEEPSEEK, QWEN = "DeepSeek-V3", "Qwen3-Coder-Next"
WANTED: dict[str, tuple[str, Dtype, Slo]] = {
    "gpu": (SUPER, "bf16", Slo()),
    "gpu-ha": (SUPER, "bf16", Slo(num_requests=128, min_backbones=2)),
    "gpu-fp8": (SUPER, "fp8", Slo()),
    "gpu-nvfp4": (SUPER, "nvfp4", Slo()),
    "gpu-deepseek": (DEEPSEEK, "fp8", Slo(min_backbones=2)),
    "gpu-qwen": (QWEN, "fp8", Slo()),
}


def size_faults(manifests: Manifests, model: str, dtype: Dtype, slo: Slo) -> list[str]:
    """Return a sentence for each number in the manifests that differs from the size that `expertmesh size` computes."""
    args = AppArgs(**app_args(manifests))
    (pool,) = args.pools
    sized = size(known_config(model), gpu_of("h200"), dtype, slo)
    pairs = {
        "backbone_replicas": (args.backbone_replicas, sized.backbone_gpus),
        "max_requests": (args.max_requests, sized.requests_per_backbone),
        "state_memory": (args.state_memory, sized.state_memory_bytes),
        "shards": (pool.shards, sized.expert_gpus),
        "memory_budget": (pool.memory_budget, sized.shard_memory_bytes),
        "host_budget": (pool.host_budget, sized.shard_host_bytes),
        "memory of the backbone's pod": (_memory(manifests, "backbone"), sized.backbone_pod_memory_bytes),
        "memory of a shard's pod": (_memory(manifests, "experts-gpu"), sized.shard_pod_memory_bytes),
    }
    claim = int(quantity(claim_requests(manifests)["storage"]))
    if claim < sized.volume_bytes:
        pairs["storage of the claim"] = (claim, sized.volume_bytes)
    return [f"{what} is {has}, and should be {should}" for what, (has, should) in pairs.items() if has != should]


def limits_of(manifests: Manifests, group: str) -> Manifest:
    limits: Manifest = container(manifests, group)["resources"]["limits"]
    return limits


def claim_requests(manifests: Manifests) -> Manifest:
    requests: Manifest = named(manifests, "PersistentVolumeClaim", "expertmesh-models")["spec"]["resources"]["requests"]
    return requests


def _memory(manifests: Manifests, group: str) -> int:
    return int(quantity(limits_of(manifests, group)["memory"]))


@pytest.mark.parametrize("overlay", WANTED)
def test_an_overlay_is_as_large_as_it_has_to_be(overlay: str, rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered(overlay)
    model, dtype, slo = WANTED[overlay]
    directory = "DeepSeek-V3-0324" if model == DEEPSEEK else f"{model}-{dtype.upper()}"
    assert app_args(manifests)["model"] == f"/models/{directory}"
    assert size_faults(manifests, model, dtype, slo) == []


@pytest.mark.parametrize("overlay", WANTED)
def test_the_planner_finds_room_for_two_homes(overlay: str, rendered: Callable[[str], Manifests]) -> None:
    (pool,) = AppArgs(**app_args(rendered(overlay))).pools
    assert pool.memory_budget is not None
    assert pool.host_budget is not None
    shards = [
        Shard(f"s{i}", "", f"node-{i}", pool.name, "cuda", "", int(pool.memory_budget), host_budget=pool.host_budget)
        for i in range(pool.shards)
    ]
    model, dtype, _ = WANTED[overlay]
    layers = model_sizes(known_config(model)).layer_specs(dtype)
    check_capacity(layers, shards, NUM_HOMES)
    with pytest.raises(ValueError, match="room for"):
        check_capacity(layers, shards[:1], NUM_HOMES)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda m: rewrite_serve(m, "shards: 4", "shards: 5"), "shards is 5"),
        (lambda m: rewrite_serve(m, "memory_budget: 118GiB", "memory_budget: 118GB"), "memory_budget is 118000000000"),
        (lambda m: rewrite_serve(m, "state_memory: 21GiB", "state_memory: 2GiB"), "state_memory is"),
        (lambda m: rewrite_serve(m, "backbone_replicas: 2", "backbone_replicas: 1"), "backbone_replicas is 1"),
        (
            lambda m: container(m, "experts-gpu")["resources"]["limits"].update(memory="8Gi"),
            "memory of a shard's pod is",
        ),
        (lambda m: claim_requests(m).update(storage="200Gi"), "storage of the claim is"),
    ],
)
def test_a_planted_fault_is_found(plant: Plant, words: str, everything: Manifests) -> None:
    plant(everything)
    assert any(fault.startswith(words) for fault in size_faults(everything, *WANTED["gpu-ha"]))
