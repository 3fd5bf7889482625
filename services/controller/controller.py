"""The controller: makes the first placement, and keeps every shard holding what the placement says.

It is never on the token path: backbones run on the last placement they saw.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.planner import first_placement
from cluster.registry import RegistryStore, StalePlacement, StoreUnavailable
from cluster.topology import LayerSpec, Placement, Shard, held_digest
from model.moe import ExpertShape
from services.expert import control

log = logging.getLogger(__name__)

PERIOD_S = 0.5


@dataclass(frozen=True)
class ControllerConfig:
    """`num_shards`: how many must have registered before the first placement is made."""

    num_shards: int
    dtype: torch.dtype
    num_homes: int = 2


def layer_specs(shapes: Sequence[ExpertShape], dtype: torch.dtype) -> list[LayerSpec]:
    """The planner's view of the experts."""
    return [LayerSpec(shape.layer, shape.num_experts, shape.nbytes(dtype), shape.top_k) for shape in shapes]


def stale_shards(placement: Placement, shards: Sequence[Shard]) -> list[Shard]:
    """The placement's live shards that do not hold exactly what it gives them, as after a restart."""
    wanted = {
        shard.id: held_digest(placement.experts_of(shard.id)) for shard in shards if shard.id in placement.shard_ids
    }
    return [shard for shard in shards if wanted.get(shard.id, shard.held_digest) != shard.held_digest]


class Controller:
    """One loop over registry and shards."""

    def __init__(self, config: ControllerConfig, shapes: Sequence[ExpertShape], registry: RegistryStore) -> None:
        self.config, self.registry = config, registry
        self.layers = layer_specs(shapes, config.dtype)
        self.placement: Placement | None = None

    async def run(self) -> None:
        """Until cancelled. A store or a shard that fails is tried again at the next turn."""
        while True:
            try:
                await self.turn()
            except (StoreUnavailable, StalePlacement, control.ShardError) as error:
                log.warning("This turn of the controller failed: %s", error)
            await asyncio.sleep(PERIOD_S)

    async def turn(self) -> None:
        shards = await self.registry.shards()
        self.placement = await self.registry.placement() or self.placement
        if self.placement is None:
            if len(shards) >= self.config.num_shards:
                await self._place(shards)
            return
        await self._republish()
        await self._refill(shards)

    async def _place(self, shards: Sequence[Shard]) -> None:
        homes = first_placement(self.layers, shards, num_homes=self.config.num_homes)
        placement = await control.fill(shards, homes, epoch=1)
        await self.registry.publish(placement, expected_epoch=0, fencing=0)
        log.info("Epoch 1 places %d layers on %d shards, cover %d.", len(homes), len(shards), placement.cover())

    async def _republish(self) -> None:
        """A store that came back empty gets the placement that is running."""
        assert self.placement is not None
        if await self.registry.placement() is None:
            await self.registry.publish(self.placement, expected_epoch=0, fencing=0)

    async def _refill(self, shards: Sequence[Shard]) -> None:
        assert self.placement is not None
        for shard in stale_shards(self.placement, shards):
            await control.load(shard.endpoint, self.placement.experts_of(shard.id), self.placement.epoch)
