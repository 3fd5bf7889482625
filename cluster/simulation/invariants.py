"""The `Invariants` check what must always hold in a fleet, and what must hold after the last fault.

- No published placement leaves an expert without a live home or standby.
- No shard drops an expert while it is needed as the expert's home or standby. The published placement and the placement
  of each backbone that is up to date say which homes and standbys are needed.
- Epochs do not go backwards.
- Every pick of every call counts exactly once (checked by `SimBackbone`).
- No count of expert load is lost.
- No shard exceeds its budget (checked by `SimFleet` at each heartbeat).
- A call takes at most `MAX_CALL_S`.
- When the faults have ended, the fleet comes to rest within `MAX_REST_S`: the placement has full cover, every shard
  holds exactly its experts of the placement, and every backbone follows the placement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.simulation.simulated_backbone import SimBackbone
from cluster.simulation.simulated_fleet import SimFleet
from cluster.simulation.simulated_shards import SimShard
from cluster.topology import Placement

MAX_CALL_S = 20.0
MAX_REST_S = 40.0
MAX_UNSEEN_S = 1.5  # Seconds after a shard's death in which a controller may still believe that the shard is alive.


class Invariants:
    """The `Invariants` check a fleet when a placement is published, when experts are dropped, and at the end.

    Each violation is reported to `fleet.fail`.
    """

    def __init__(self, fleet: SimFleet) -> None:
        self.fleet = fleet
        fleet.on_publish, fleet.on_drop = self.check_publish, self.check_drop

    def _is_served(self, shard_ids: Sequence[str], layer: int, expert: int) -> bool:
        """Return True if one of the shards holds the expert; a shard that has just died still counts."""
        fleet = self.fleet
        shards = [fleet.shards[id] for id in shard_ids if id in fleet.shards]
        return any(
            (shard.is_up or fleet.time - shard.died_at < MAX_UNSEEN_S) and shard.has(layer, expert) for shard in shards
        )

    def check_publish(self, before: Placement | None, placement: Placement) -> None:
        """Check a placement that was just stored.

        Its epoch must not be older than the last epoch, and no expert may have lost its last live home or standby.
        """
        fleet = self.fleet
        if before is None:
            return
        if placement.epoch < before.epoch and not fleet.store.was_wiped:
            fleet.fail(f"epoch {placement.epoch} was published after {before.epoch}")
        fleet.store.was_wiped = False
        if placement.epoch <= before.epoch:
            return
        for layer in placement.homes:
            for expert, ids in enumerate(placement.all_homes(layer)):
                old = before.all_homes(layer)[expert]
                if ids != old and self._is_served(old, layer, expert) and not self._is_served(ids, layer, expert):
                    fleet.fail(
                        f"epoch {placement.epoch} moves expert {layer}/{expert} from {old} to {ids}: no home has it"
                    )

    def check_drop(self, shard: SimShard, dropped: set[tuple[int, int, str]], by: str) -> None:
        """Check that the experts `dropped` were not needed on `shard`.

        An expert is needed if a placement in use names `shard` as a home or standby of the expert. `by` is the name of
        the controller that ordered the drop.
        """
        fleet = self.fleet
        followed = [(backbone.name, backbone.follower.placement) for backbone in self._up_to_date_backbones()]
        is_stored = fleet.published is not None and fleet.store.registry.known_epoch == fleet.published.epoch
        for name, placement in [("the placement", fleet.published if is_stored else None), *followed]:
            if placement is None:
                continue
            for layer, expert, _ in sorted(dropped):
                if shard.name in placement.all_homes(layer)[expert]:
                    fleet.fail(f"{by} has {shard.name} drop expert {layer}/{expert}, for which {name} counts on it")

    def _up_to_date_backbones(self) -> list[SimBackbone]:
        """Return the backbones that the store counts as alive and that are not stopped.

        Other backbones need no check: their calls may find no home, and then wait until the backbone has read the
        newest placement.
        """
        known = self.fleet.store.registry.known_followers()
        return [backbone for backbone in self.fleet.backbones if backbone.name in known and not backbone.is_stopped]

    async def wait_for_rest(self) -> None:
        """Wait until the fleet is at rest or has failed; a fleet that is not at rest within MAX_REST_S fails."""
        began_at = self.fleet.time
        while self.fleet.error is None and (unrest := self.unrest()) is not None:
            if self.fleet.time - began_at > MAX_REST_S:
                self.fleet.fail(f"the fleet did not come to rest: {unrest}")
            await asyncio.sleep(0.5)

    def unrest(self) -> str | None:
        """Return a reason why the fleet is not at rest, or None if the fleet is at rest."""
        fleet, placement = self.fleet, self.fleet.published
        if placement is None:
            return "nothing is published"
        if fleet.store.registry.known_epoch != placement.epoch:
            return "the store has another placement"
        live = {id: shard for id, shard in fleet.shards.items() if shard.is_up}
        for backbone in fleet.backbones:
            if backbone.follower.epoch != placement.epoch:
                return f"{backbone.name} follows epoch {backbone.follower.epoch}"
            if late := [call for call in backbone.open_calls if fleet.time - call.started_at > 1.0]:
                return f"{backbone.name} waits for {len(late)} calls"
        if placement.cover(live) < 2:
            return f"cover is {placement.cover(live)}"
        for id, shard in live.items():
            if shard.record.held_digest != placement.digest_of(id):
                return f"{id} holds {sorted(shard.held)}, not what epoch {placement.epoch} says"
        return None

    def check_loads(self) -> None:
        """Check that no count of a pick is lost.

        Each pick must be in the store, under way to the store, in a backbone, or counted as dropped.
        """
        num_kept = sum(self.fleet.store.loads.values())
        for backbone in self.fleet.backbones:
            in_backbone = sum(int(counts.sum()) for counts in backbone.counter.take().values())
            num_kept += in_backbone + backbone.counter.num_dropped + backbone.num_in_flight
        num_counted = sum(backbone.num_counted for backbone in self.fleet.backbones)
        if num_kept < num_counted:
            self.fleet.fail(f"{num_counted} picks were counted, but {num_kept} are left")

    def check_calls(self) -> None:
        """Check that no layer call took longer than MAX_CALL_S."""
        if (slowest_s := self.slowest_call_s) > MAX_CALL_S:
            self.fleet.fail(f"a call took {slowest_s:.1f} s")

    @property
    def slowest_call_s(self) -> float:
        """Return how many seconds the slowest layer call of any backbone took."""
        return max(backbone.slowest_call_s for backbone in self.fleet.backbones)
