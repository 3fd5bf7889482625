"""From the placement that is running to the one that was planned, in rounds: load, verify, publish, drain, drop.

Nothing here remembers anything. Every round is worked out anew from what is published, what is wanted and what the
shards hold, so a controller that dies between any two steps leaves nothing that the next one would not see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.topology import Homes, LayerSpec, Placement, Shard

DEVICE, STANDBY = "device", "standby"


class Home(NamedTuple):
    """One expert on one shard."""

    layer: int
    expert: int
    shard_id: str
    tier: str = DEVICE


@dataclass(frozen=True)
class Target:
    """Where experts should be: what a plan is about, and what a placement publishes."""

    homes: Mapping[int, Homes]
    standby: Mapping[int, Homes]

    @classmethod
    def of(cls, placement: Placement) -> Target:
        return cls(placement.homes, placement.standby)

    def tiers(self, layer: int, expert: int) -> dict[str, str]:
        """The tier of each home of one expert; the preferred home first."""
        standby = self.standby[layer][expert] if layer in self.standby else ()
        return dict.fromkeys(self.homes[layer][expert], DEVICE) | dict.fromkeys(standby, STANDBY)

    def all_homes(self) -> Iterator[Home]:
        for tier, homes_of in ((DEVICE, self.homes), (STANDBY, self.standby)):
            for layer, homes in homes_of.items():
                for expert, ids in enumerate(homes):
                    yield from (Home(layer, expert, id, tier) for id in ids)


@dataclass(frozen=True)
class Holding:
    """What one shard holds: (layer, expert, tier), and the bytes of device memory that takes."""

    experts: frozenset[tuple[int, int, str]] = frozenset()
    used_bytes: int = 0


@dataclass(frozen=True)
class Limits:
    """Bytes that one shard loads in a round (one expert at least), and homes that an expert keeps meanwhile."""

    bytes_in_flight: int = 256 << 20
    min_cover: int = 2

    def __post_init__(self) -> None:
        assert self.bytes_in_flight > 0
        assert self.min_cover >= 1


@dataclass(frozen=True)
class Round:
    """Homes to load before the next epoch; `num_left` are those that have no room yet, or wait for their turn."""

    loads: frozenset[Home]
    num_left: int

    def without(self, failed: Collection[Home]) -> Round:
        """What is left of it where some could not be loaded."""
        lost = self.loads.intersection(failed)
        return Round(self.loads - lost, self.num_left + len(lost))


Holdings = Mapping[str, Holding]  # of the shards that are alive


def held_homes(holdings: Holdings) -> set[Home]:
    return {Home(layer, expert, id, tier) for id, held in holdings.items() for layer, expert, tier in held.experts}


def next_round(
    layers: Sequence[LayerSpec],
    target: Target,
    published: Placement | None,
    shards: Sequence[Shard],
    holdings: Holdings,
    limits: Limits = Limits(),
) -> Round:
    """What to load now: experts with fewest live homes first, no shard over its memory or its bytes in flight.

    What a shard holds and no placement names yet is in the round too: loading it again costs nothing, and tells the
    shard who leads. Until something is published nobody is disturbed, and as much is loaded as there is room for.
    """
    sizes = {spec.layer: spec.expert_bytes for spec in layers}
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
        size = 0 if home in held or home.tier == STANDBY else sizes[home.layer]
        id = home.shard_id
        is_too_much = published is not None and in_flight[id] > 0 and in_flight[id] + size > limits.bytes_in_flight
        if size <= free_bytes.get(id, 0) and not (size and is_too_much):
            loads.add(home)
            free_bytes[id] -= size
            in_flight[id] += size
    return Round(frozenset(loads), len(missing) - len(loads))


def next_target(
    target: Target, published: Placement | None, done: Round, holdings: Holdings, limits: Limits = Limits()
) -> Target | None:
    """The homes to publish now that `done` is loaded; None where nothing changes, or it is too early.

    The first placement is published when it is complete. Later a home that is no longer wanted stays until its expert
    has enough live ones without it, and a dead one until it is replaced or nothing is left to load. Where memory is so
    full that nothing can be loaded, one expert gives up a second home for a round.
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
    """What live shards hold though neither the placement nor the target names the shard as its home; and what they have
    in device memory though they need only stand by for it, as it should become."""
    named = set(target.all_homes()) | (set(Target.of(published).all_homes()) if published else set())
    places = {home[:3] for home in named}
    unnamed = held_homes(holdings) - named
    garbage = {home for home in unnamed if home[:3] not in places}
    return garbage, {home._replace(tier=STANDBY) for home in unnamed - garbage if home.tier == DEVICE}


def _is_on_device(home: Home, held: Collection[Home]) -> bool:
    """Whether a shard that should stand by for an expert has it in device memory, which is as good."""
    return home.tier == STANDBY and home._replace(tier=DEVICE) in held


def _is_live(home: Home, held: Collection[Home]) -> bool:
    """Whether the shard has the expert in either tier."""
    return home in held or home._replace(tier=STANDBY if home.tier == DEVICE else DEVICE) in held


def by_shard(homes: Iterable[Home], tier: str) -> dict[str, dict[int, list[int]]]:
    """Experts by shard and layer, in order."""
    result: dict[str, dict[int, list[int]]] = {}
    for home in sorted(homes):
        if home.tier == tier:
            result.setdefault(home.shard_id, {}).setdefault(home.layer, []).append(home.expert)
    return result


def _differences(current: Target, target: Target) -> list[tuple[int, int]]:
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
    """Of one expert: what is loaded and verified joins, then what is not wanted leaves as far as enough stays."""
    wanted, now = target.tiers(*key), current.tiers(*key)
    least, needs_device = min(min_cover, len(wanted)), DEVICE in wanted.values()

    def is_enough(homes: Mapping[str, str]) -> bool:
        live = [tier for id, tier in homes.items() if _is_live(Home(*key, id, tier), held)]
        return len(live) >= least and (DEVICE in live or not needs_device)

    for id, tier in wanted.items():
        home = Home(*key, id, tier)
        if now.get(id) != tier and (home in verified or (id in now and _is_on_device(home, held))):
            after = {**now, id: tier}
            if now.get(id) != DEVICE or is_enough(after):
                now = after
    for id in [id for id in now if id not in wanted]:
        after = {other: tier for other, tier in now.items() if other != id}
        if is_enough(after) or (is_complete and id not in alive):
            now = after
    order = [*wanted, *now]
    return {id: now[id] for id in sorted(now, key=order.index)}


def _free_a_slot(
    target: Target, after: Mapping[tuple[int, int], dict[str, str]], held: Collection[Home]
) -> dict[tuple[int, int], dict[str, str]]:
    """One live home that is not wanted leaves a shard which something else waits for, if the expert has another."""
    waiting = {home.shard_id for home in set(target.all_homes()) - set(held) if home.tier == DEVICE}
    for key, homes in sorted(after.items()):
        live = [id for id, tier in homes.items() if _is_live(Home(*key, id, tier), held)]
        for id in live:
            is_leaving = id not in target.tiers(*key) and id in waiting and homes[id] == DEVICE
            if is_leaving and len(live) > 1:
                return {key: {other: tier for other, tier in homes.items() if other != id}}
    return {}


def _replace_homes(current: Target, changed: Mapping[tuple[int, int], Mapping[str, str]]) -> Target:
    tiers = {}
    for tier, homes_of in ((DEVICE, current.homes), (STANDBY, current.standby)):
        rows = {layer: list(homes) for layer, homes in homes_of.items()}
        for (layer, expert), homes in changed.items():
            row = rows.setdefault(layer, [()] * len(current.homes[layer]))
            row[expert] = tuple(id for id, of in homes.items() if of == tier)
        tiers[tier] = {layer: tuple(row) for layer, row in rows.items() if tier == DEVICE or any(row)}
    return Target(tiers[DEVICE], tiers[STANDBY])
