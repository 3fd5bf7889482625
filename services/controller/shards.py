"""`GrpcShards` carries the leader's orders to shards over gRPC, and verifies loads against the manifest."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch

from cluster.control.manifest import Manifest, weights_name
from cluster.control.registry_store import RegistryStore
from cluster.control.shard_control import LeaderOrder, ShardFailed, WitnessFailed
from cluster.placement.migration import DEVICE, STANDBY, Holding
from cluster.topology import Experts, Shard
from model.blocks.expert_bank import memory_on
from model.configs.expert_shape import ExpertShape
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert import control_client
from services.expert.weights.load_order import Sources, group_by_layer

log = logging.getLogger(__name__)


class GrpcShards:
    """A `GrpcShards` implements `cluster.control.shard_control.ShardControl` for real shards.

    - `shapes`: the experts' shapes, from which the canary makes its rows.
    - `model`, `dtype`: the checkpoint's digest and the dtype of the weights, which together name the manifest.
    """

    def __init__(self, registry: RegistryStore, shapes: Sequence[ExpertShape], model: str, dtype: torch.dtype) -> None:
        self.registry, self.shapes, self.dtype = registry, shapes, dtype
        self.weights = weights_name(model, str(dtype).removeprefix("torch."))
        self._gains: dict[int, int] = {}  # The largest gain exponent that any load has reported, by layer.

    async def holding(self, shard: Shard) -> Holding:
        """Return the experts that `shard` holds, and the bytes of its homes.

        The bytes of promoted experts are not counted, because the shard evicts promoted experts when a home needs their
        memory. If these bytes were counted, the leader would wait for ever for free memory before it loads the home.
        """
        status = await control_client.status(shard.endpoint)
        experts = {*_flat(status.held, DEVICE), *_flat(status.standby, STANDBY)}
        memory = memory_on(self.shapes, self.dtype, shard.device)
        used_bytes = sum(len(of.experts) * memory[of.layer].device for of in status.held)
        return Holding(frozenset(experts), used_bytes)

    async def load(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> Mapping[int, int]:
        """Load experts on `shard` and verify their checksums; return each layer's largest gain exponent.

        The order contains the checksums in the manifest, and the shard refuses experts with other checksums. The
        checksums of experts that are loaded for the first time are added to the manifest afterwards. If another shard
        has meanwhile added other checksums for these experts, the shard drops the experts of the order.

        Raises ShardFailed if the shard refuses or drops experts because of their checksums.
        """
        layers = sorted({*device, *standby})
        known = {layer: await self.registry.checksums(self.weights, layer) for layer in layers}
        keys = [(layer, id) for by_layer in (device, standby) for layer, ids in by_layer.items() for id in ids]
        expected = {(layer, expert): known[layer][expert] for layer, expert in keys if expert in known[layer]}
        sources = Sources(expected=expected)
        loaded = await control_client.load(shard.endpoint, device, order.epoch, standby, sources, order.fencing)
        recorded = {
            layer: await self.registry.note_checksums(self.weights, layer, seen)
            for layer, seen in loaded.checksums.items()
        }
        if wrong := Manifest(recorded).mismatches(loaded.checksums):
            await self.drop(shard, device, standby, order)
            raise ShardFailed(" ".join(map(str, wrong)))
        for layer, gain in loaded.gains.items():
            self._gains[layer] = max(gain, self._gains.get(layer, gain))
        return loaded.gains

    async def drop(self, shard: Shard, device: Experts, standby: Experts, order: LeaderOrder) -> None:
        """Order `shard` to unload the experts `device` from device memory and to give up the standbys `standby`."""
        await control_client.unload(shard.endpoint, device, order.epoch, standby, order.fencing)

    async def disagreements(self, old: Shard, new: Shard, experts: Experts) -> dict[int, list[int]]:
        """Run the canary: return the experts, by layer, for which the shards `old` and `new` compute different sums."""
        try:
            wrong = await control_client.canary(
                old.endpoint, new.endpoint, experts, self.shapes, self.dtype, self._gains
            )
        except control_client.ShardError as error:
            if error.endpoint == old.endpoint:
                raise WitnessFailed(str(error)) from error
            raise
        return group_by_layer(wrong)


def _flat(experts: Iterable[pb.LayerExperts], tier: str) -> Iterable[tuple[int, int, str]]:
    return ((of.layer, expert, tier) for of in experts for expert in of.experts)
