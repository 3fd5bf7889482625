"""What the fleet looks like: the shards that are alive and the placement of experts on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

Homes = tuple[tuple[str, ...], ...]  # homes[expert] = ids of the shards that hold it, the preferred one first


@dataclass(frozen=True)
class LayerSpec:
    """One layer of experts as the planner sees it; `expert_bytes` is what one expert takes on a shard."""

    layer: int
    num_experts: int
    expert_bytes: int
    top_k: int

    def __post_init__(self) -> None:
        assert self.layer >= 0
        assert self.expert_bytes > 0
        assert 0 < self.top_k <= self.num_experts


@dataclass(frozen=True)
class Shard:
    """What a shard says of itself in every heartbeat.

    `incarnation` is new at each start of the process, `memory_budget` is in bytes, `held_digest` is `held_digest()` of
    the experts it holds, `queue_depth` counts the calls that wait for its device. `endpoint` serves every rpc;
    `compute_endpoint` serves only `Compute`, at less cost.
    """

    id: str
    endpoint: str
    node: str
    pool: str
    device: str
    incarnation: str
    memory_budget: int
    held_digest: str = ""
    num_held: int = 0
    queue_depth: int = 0
    draining: bool = False
    compute_endpoint: str = ""

    def to_record(self) -> dict[str, str]:
        """The fields as strings, for a Redis hash."""
        return {name: str(int(value) if isinstance(value, bool) else value) for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> Self:
        """Reads what `to_record` wrote; a missing or unreadable field is a ValueError that names it."""
        numbers = {name: _number(record, name) for name in ("memory_budget", "num_held", "queue_depth", "draining")}
        names = ("id", "endpoint", "node", "pool", "device", "incarnation", "held_digest", "compute_endpoint")
        texts = {name: _field(record, name) for name in names}
        values: dict[str, Any] = {**texts, **numbers, "draining": numbers["draining"] == 1}
        return cls(**values)


def _field(record: Mapping[str, str], name: str) -> str:
    if name not in record:
        raise ValueError(
            f"The shard record {record.get('id', '?')!r} has no field {name!r}, which every heartbeat writes."
        )
    return record[name]


def _number(record: Mapping[str, str], name: str) -> int:
    value = _field(record, name)
    if not value.isdecimal():
        raise ValueError(f"The field {name!r} of a shard record is {value!r}, but it must be a whole number from 0 up.")
    return int(value)


@dataclass(frozen=True)
class Placement:
    """Which shards hold which expert, from one epoch on.

    `homes[layer][expert]` are shard ids; `gains[layer]` is the layer's largest gain exponent, which the backbone needs
    for sums that do not depend on the placement. `model` is the digest of the checkpoint that it was made for.
    """

    epoch: int
    homes: Mapping[int, Homes]
    gains: Mapping[int, int]
    model: str = ""

    def __post_init__(self) -> None:
        assert self.epoch >= 0
        for homes in self.homes.values():
            assert all(len(set(ids)) == len(ids) for ids in homes), "an expert has the same home twice"

    @property
    def shard_ids(self) -> tuple[str, ...]:
        """Every shard that is a home of something, sorted."""
        return tuple(sorted({id for homes in self.homes.values() for ids in homes for id in ids}))

    def experts_of(self, shard_id: str) -> dict[int, list[int]]:
        """The experts that one shard should hold, by layer; layers of which it holds none are left out."""
        held = {layer: [e for e, ids in enumerate(homes) if shard_id in ids] for layer, homes in self.homes.items()}
        return {layer: experts for layer, experts in held.items() if experts}

    def cover(self, live: Collection[str] | None = None) -> int:
        """The number of homes of the expert that has fewest; only those in `live` count where it is given."""
        counts = (len(ids if live is None else set(ids) & set(live)) for homes in self.homes.values() for ids in homes)
        return min(counts, default=0)

    def to_json(self) -> str:
        ids = self.shard_ids
        index = {id: i for i, id in enumerate(ids)}
        homes = {layer: [[index[id] for id in of_one] for of_one in homes] for layer, homes in self.homes.items()}
        body = {"epoch": self.epoch, "shards": ids, "homes": homes, "gains": dict(self.gains), "model": self.model}
        return json.dumps(body, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; anything else is a ValueError."""
        try:
            body = json.loads(text)
            ids = [str(id) for id in body["shards"]]
            homes = {int(la): tuple(tuple(ids[i] for i in one) for one in rows) for la, rows in body["homes"].items()}
            gains = {int(layer): int(gain) for layer, gain in body["gains"].items()}
            return cls(int(body["epoch"]), homes, gains, str(body["model"]))
        except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
            keys = "epoch, shards, homes, gains and model"
            raise ValueError(f"The stored placement is not a JSON object with the keys {keys} ({error!r}).") from error


def held_digest(held: Mapping[int, Iterable[int]]) -> str:
    """A short name for a set of experts: equal for equal sets, whatever the order they were loaded in."""
    experts = sorted((layer, sorted(experts)) for layer, experts in held.items())
    body = json.dumps([entry for entry in experts if entry[1]], separators=(",", ":"))
    return hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
