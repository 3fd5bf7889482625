"""A migration leads from the running placement to the planned one in rounds: load, verify, publish, drain, drop.

The functions keep no state: every round is derived from the published placement, the target and the experts that the
shards hold. If a controller dies between two steps, its successor can therefore continue from what it observes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.topology import Homes, LayerSpec, Placement, Shard

DEVICE, STANDBY = "device", "standby"


class Home(NamedTuple):
    """A `Home` names one expert on one shard in one tier: in device memory, or as a standby."""

    layer: int
    expert: int
    shard_id: str
    tier: str = DEVICE


@dataclass(frozen=True)
class Target:
    """A `Target` lists the planned homes and standbys of all experts; a published target becomes a placement."""

    homes: Mapping[int, Homes]
    standby: Mapping[int, Homes]

    @classmethod
    def of(cls, placement: Placement) -> Target:
        return cls(placement.homes, placement.standby)

    def tiers(self, layer: int, expert: int) -> dict[str, str]:
        """Return the tier of one expert on each of its shards, by shard id; the preferred home comes first."""
        standby = self.standby[layer][expert] if layer in self.standby else ()
        return dict.fromkeys(self.homes[layer][expert], DEVICE) | dict.fromkeys(standby, STANDBY)

    def all_homes(self) -> Iterator[Home]:
        """Yield the homes and standbys of all experts."""
        for tier, homes_of in ((DEVICE, self.homes), (STANDBY, self.standby)):
            for layer, homes in homes_of.items():
                for expert, ids in enumerate(homes):
                    yield from (Home(layer, expert, id, tier) for id in ids)


@dataclass(frozen=True)
class Holding:
    """A `Holding` lists the experts on one shard as (layer, expert, tier), and the device memory in use, in bytes."""

    experts: frozenset[tuple[int, int, str]] = frozenset()
    used_bytes: int = 0


@dataclass(frozen=True)
class Limits:
    """`Limits` bound a migration: how many bytes are loaded at once, and how low the cover may become."""

    # Maximum number of bytes that one shard loads in a round. An expert with more bytes is loaded alone.
    bytes_in_flight: int = 256 << 20
    min_cover: int = 2  # Minimum number of live homes and standbys of an expert after a drop.

    def __post_init__(self) -> None:
        assert self.bytes_in_flight > 0
        assert self.min_cover >= 1


@dataclass(frozen=True)
class Round:
    """A `Round` lists the homes to load before the next epoch.

    `num_left` counts the missing homes that must wait for a later round because of the shards' memory or the limits.
    """

    loads: frozenset[Home]
    num_left: int

    def without(self, failed: Collection[Home]) -> Round:
        """Return the round without the `failed` homes, which then count in `num_left`."""
        lost = self.loads.intersection(failed)
        return Round(self.loads - lost, self.num_left + len(lost))


Holdings = Mapping[str, Holding]  # The `Holding` of each live shard, by shard id.


def held_homes(holdings: Holdings) -> set[Home]:
    """Return all homes and standbys that live shards hold."""
    return {Home(layer, expert, id, tier) for id, held in holdings.items() for layer, expert, tier in held.experts}


def next_round(
    layers: Sequence[LayerSpec],
    target: Target,
    published: Placement | None,
    shards: Sequence[Shard],
    holdings: Holdings,
    limits: Limits = Limits(),
) -> Round:
    """Return the homes to load now: experts with the fewest live homes first, within each shard's memory and limits.

    The round also contains homes that their shards already hold but that the published placement does not have yet.
    Loading such a home again costs nothing, and the order tells the shard which controller leads. Before the first
    placement is published, there is no limit on the bytes in flight, because loading disturbs no request.
    """
    specs, devices = {spec.layer: spec for spec in layers}, {shard.id: shard.device for shard in shards}
    held = held_homes(holdings)
    current = set(Target.of(published).all_homes()) if published else set()
    demoted = {home._replace(tier=STANDBY) for home in held & current if home.tier == DEVICE}
    missing = {home for home in target.all_homes() if home.shard_id in holdings} - (held & current) - demoted
    alive = Counter((home.layer, home.expert) for home in held & current)
    free_bytes = {
        shard.id: shard.memory_budget - holdings[shard.id].used_bytes for shard in shards if shard.id in holdings
    }
    in_flight: Counter[str] = Counter()
    loads = set()
    for home in sorted(missing, key=lambda home: (alive[home.layer, home.expert], home)):
        id, is_free = home.shard_id, home in held or home.tier == STANDBY
        spec = specs[home.layer]
        size, sent = (0, 0) if is_free else (spec.on_device(devices.get(id, "")), spec.expert_bytes)
        is_too_much = published is not None and in_flight[id] > 0 and in_flight[id] + sent > limits.bytes_in_flight
        if size <= free_bytes.get(id, 0) and not (size and is_too_much):
            loads.add(home)
            free_bytes[id] -= size
            in_flight[id] += sent
    return Round(frozenset(loads), len(missing) - len(loads))


def next_target(
    target: Target, published: Placement | None, done: Round, holdings: Holdings, limits: Limits = Limits()
) -> Target | None:
    """Return the homes to publish after the loads of round `done`, or None if there is nothing new to publish yet.

    - The first placement is published when it is complete.
    - A home that is not in the target stays until its expert has enough other live homes.
    - A home on a dead shard stays until the home is replaced, or until nothing is left to load.
    - If nothing can be loaded for lack of memory, one expert loses a home that is not in the target before a new home
      replaces it.
    """
    if published is None:
        return None if done.num_left else target
    held = held_homes(holdings)
    current = Target.of(published)
    after = {
        key: _next_homes(key, current, target, done.loads, held, limits.min_cover, not done.num_left, holdings)
        for key in _differences(current, target)
    }
    changed = {
        key: homes
        for key, homes in after.items()
        if homes != (before := current.tiers(*key)) or (homes == target.tiers(*key) and [*homes] != [*before])
    }
    if not changed and done.num_left and not done.loads:
        changed = _free_a_slot(target, after, held)
    return _replace_homes(current, changed) if changed else None


def leftovers(published: Placement | None, target: Target, holdings: Holdings) -> tuple[set[Home], set[Home]]:
    """Return the homes that live shards should drop, and the homes that live shards should demote to standbys.

    An expert is dropped from a shard if the shard is neither its home nor its standby, in the published placement and
    in the target. An expert is demoted if the shard holds the expert in device memory but should only be its standby.
    The second set lists demoted experts as `Home` tuples with the tier `STANDBY`.
    """
    named = set(target.all_homes()) | (set(Target.of(published).all_homes()) if published else set())
    places = {home[:3] for home in named}
    unnamed = held_homes(holdings) - named
    garbage = {home for home in unnamed if home[:3] not in places}
    return garbage, {home._replace(tier=STANDBY) for home in unnamed - garbage if home.tier == DEVICE}


def _is_on_device(home: Home, held: Collection[Home]) -> bool:
    """Return True if `home` is a standby and its shard already holds the expert in device memory."""
    return home.tier == STANDBY and home._replace(tier=DEVICE) in held


def _is_live(home: Home, held: Collection[Home]) -> bool:
    """Return True if the shard of `home` holds the expert, in device memory or as a standby."""
    return home in held or home._replace(tier=STANDBY if home.tier == DEVICE else DEVICE) in held


def by_shard(homes: Iterable[Home], tier: str) -> dict[str, dict[int, list[int]]]:
    """Return {shard id: {layer: experts}} for all homes in `tier`; the experts are sorted."""
    result: dict[str, dict[int, list[int]]] = {}
    for home in sorted(homes):
        if home.tier == tier:
            result.setdefault(home.shard_id, {}).setdefault(home.layer, []).append(home.expert)
    return result


def _differences(current: Target, target: Target) -> list[tuple[int, int]]:
    """Return each (layer, expert) whose homes, order of homes or standbys differ between `current` and `target`."""
    return [
        (layer, expert)
        for layer, homes in target.homes.items()
        for expert in range(len(homes))
        if current.homes[layer][expert] != homes[expert]
        or (
            (layer in current.standby or layer in target.standby)
            and current.tiers(layer, expert) != target.tiers(layer, expert)
        )
    ]


def _next_homes(
    key: tuple[int, int],
    current: Target,
    target: Target,
    verified: Collection[Home],
    held: Collection[Home],
    min_cover: int,
    is_complete: bool,
    alive: Collection[str],
) -> dict[str, str]:
    """Return the shards that should hold the expert `key` next, as a map from shard id to tier.

    Homes of the target are added once they are loaded and verified. Then homes that are not in the target are removed,
    if enough live homes stay.
    """
    target_tiers, tiers = target.tiers(*key), current.tiers(*key)
    min_live, needs_device = min(min_cover, len(target_tiers)), DEVICE in target_tiers.values()

    def is_enough(homes: Mapping[str, str]) -> bool:
        live = [tier for id, tier in homes.items() if _is_live(Home(*key, id, tier), held)]
        return len(live) >= min_live and (DEVICE in live or not needs_device)

    for id, tier in target_tiers.items():
        home = Home(*key, id, tier)
        if tiers.get(id) != tier and (home in verified or (id in tiers and _is_on_device(home, held))):
            after = {**tiers, id: tier}
            if tiers.get(id) != DEVICE or is_enough(after):
                tiers = after
    for id in [id for id in tiers if id not in target_tiers]:
        after = {other: tier for other, tier in tiers.items() if other != id}
        if is_enough(after) or (is_complete and id not in alive):
            tiers = after
    order = [*target_tiers, *tiers]
    return {id: tiers[id] for id in sorted(tiers, key=order.index)}


def _free_a_slot(
    target: Target, after: Mapping[tuple[int, int], dict[str, str]], held: Collection[Home]
) -> dict[tuple[int, int], dict[str, str]]:
    """Choose a home that an expert gives up; return {(layer, expert): {shard id: tier}} with the expert's other homes.

    The home is not in the target, and is removed from a shard that needs the memory for a home of the target. Only
    experts with another live home are considered. The result is empty if no home can be removed.
    """
    waiting = {home.shard_id for home in set(target.all_homes()) - set(held) if home.tier == DEVICE}
    for key, homes in sorted(after.items()):
        live = [id for id, tier in homes.items() if _is_live(Home(*key, id, tier), held)]
        for id in live:
            can_leave = id not in target.tiers(*key) and id in waiting and homes[id] == DEVICE
            if can_leave and len(live) > 1:
                return {key: {other: tier for other, tier in homes.items() if other != id}}
    return {}


def _replace_homes(current: Target, changed: Mapping[tuple[int, int], Mapping[str, str]]) -> Target:
    """Return `current` with new homes and standbys for the experts in `changed`."""
    tiers = {}
    for tier, homes_of in ((DEVICE, current.homes), (STANDBY, current.standby)):
        rows = {layer: list(homes) for layer, homes in homes_of.items()}
        for (layer, expert), homes in changed.items():
            row = rows.setdefault(layer, [()] * len(current.homes[layer]))
            row[expert] = tuple(id for id, of in homes.items() if of == tier)
        tiers[tier] = {layer: tuple(row) for layer, row in rows.items() if tier == DEVICE or any(row)}
    return Target(tiers[DEVICE], tiers[STANDBY])
