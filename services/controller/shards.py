"""What the controller asks of shards, over gRPC; what they load is checked against the manifest."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch

from cluster.control.manifest import Manifest, weights_name
from cluster.control.registry_store import RegistryStore
from cluster.control.shard_control import LeaderOrder, ShardFailed, WitnessFailed
from cluster.placement.migration import DEVICE, STANDBY, Holding
from cluster.topology import Experts, Shard
from model.blocks.moe import ExpertShape
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert import shard_control
from services.expert.load_order import Sources, group_by_layer

log = logging.getLogger(__name__)


class GrpcShards:
    """Implements `cluster.control.shard_control.ShardControl`."""

    def __init__(self, registry: RegistryStore, shapes: Sequence[ExpertShape], model: str, dtype: torch.dtype) -> None:
        self.registry, self.shapes, self.dtype = registry, shapes, dtype
        self._sizes = {shape.layer: shape.nbytes(dtype) for shape in shapes}
        self.weights = weights_name(model, str(dtype).removeprefix("torch."))
        self._gains: dict[int, int] = {}

    async def holding(self, shard: Shard) -> Holding:
        """Bytes of homes alone: what is promoted for calls makes room for homes, and would hold one up for ever."""
        status = await shard_control.status(shard.endpoint)
        experts = {*_flat(status.held, DEVICE), *_flat(status.standby, STANDBY)}
        used_bytes = sum(len(of.experts) * self._sizes[of.layer] for of in status.held)
        return Holding(frozenset(experts), used_bytes)

    async def load(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> Mapping[int, int]:
        """Raises ShardFailed also for experts that are not made of the bytes that were seen first; they are dropped."""
        layers = sorted({*device, *standby})
        known = {layer: await self.registry.checksums(self.weights, layer) for layer in layers}
        wanted = [(layer, expert) for by in (device, standby) for layer, own in by.items() for expert in own]
        expected = {(layer, expert): known[layer][expert] for layer, expert in wanted if expert in known[layer]}
        sources = Sources(expected=expected)
        loaded = await shard_control.load(shard.endpoint, device, order.epoch, standby, sources, order.fencing)
        first = {
            layer: await self.registry.note_checksums(self.weights, layer, seen)
            for layer, seen in loaded.checksums.items()
        }
        if wrong := Manifest(first).mismatches(loaded.checksums):
            await self.drop(shard, device, standby, order)
            raise ShardFailed(" ".join(map(str, wrong)))
        for layer, gain in loaded.gains.items():
            self._gains[layer] = max(gain, self._gains.get(layer, gain))
        return loaded.gains

    async def drop(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> None:
        await shard_control.unload(shard.endpoint, device, order.epoch, standby, order.fencing)

    async def disagreements(self, old: Shard, new: Shard, experts: Experts) -> dict[int, list[int]]:
        try:
            wrong = await shard_control.canary(
                old.endpoint, new.endpoint, experts, self.shapes, self.dtype, self._gains
            )
        except shard_control.ShardError as error:
            if error.endpoint == old.endpoint:
                raise WitnessFailed(str(error)) from error
            raise
        return group_by_layer(wrong)


def _flat(experts: Iterable[pb.LayerExperts], tier: str) -> Iterable[tuple[int, int, str]]:
    return ((of.layer, expert, tier) for of in experts for expert in of.experts)
