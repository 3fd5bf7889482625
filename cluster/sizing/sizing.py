"""A sizing says how many GPUs the deployment of a model needs, and what is on each GPU.

`size` is pure arithmetic on the model's sizes, a GPU and an `Slo`. Memory is exact: loaded weights are counted to the
byte (`cluster/sizing/fit.py`). Times are estimates from data sheets (`cluster/sizing/step_time.py`). The estimates
count decode steps, but no prompts and no drafts. Measurements must confirm the estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from cluster.sizing.fit import GIB, MARGIN, NUM_HOMES, SAVED_SHARE, TRANSFER_SHARE, Fit, Slo, whole_gib
from cluster.sizing.gpus import GB, GPUS, MB, Gpu
from cluster.sizing.model_sizes import ModelSizes, model_sizes
from cluster.sizing.step_time import BALANCE, shards_of_token, wire_of
from cluster.sizing.weight_formats import Dtype, dtype_of

# Host memory of a pod in GiB for processes, Ray and the disk cache of the checkpoint. The two numbers are assumptions.
BACKBONE_POD_GIB, SHARD_POD_GIB = 32, 16
# Bytes of a volume divided by the bytes of its checkpoint. The rest is for small files and for the file system.
VOLUME_MARGIN = 1.2
START_S = 600  # Seconds in which all shards must have read their experts: how long a backbone waits for them.
SHARD_GB_PER_S = 2  # GB/s at which one shard reads in the example that the reasons give.


@dataclass(frozen=True)
class Sizing:
    """A `Sizing` is the result of `size`; Kubernetes manifests can be checked against it.

    - `state_memory_bytes` is the `state_memory` of a backbone in the Serve config, in whole GiB.
    - `shard_memory_bytes` and `shard_host_bytes` are the `memory_budget` and `host_budget` of a shard, in whole GiB.
    - `backbone_pod_memory_bytes` and `shard_pod_memory_bytes` are the host memory of a pod, in whole GiB; a shard's
      host budget is included.
    - `device_homes` is the number of an expert's homes on GPUs. If `device_homes` is 1, every expert also has a standby
      in the host memory of another shard, and `host_homes_bytes` are the bytes of all standbys.
    - `kv_bytes_per_request` is the KV of `context_len` tokens in whole pages.
    - `unique_shards` is the expected number of shards that a token goes to in one layer. Only this number has decimals.
    - `wire_bytes_per_token` counts the rows and sums of all layers of experts except the layers of the MTP module.
    - `out_bytes_per_token` and `back_bytes_per_token` are the two parts of `wire_bytes_per_token`: the bytes from the
      backbone to all shards, and from all shards to the backbone.
    - `backbone_bits_per_s` and `shard_bits_per_s` are means of both directions together, while all requests decode.
    - `backbone_link_bits_per_s` and `shard_link_bits_per_s` are the speeds that a network card needs so that transfers
      take no more than their share of the time between tokens.
    - `volume_bytes` is the size of a volume for the checkpoint: VOLUME_MARGIN times its bytes, in whole 10 GiB.
    - `backbone_read_bytes` and `shard_read_bytes` are the stored bytes that a backbone and a shard read from the volume
      at the start. A shard reads its homes and its standbys, and an expert has two of them in all.
    - `start_bytes_per_s` is the speed of the volume at which all backbones and shards together have read their bytes
      within START_S.
    - `step_us` is the estimated time of each part of a step.
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
    out_bytes_per_token: int
    back_bytes_per_token: int
    backbone_bits_per_s: int
    backbone_link_bits_per_s: int
    shard_bits_per_s: int
    shard_link_bits_per_s: int
    volume_bytes: int
    backbone_read_bytes: int
    shard_read_bytes: int
    start_bytes_per_s: int
    step_us: Mapping[str, int]
    reasons: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        """Return the number of GPUs of all backbones and shards."""
        return self.backbone_gpus + self.expert_gpus

    def to_dict(self) -> dict[str, Any]:
        """Return the sizing as a dictionary for JSON."""
        return {**asdict(self), "reasons": list(self.reasons)}


def size(config: Mapping[str, Any], gpu: Gpu, dtype: Dtype | None = None, slo: Slo | None = None) -> Sizing:
    """Size a deployment of the model that a parsed `config.json` describes, as `sizing_of` does."""
    return sizing_of(model_sizes(config), gpu, dtype or dtype_of(config), slo or Slo())


def sizing_of(model: ModelSizes, gpu: Gpu, dtype: Dtype, slo: Slo) -> Sizing:
    """Size a deployment of `model` in `dtype`.

    Raises ValueError if a backbone does not fit the GPU, or if no number of GPUs is fast enough. In both cases, the
    message names the GPUs that are large and fast enough.
    """
    if slo.context_len > model.max_context:
        raise ValueError(f"the context is {slo.context_len} tokens; the model allows up to {model.max_context}")
    fit = Fit(model, gpu, dtype, slo)
    if why := fit.why_not:
        others = [other.name for other in GPUS.values() if replace(fit, gpu=other).why_not is None]
        raise ValueError(f"{why}; {' or '.join(others) if others else 'none of ' + ', '.join(GPUS)} is enough")
    return replace(sizing := _sizing(fit), reasons=tuple(_reasons(fit, sizing)))


def _sizing(fit: Fit) -> Sizing:
    assert fit.fleet is not None
    (num_backbones, num_shards), model, slo = fit.fleet, fit.model, fit.slo
    batch = fit.batch(num_backbones)
    host = 0 if fit.has_device_cover(num_shards) else whole_gib(MARGIN * fit.standbys_bytes / (num_shards - 1))
    wire = wire_of(model, num_shards)
    bits = 8e3 * wire.total / slo.itl_ms  # Bits per second of one request.
    of_backbone, of_shard = bits * batch, bits * slo.num_requests / (BALANCE * num_shards)
    stored = model.stored(fit.dtype)
    experts_read = NUM_HOMES * (stored["routed"] + stored.get("mtp routed", 0))
    backbone_read = sum(num for part, num in stored.items() if part not in ("routed", "mtp routed", "mtp copies"))
    return Sizing(
        model_type=model.model_type,
        gpu=fit.gpu.name,
        dtype=fit.dtype,
        has_mtp=model.has_mtp,
        backbone_gpus=num_backbones,
        expert_gpus=num_shards,
        requests_per_backbone=batch,
        device_homes=1 if host else 2,
        checkpoint_bytes=sum(stored.values()),
        backbone_weight_bytes=fit.weight_bytes,
        experts_bytes=fit.experts_bytes,
        state_memory_bytes=whole_gib(ceil(batch * fit.request_bytes / (1 - SAVED_SHARE))),
        shard_memory_bytes=fit.shard_bytes,
        shard_host_bytes=host,
        host_homes_bytes=fit.standbys_bytes if host else 0,
        backbone_pod_memory_bytes=BACKBONE_POD_GIB * GIB,
        shard_pod_memory_bytes=host + SHARD_POD_GIB * GIB,
        kv_bytes_per_token=model.state.kv_bytes + model.state.mtp_kv_bytes,
        kv_bytes_per_request=fit.kv_bytes,
        state_bytes_per_request=model.state.sequence_bytes,
        draft_bytes_per_request=fit.draft_bytes,
        unique_shards=round(shards_of_token(model, num_shards), 2),
        wire_bytes_per_token=wire.total,
        out_bytes_per_token=wire.out,
        back_bytes_per_token=wire.back,
        backbone_bits_per_s=round(of_backbone),
        backbone_link_bits_per_s=round(of_backbone / TRANSFER_SHARE),
        shard_bits_per_s=round(of_shard),
        shard_link_bits_per_s=round(of_shard / TRANSFER_SHARE),
        volume_bytes=ceil(VOLUME_MARGIN * sum(stored.values()) / (10 * GIB)) * 10 * GIB,
        backbone_read_bytes=backbone_read,
        shard_read_bytes=ceil(experts_read / num_shards),
        start_bytes_per_s=ceil((num_backbones * backbone_read + experts_read) / START_S),
        step_us={part: round(1e3 * ms) for part, ms in fit.step_parts_ms(num_backbones, num_shards).items()},
    )


def _reasons(fit: Fit, sizing: Sizing) -> Iterator[str]:
    """Yield the sentences that say which constraint decided each number."""
    kept = "state checkpoints" if sizing.state_bytes_per_request else "pages"
    yield (
        f"Backbones: {_why_backbones(fit, sizing)}. Beside {fit.weight_bytes / GB:.1f} GB of weights, a backbone has "
        f"room for {fit.max_requests:,} requests of {fit.slo.context_len:,} tokens, {fit.request_bytes / GB:.2f} GB "
        f"each, and for {kept} from which later prompts start."
    )
    yield (
        f"Expert GPUs: {_why_shards(fit, sizing)}. The experts take {fit.experts_bytes / GB:.1f} GB, and a shard holds "
        f"{fit.shard_bytes / GB:.1f} GB at most. The shards still hold one home of every expert when any shard is lost."
    )
    if sizing.device_homes == 2:
        yield "Homes: two homes of every expert fit on GPUs, also when a GPU is lost, so host memory holds no standbys."
    else:
        yield (
            f"Homes: one home of every expert is on a GPU, and a standby is in the host memory of another shard. "
            f"Standbys take {sizing.shard_host_bytes // GIB} GiB on each shard, so that all standbys fit on the other "
            f"shards when one shard is lost."
        )
    step = ", ".join(f"{part} {us / 1e3:.1f}" for part, us in sizing.step_us.items())
    yield (
        f"Step time (estimated, without drafts and prompts): {step} ms; together at most {fit.step_limit_ms:.1f} ms "
        f"are allowed, which {fit.slo.itl_ms:g} ms between tokens leave beside the transfers. A layer call takes "
        f"{fit.slo.call_ms:g} ms without the shards' computation."
    )
    links = [f"{bits / 1e9:.1f} Gbit/s" for bits in (sizing.backbone_link_bits_per_s, sizing.shard_link_bits_per_s)]
    out, back = sizing.out_bytes_per_token / MB, sizing.back_bytes_per_token / MB
    yield (
        f"Network: in a layer a token goes to {sizing.unique_shards:.2f} of {sizing.expert_gpus} shards. In all "
        f"layers, a backbone sends {out:.2f} MB for a token and receives {back:.2f} MB; a shard receives "
        f"{out / sizing.expert_gpus:.2f} MB and sends {back / sizing.expert_gpus:.2f} MB on average. A backbone "
        f"decodes {1e3 * sizing.requests_per_backbone / fit.slo.itl_ms:,.0f} tokens/s. With {links[0]} at a backbone "
        f"and {links[1]} at a shard, transfers take {TRANSFER_SHARE:.0%} of the time between tokens."
    )
    yield (
        f"Volume: the checkpoint has {sizing.checkpoint_bytes / GB:.1f} GB, so its volume needs "
        f"{sizing.volume_bytes // GIB} GiB. At the start a shard reads {sizing.shard_read_bytes / GB:.1f} GB, for its "
        f"homes and standbys, and a backbone reads {sizing.backbone_read_bytes / GB:.1f} GB. If the volume delivers "
        f"{sizing.start_bytes_per_s / GB:.2f} GB/s, all of them have read their bytes after {START_S // 60} minutes, "
        f"the longest time that a backbone waits. A shard that reads {SHARD_GB_PER_S} GB/s needs "
        f"{sizing.shard_read_bytes / (SHARD_GB_PER_S * GB):.0f} s."
    )
    if fit.dtype != "bf16":
        yield (
            f"Widening: GPUs widen {fit.dtype} weights to bf16 when they load them, so that on GPUs these weights take "
            f"the memory and the time of bf16. Standbys in host memory stay in {fit.dtype}."
        )


def _why_backbones(fit: Fit, sizing: Sizing) -> str:
    by_memory = ceil(fit.slo.num_requests / fit.max_requests)
    if sizing.backbone_gpus > fit.fewest_backbones:
        return f"step time decides, memory alone would need {fit.fewest_backbones}"
    if sizing.backbone_gpus > by_memory:
        return f"{sizing.backbone_gpus} were asked for, memory alone would need {by_memory}"
    return "memory decides" if by_memory > 1 else "one is enough"


def _why_shards(fit: Fit, sizing: Sizing) -> str:
    if sizing.expert_gpus > (fit.fewest_shards or 0):
        return f"step time decides, memory alone would need {fit.fewest_shards}"
    return "two, so that one may be lost" if fit.holds_all_experts else "memory decides"
