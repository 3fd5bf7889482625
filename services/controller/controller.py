"""The controller: makes the first placement, and keeps every shard holding what the placement says.

It is never on the token path: backbones run on the last placement they saw.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cluster.first_placement import first_placement
from cluster.registry import RegistryStore, StalePlacement, StoreUnavailable
from cluster.topology import Homes, LayerSpec, Placement, Shard
from model.moe import ExpertShape
from services.expert import control

log = logging.getLogger(__name__)

PERIOD_S = 0.5


@dataclass(frozen=True)
class ControllerConfig:
    """`num_shards` of each pool must have registered before a placement is made; `model` is the checkpoint's digest.

    A shard that is missing from the store for `gone_after_s` is replaced by a new one; a store that came back empty is
    full again by then.
    """

    num_shards: Mapping[str, int]
    model: str
    dtype: torch.dtype
    num_homes: int = 2
    gone_after_s: float = 2.0


def layer_specs(shapes: Sequence[ExpertShape], dtype: torch.dtype) -> list[LayerSpec]:
    """The planner's view of the experts."""
    return [LayerSpec(shape.layer, shape.num_experts, shape.nbytes(dtype), shape.top_k) for shape in shapes]


def stale_shards(placement: Placement, shards: Sequence[Shard]) -> list[Shard]:
    """The placement's live shards that do not hold exactly what it gives them, as after a restart."""
    homes = set(placement.shard_ids)
    return [shard for shard in shards if shard.id in homes and shard.held_digest != placement.digest_of(shard.id)]


def hand_over(placement: Placement, gone: Collection[str], shards: Sequence[Shard]) -> tuple[Placement, list[Shard]]:
    """Gives each shard that is gone one that is new in the fleet; returns the next epoch, and who is new in it."""
    named = placement.shard_ids
    new = [shard for shard in shards if shard.id not in named and not shard.draining]
    heirs = {old: shard.id for old, shard in zip(sorted(gone), new, strict=False)}

    def renamed(homes_of: Mapping[int, Homes]) -> dict[int, Homes]:
        return {la: tuple(tuple(heirs.get(id, id) for id in ids) for ids in homes) for la, homes in homes_of.items()}

    homes, standby = renamed(placement.homes), renamed(placement.standby)
    return replace(placement, epoch=placement.epoch + 1, homes=homes, standby=standby), new[: len(heirs)]


class Controller:
    """One loop over registry and shards."""

    def __init__(self, config: ControllerConfig, shapes: Sequence[ExpertShape], registry: RegistryStore) -> None:
        self.config, self.registry = config, registry
        self.layers = layer_specs(shapes, config.dtype)
        self.placement: Placement | None = None
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._missing_since: dict[str, float] = {}

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
            self.placement = stored if stored and self.fits(stored, shards) else await self._place(shards, stored)
        elif stored is None:  # a store that came back empty gets the placement that is running
            await self.registry.publish(self.placement, expected_epoch=0, fencing=0)
        if self.placement is not None:
            self.placement = await self._replace_the_gone(self.placement, shards)
            self._refill(self.placement, shards)

    def fits(self, placement: Placement, shards: Sequence[Shard]) -> bool:
        """Whether it was made for this fleet and this checkpoint; a store may outlive both."""
        layers = {layer: len(homes) for layer, homes in placement.homes.items()}
        return (
            placement.model == self.config.model
            and sum(self.config.num_shards.values()) == len(placement.shard_ids)
            and any(shard.id in placement.shard_ids for shard in shards)
            and layers == {spec.layer: spec.num_experts for spec in self.layers}
        )

    async def _place(self, shards: Sequence[Shard], stored: Placement | None) -> Placement | None:
        """Places and publishes once all shards have registered; the first epoch is the time: none comes twice."""
        ours = [shard for shard in shards if not shard.draining]
        if any(sum(shard.pool == pool for shard in ours) < num for pool, num in self.config.num_shards.items()):
            return None
        homes = first_placement(self.layers, ours, num_homes=self.config.num_homes)
        before = stored.epoch if stored else 0
        placement = await control.fill(ours, homes, epoch=max(before + 1, int(time.time())))
        placement = replace(placement, model=self.config.model)
        await self.registry.publish(placement, expected_epoch=before, fencing=0)
        log.info("Epoch %d places %d layers, cover %d.", placement.epoch, len(homes), placement.cover())
        return placement

    async def _replace_the_gone(self, placement: Placement, shards: Sequence[Shard]) -> Placement:
        """Publishes a placement with new shards in the places of those that have been missing for long enough."""
        now, alive = time.monotonic(), {shard.id for shard in shards}
        gone = [shard_id for shard_id in placement.shard_ids if shard_id not in alive]
        self._missing_since = {shard_id: self._missing_since.get(shard_id, now) for shard_id in gone}
        given_up = [shard_id for shard_id in gone if now - self._missing_since[shard_id] >= self.config.gone_after_s]
        following, heirs = hand_over(placement, given_up, shards)
        if not heirs:
            return placement
        for heir in heirs:
            experts, standby = following.experts_of(heir.id), following.standby_of(heir.id)
            await control.load(heir.endpoint, experts, following.epoch, standby)
        await self.registry.publish(following, expected_epoch=placement.epoch, fencing=0)
        log.info("Epoch %d: %s take the places of %s.", following.epoch, [heir.id for heir in heirs], given_up)
        return following

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
            experts, standby = placement.experts_of(shard.id), placement.standby_of(shard.id)
            await control.load(shard.endpoint, experts, placement.epoch, standby)
        except control.ShardError as error:
            log.warning("Shard %s was not filled: %s", shard.id, error)
