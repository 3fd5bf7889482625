"""The `PublishedPlacement` reads, replaces and restores the placement in the registry for the leader."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from cluster.control.leader.lease_keeper import LeaseKeeper
from cluster.control.registry_store import RegistryStore
from cluster.control.shard_control import LeaderOrder
from cluster.placement.migration import Target
from cluster.topology import LayerSpec, Placement

log = logging.getLogger(__name__)


class PublishedPlacement:
    """A `PublishedPlacement` holds the published placement, and the time since which all backbones follow it.

    - `model`, `layers`: the checkpoint's digest and layers. A placement for another checkpoint is ignored.
    - `clock`: gives seconds since 1970.
    - `drain_s`: shards keep the homes that an epoch removed until all backbones have followed the epoch for this many
      seconds.
    - `recovery_s`: after the store has lost the placement, backbones have this many seconds to publish the placement
      again.
    """

    def __init__(
        self,
        model: str,
        layers: Sequence[LayerSpec],
        registry: RegistryStore,
        lease: LeaseKeeper,
        clock: Callable[[], float],
        drain_s: float,
        recovery_s: float,
    ) -> None:
        self.model, self.layers, self.registry, self.lease, self.clock = model, layers, registry, lease, clock
        self.drain_s, self.recovery_s = drain_s, recovery_s
        self.placement: Placement | None = None
        self._missing_since: float | None = None
        # An epoch, and the time since which all backbones follow the epoch.
        self._followed_since: tuple[int, float] | None = None

    @property
    def target(self) -> Target | None:
        """Return the homes and standbys of the published placement, or None if no placement is published."""
        return Target.of(self.placement) if self.placement else None

    @property
    def order(self) -> LeaderOrder:
        """Return the epoch and the fencing token that go with an order to a shard.

        The controller must hold the lease. The epoch is 0 if no placement is published.
        """
        return LeaderOrder(self.placement.epoch if self.placement else 0, self.lease.fencing)

    def forget_followers(self) -> None:
        """Forget since when all backbones follow the placement, because a new leader has not watched the backbones."""
        self._followed_since = None

    def forget(self) -> None:
        """Forget the placement, because another controller leads and may replace the placement."""
        self.placement = None

    async def refresh(self) -> None:
        """Read the placement from the store; if the store has lost the known placement, publish the placement again.

        Raises StoreUnavailable or StalePlacement.
        """
        stored_epoch, known = await self.registry.epoch(), self.placement
        if known is not None and stored_epoch < known.epoch:
            await self.registry.publish(known, stored_epoch, self.order.fencing)
        if known is None or stored_epoch > known.epoch:
            stored = await self.registry.placement()
            self.placement = stored if stored is not None and self._is_ours(stored) else None

    def _is_ours(self, placement: Placement) -> bool:
        num_experts = {layer: len(homes) for layer, homes in placement.homes.items()}
        return placement.model == self.model and num_experts == {s.layer: s.num_experts for s in self.layers}

    async def publish(self, target: Target, gains: Mapping[int, int]) -> None:
        """Publish `target` as a new epoch.

        `gains` are the largest gain exponents, by layer, that shards have reported. If the last placement has a larger
        exponent for a layer, the new placement keeps the larger exponent. Raises StoreUnavailable, or StalePlacement if
        another leader has published a placement first.
        """
        stored = await self.registry.placement()
        before = stored.epoch if stored else 0
        known = self.placement.gains if self.placement else {}
        gains = {layer: max(gain, known.get(layer, gain)) for layer, gain in {**known, **gains}.items()}
        epoch = max(before + 1, round(1000 * self.clock()))
        placement = Placement(epoch, target.homes, gains, self.model, target.standby)
        await self.registry.publish(placement, before, self.lease.fencing)
        self.placement = placement
        log.info("Epoch %d is published; cover %d.", epoch, placement.cover())

    def time_absence(self) -> None:
        """Start the timer of `missing_s` if no placement is published; stop the timer if a placement is published."""
        if self.placement is not None:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = self.clock()

    def restart_absence(self) -> None:
        """Set `missing_s` to 0, because backbones cannot publish a placement again while the store fails."""
        self._missing_since = None

    @property
    def missing_s(self) -> float:
        """Return for how many seconds no placement has been published, or 0 if a placement is published."""
        return 0.0 if self._missing_since is None else self.clock() - self._missing_since

    def is_drained(self, followed: Collection[int]) -> bool:
        """Return True if no layer call of an older epoch can be left; `followed` are the epochs that backbones use.

        - If a placement is published, all backbones must have followed it for `drain_s` seconds.
        - If no placement is published, there must be no backbone. The placement must also have been missing for more
          than `recovery_s` seconds, so that backbones had time to publish it again. Shards may then drop every expert
          that the first placement does not need.
        """
        if self.placement is None:
            return not followed and self.missing_s > self.recovery_s
        if any(epoch != self.placement.epoch for epoch in followed):
            self._followed_since = None
        elif self._followed_since is None or self._followed_since[0] != self.placement.epoch:
            self._followed_since = self.placement.epoch, self.clock()
        return self._followed_since is not None and self.clock() - self._followed_since[1] >= self.drain_s
