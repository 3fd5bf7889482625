"""The controller: makes the first placement, and keeps every shard holding what the placement says.

It is never on the token path: backbones run on the last placement they saw.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cluster.first_placement import first_placement
from cluster.registry import RegistryStore, StalePlacement, StoreUnavailable
from cluster.topology import LayerSpec, Placement, Shard
from model.moe import ExpertShape
from services.expert import control

log = logging.getLogger(__name__)

PERIOD_S = 0.5


@dataclass(frozen=True)
class ControllerConfig:
    """`shard_ids`: who must have registered before a placement is made; `model`: the checkpoint's digest."""

    shard_ids: frozenset[str]
    model: str
    dtype: torch.dtype
    num_homes: int = 2


def layer_specs(shapes: Sequence[ExpertShape], dtype: torch.dtype) -> list[LayerSpec]:
    """The planner's view of the experts."""
    return [LayerSpec(shape.layer, shape.num_experts, shape.nbytes(dtype), shape.top_k) for shape in shapes]


def stale_shards(placement: Placement, shards: Sequence[Shard]) -> list[Shard]:
    """The placement's live shards that do not hold exactly what it gives them, as after a restart."""
    homes = set(placement.shard_ids)
    return [shard for shard in shards if shard.id in homes and shard.held_digest != placement.digest_of(shard.id)]


class Controller:
    """One loop over registry and shards."""

    def __init__(self, config: ControllerConfig, shapes: Sequence[ExpertShape], registry: RegistryStore) -> None:
        self.config, self.registry = config, registry
        self.layers = layer_specs(shapes, config.dtype)
        self.placement: Placement | None = None
        self._loading: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until cancelled. A store or a shard that fails is tried again at the next turn."""
        while True:
            try:
                await self.turn()
            except (StoreUnavailable, StalePlacement, control.ShardError) as error:
                log.warning("This turn of the controller failed: %s", error)
            except Exception:
                log.exception("This turn of the controller failed.")
            await asyncio.sleep(PERIOD_S)

    async def turn(self) -> None:
        shards, stored = await self.registry.shards(), await self.registry.placement()
        if self.placement is None:
            self.placement = stored if stored is not None and self.fits(stored) else await self._place(shards, stored)
        elif stored is None:  # a store that came back empty gets the placement that is running
            await self.registry.publish(self.placement, expected_epoch=0, fencing=0)
        if self.placement is not None:
            self._refill(self.placement, shards)

    def fits(self, placement: Placement) -> bool:
        """Whether it was made for this fleet and this checkpoint; a store may outlive both."""
        layers = {layer: len(homes) for layer, homes in placement.homes.items()}
        return (
            placement.model == self.config.model
            and self.config.shard_ids == set(placement.shard_ids)
            and layers == {spec.layer: spec.num_experts for spec in self.layers}
        )

    async def _place(self, shards: Sequence[Shard], stored: Placement | None) -> Placement | None:
        """Places and publishes once all shards have registered; the first epoch is the time: none comes twice."""
        ours = [shard for shard in shards if shard.id in self.config.shard_ids]
        if len(ours) < len(self.config.shard_ids):
            return None
        homes = first_placement(self.layers, ours, num_homes=self.config.num_homes)
        before = stored.epoch if stored else 0
        placement = await control.fill(ours, homes, epoch=max(before + 1, int(time.time())))
        placement = replace(placement, model=self.config.model)
        await self.registry.publish(placement, expected_epoch=before, fencing=0)
        log.info("Epoch %d places %d layers, cover %d.", placement.epoch, len(homes), placement.cover())
        return placement

    def _refill(self, placement: Placement, shards: Sequence[Shard]) -> None:
        """Starts loading on every stale shard; one that is slow or broken holds up none of the others."""
        self._loading = {shard_id: task for shard_id, task in self._loading.items() if not task.done()}
        for shard in stale_shards(placement, shards):
            if shard.id not in self._loading:
                self._loading[shard.id] = asyncio.create_task(self._load(placement, shard))

    async def settled(self) -> None:
        """Waits for the loads that are under way."""
        await asyncio.gather(*self._loading.values())

    async def _load(self, placement: Placement, shard: Shard) -> None:
        try:
            await control.load(shard.endpoint, placement.experts_of(shard.id), placement.epoch)
        except control.ShardError as error:
            log.warning("Shard %s was not filled: %s", shard.id, error)
