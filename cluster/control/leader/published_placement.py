"""The placement that is published, as the leader reads, replaces and restores it."""

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
    """A `PublishedPlacement` knows the placement in the registry and since when backbones use it.

    - `model`, `layers`: the checkpoint and its experts; a placement for others counts as none.
    - `clock`: seconds since 1970.
    - `drain_s`: seconds between the time when all backbones follow an epoch and the time when the experts that the
      epoch gave up may be dropped.
    - `recovery_s`: seconds that backbones have to bring back a placement that the store has lost.
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
        self._followed_since: tuple[int, float] | None = None  # An epoch, and since when all backbones follow it.

    @property
    def target(self) -> Target | None:
        """Return the homes that are published, in a plan's terms."""
        return Target.of(self.placement) if self.placement else None

    @property
    def order(self) -> LeaderOrder:
        """Return what an order to a shard carries now; only the leader may give orders."""
        return LeaderOrder(self.placement.epoch if self.placement else 0, self.lease.fencing)

    def forget_followers(self) -> None:
        """Time anew since when backbones follow the placement: a new leader has not watched them."""
        self._followed_since = None

    def forget(self) -> None:
        """Forget the placement: while another controller leads, the placement may be replaced or withdrawn."""
        self.placement = None

    async def refresh(self) -> None:
        """Read the placement of this checkpoint; a store that has lost it gets it back.

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
        """Publish `target` as a new epoch; `gains` are gain exponents by layer that the placement must cover.

        Raises StoreUnavailable, or StalePlacement if another leader was faster.
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
        """Start the time without a placement if none is published, and end it if one is."""
        if self.placement is not None:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = self.clock()

    def restart_absence(self) -> None:
        """Start the time without a placement anew: while the store fails, backbones cannot bring a placement back."""
        self._missing_since = None

    @property
    def missing_s(self) -> float:
        """Return for how many seconds no placement has been published."""
        return 0.0 if self._missing_since is None else self.clock() - self._missing_since

    def is_drained(self, followed: Collection[int]) -> bool:
        """Return True if no call of an older epoch can be left; `followed` are the epochs that backbones use.

        All backbones must have followed the placement for `drain_s`. Without a placement there must be no backbones,
        and those that restart must have had time to bring one back. Then what a shard holds is either wanted by the
        first placement or in its way.
        """
        if self.placement is None:
            return not followed and self.missing_s > self.recovery_s
        if any(epoch != self.placement.epoch for epoch in followed):
            self._followed_since = None
        elif self._followed_since is None or self._followed_since[0] != self.placement.epoch:
            self._followed_since = self.placement.epoch, self.clock()
        return self._followed_since is not None and self.clock() - self._followed_since[1] >= self.drain_s
