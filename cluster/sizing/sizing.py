"""How many GPUs a model needs, and how much of what on each: from its config, a GPU and what is wanted of it.

`size` is pure arithmetic. Memory is exact: what is loaded is counted to the byte (`cluster/sizing/fit.py`). Pace is an
estimate from data sheets (`cluster/sizing/step_time.py`): it counts decode steps, no prompts and no drafts, and has to be
measured before it is believed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from cluster.sizing.fit import GIB, MARGIN, SAVED_SHARE, TRANSFER_SHARE, Fit, Slo, whole_gib
from cluster.sizing.gpus import GB, GPUS, Gpu
from cluster.sizing.model_configs import model_sizes
from cluster.sizing.step_time import BALANCE, unique_shards, wire_of
from cluster.sizing.weight_formats import Dtype, dtype_of

BACKBONE_POD_GIB, SHARD_POD_GIB = 32, 16  # host memory: of processes, Ray and pages of the checkpoint; an assumption


@dataclass(frozen=True)
class Sizing:
    """The answer, to which manifests can be held. Integers, but for `unique_shards`.

    Of a backbone, `state_memory_bytes` is the `state_memory` of a Serve config; of a shard, `shard_memory_bytes` and
    `shard_host_bytes` are its `memory_budget` and `host_budget`. A pod's memory is what its host has to give, a
    shard's host budget included. These five are whole GiB.
    `device_homes` counts an expert's homes on GPUs: 2, or 1 and a second in host memory of another shard; of the
    latter `host_homes_bytes` are all.
    KV is that of `context_len` tokens in whole pages. `wire_bytes_per_token` counts rows and sums of all layers of
    experts but the MTP module's. `bits_per_s` are means, both directions together, while all requests decode;
    `link_bits_per_s` is what a network card has to carry so that the transfer takes no more than its share of the time
    between tokens. `step_us` is the estimate of a step, by its parts.
    """

    model_type: str
    gpu: str
    dtype: Dtype
    has_mtp: bool
    backbone_gpus: int
    expert_gpus: int
    requests_per_backbone: int
    device_homes: int
    checkpoint_bytes: int
    backbone_weight_bytes: int
    experts_bytes: int
    state_memory_bytes: int
    shard_memory_bytes: int
    shard_host_bytes: int
    host_homes_bytes: int
    backbone_pod_memory_bytes: int
    shard_pod_memory_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_request: int
    state_bytes_per_request: int
    draft_bytes_per_request: int
    unique_shards: float
    wire_bytes_per_token: int
    backbone_bits_per_s: int
    backbone_link_bits_per_s: int
    shard_bits_per_s: int
    shard_link_bits_per_s: int
    step_us: Mapping[str, int]
    reasons: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        return self.backbone_gpus + self.expert_gpus

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "reasons": list(self.reasons)}


def size(config: Mapping[str, Any], gpu: Gpu, dtype: Dtype | None = None, slo: Slo | None = None) -> Sizing:
    """Sizes a deployment of the model that a parsed `config.json` describes; `dtype` is the checkpoint's if left out.

    Raises ValueError with one sentence where the config is not understood, and where a backbone does not fit the GPU
    or no number of GPUs is fast enough; then it names the GPUs that would do.
    """
    model, dtype, slo = model_sizes(config), dtype or dtype_of(config), slo or Slo()
    if model.max_context and slo.context_len > model.max_context:
        raise ValueError(f"the context is {slo.context_len} tokens; the model's own is {model.max_context}")
    fit = Fit(model, gpu, dtype, slo)
    if why := fit.why_not:
        others = [other.name for other in GPUS.values() if replace(fit, gpu=other).why_not is None]
        raise ValueError(f"{why}; {' or '.join(others) if others else 'none of ' + ', '.join(GPUS)} would do")
    return replace(made := _sizing(fit), reasons=tuple(_reasons(fit, made)))


def _sizing(fit: Fit) -> Sizing:
    assert fit.fleet is not None
    (num_backbones, num_shards), model, slo = fit.fleet, fit.model, fit.slo
    batch, whole = fit.batch(num_backbones), fit.experts_bytes
    host = 0 if fit.has_device_cover(num_shards) else whole_gib(MARGIN * whole / (num_shards - 1))
    wire, experts = wire_of(model, num_shards), model.experts
    bits = 8e3 * wire.total / slo.itl_ms  # per second, of one request
    of_backbone, of_shard = bits * batch, bits * slo.num_requests / (BALANCE * num_shards)
    return Sizing(
        model_type=model.model_type,
        gpu=fit.gpu.name,
        dtype=fit.dtype,
        has_mtp=model.has_mtp,
        backbone_gpus=num_backbones,
        expert_gpus=num_shards,
        requests_per_backbone=batch,
        device_homes=1 if host else 2,
        checkpoint_bytes=sum(model.stored(fit.dtype).values()),
        backbone_weight_bytes=fit.weights,
        experts_bytes=whole,
        state_memory_bytes=whole_gib(ceil(batch * fit.request_bytes / (1 - SAVED_SHARE))),
        shard_memory_bytes=fit.shard_memory,
        shard_host_bytes=host,
        host_homes_bytes=whole if host else 0,
        backbone_pod_memory_bytes=BACKBONE_POD_GIB * GIB,
        shard_pod_memory_bytes=host + SHARD_POD_GIB * GIB,
        kv_bytes_per_token=model.state.kv_bytes + model.state.mtp_kv_bytes,
        kv_bytes_per_request=fit.kv_bytes,
        state_bytes_per_request=model.state.sequence_bytes,
        draft_bytes_per_request=fit.draft_bytes,
        unique_shards=round(unique_shards(experts.num_experts, experts.top_k, num_shards), 2),
        wire_bytes_per_token=wire.total,
        backbone_bits_per_s=round(of_backbone),
        backbone_link_bits_per_s=round(of_backbone / TRANSFER_SHARE),
        shard_bits_per_s=round(of_shard),
        shard_link_bits_per_s=round(of_shard / TRANSFER_SHARE),
        step_us={part: round(1e3 * ms) for part, ms in fit.step_of(num_backbones, num_shards).items()},
    )


def _reasons(fit: Fit, made: Sizing) -> Iterator[str]:
    """Which constraint decided each number."""
    yield (
        f"Backbones: {_why_backbones(fit, made)}. Beside {fit.weights / GB:.1f} GB of weights one has room for "
        f"{fit.most_requests:,} requests of {fit.slo.context_len:,} tokens, {fit.request_bytes / GB:.2f} GB each, and "
        f"for states that later prompts start from."
    )
    yield (
        f"Expert GPUs: {_why_shards(fit, made)}. {fit.experts_bytes / GB:.1f} GB of experts, "
        f"{fit.shard_memory / GB:.1f} GB on each at most, and they still hold one home of all when any one is lost."
    )
    if made.device_homes == 2:
        yield "Homes: two of every expert fit on GPUs, also when one is lost, so host memory holds none."
    else:
        yield (
            f"Homes: one of every expert on a GPU; the second in host memory of another shard, "
            f"{made.shard_host_bytes // GIB} GiB on each, so that the others can hold all when one is lost."
        )
    step = ", ".join(f"{part} {us / 1e3:.1f}" for part, us in made.step_us.items())
    yield (
        f"Pace (estimated, without drafts and prompts): {step} of {fit.step_ms:.1f} ms, which is what "
        f"{fit.slo.itl_ms:g} ms between tokens leave beside the transfer; calls take {fit.slo.call_ms:g} ms each."
    )
    links = [f"{bits / 1e9:.1f} Gbit/s" for bits in (made.backbone_link_bits_per_s, made.shard_link_bits_per_s)]
    yield (
        f"Network: in a layer a token goes to {made.unique_shards:.2f} of {made.expert_gpus} shards; with {links[0]} "
        f"at a backbone and {links[1]} at a shard the transfer takes {TRANSFER_SHARE:.0%} of the time between tokens."
    )
    if fit.dtype != "bf16" and fit.gpu.fp8_flops is None:
        yield f"Arithmetic: {fit.gpu.name} multiplies no 8-bit numbers, so {fit.dtype} weights are widened to bf16."


def _why_backbones(fit: Fit, made: Sizing) -> str:
    by_memory = ceil(fit.slo.num_requests / fit.most_requests)
    if made.backbone_gpus > fit.least_backbones:
        return f"pace decides, memory would do with {fit.least_backbones}"
    if made.backbone_gpus > by_memory:
        return f"{made.backbone_gpus} were asked for, memory would do with {by_memory}"
    return "memory decides" if by_memory > 1 else "one is enough"


def _why_shards(fit: Fit, made: Sizing) -> str:
    if made.expert_gpus > (fit.least_shards or 0):
        return f"pace decides, memory would do with {fit.least_shards}"
    return "two, so that one may be lost" if fit.is_whole else "memory decides"
