"""What the fleet looks like: the shards that are alive and the placement of experts on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

Homes = tuple[tuple[str, ...], ...]  # homes[expert] = ids of the shards that hold it, the preferred one first
Experts = Mapping[int, Sequence[int]]  # expert ids by layer


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
class CostModel:
    """How long a shard takes for a call, in µs: call + MiB of one expert · (weight · experts touched + row · rows).

    The experts' size stands in for the shape: both reading weights and multiplying by them grow with it.
    """

    call_us: float = 50.0
    weight_us_per_mib: float = 100.0
    row_us_per_mib: float = 10.0

    def __post_init__(self) -> None:
        assert min(self.call_us, self.weight_us_per_mib, self.row_us_per_mib) >= 0


@dataclass(frozen=True)
class Shard:
    """What a shard says of itself in every heartbeat.

    `incarnation` is new at each start of the process. `memory_budget` is in bytes of the device's memory, `host_budget`
    in bytes of host memory for experts that stand by. `held_digest` is `held_digest()` of what it holds, `queue_depth`
    counts the calls that wait for its device, `cost_model` is fitted to its own calls. `endpoint` serves every rpc;
    `compute_endpoint` serves only `Compute`, at less cost. `rows_per_call` is the mean of its last calls.
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
    host_budget: int = 0
    cost_model: CostModel = CostModel()
    rows_per_call: float = 0.0

    def to_record(self) -> dict[str, str]:
        """The fields as strings, for a Redis hash."""
        values = asdict(self)
        values |= values.pop("cost_model")
        return {name: str(int(value) if isinstance(value, bool) else value) for name, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the admin API, which calls the cost model `pace`."""
        values = asdict(self)
        values["pace"] = values.pop("cost_model")
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        named = dict(values)
        cost_model = CostModel(**named.pop("pace"))
        return cls(**named, cost_model=cost_model)

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> Self:
        """Reads what `to_record` wrote; a missing or unreadable field is a ValueError that names it."""
        counts = ("memory_budget", "num_held", "queue_depth", "draining", "host_budget")
        names = ("id", "endpoint", "node", "pool", "device", "incarnation", "held_digest", "compute_endpoint")
        numbers = {name: _number(record, name) for name in counts}
        texts = {name: _field(record, name) for name in names}
        cost = CostModel(**{one.name: _real_number(record, one.name) for one in fields(CostModel)})
        rows = _real_number(record, "rows_per_call")
        values: dict[str, Any] = {**texts, **numbers, "draining": numbers["draining"] == 1, "cost_model": cost}
        return cls(**values, rows_per_call=rows)


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


def _real_number(record: Mapping[str, str], name: str) -> float:
    value = _field(record, name)
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"The field {name!r} of a shard record is {value!r}, but it must be a number from 0 up.")
    return number


@dataclass(frozen=True)
class Placement:
    """Which shards hold which expert, from one epoch on.

    `homes[layer][expert]` are the ids of shards that hold it in device memory. `standby[layer][expert]` are those that
    keep it in host memory or on disk, and bring it to the device when asked: nobody asks them as long as a home
    answers. `gains[layer]` is the layer's largest gain exponent, which the backbone needs for sums that do not depend
    on the placement. `model` is the digest of the checkpoint that it was made for.
    """

    epoch: int
    homes: Mapping[int, Homes]
    gains: Mapping[int, int]
    model: str = ""
    standby: Mapping[int, Homes] = field(default_factory=dict)  # a layer that is not there has none

    def __post_init__(self) -> None:
        assert self.epoch >= 0
        assert self.standby.keys() <= self.homes.keys()
        for layer in self.homes:
            assert all(len(set(ids)) == len(ids) for ids in self.all_homes(layer)), "an expert has the same home twice"

    def all_homes(self, layer: int) -> Homes:
        """Of each expert the homes, then those that stand by."""
        homes, standby = self.homes[layer], self.standby.get(layer)
        return homes if standby is None else tuple(of + more for of, more in zip(homes, standby, strict=True))

    @property
    def shard_ids(self) -> tuple[str, ...]:
        """Every shard that is a home of something or stands by for it, sorted."""
        both = (*self.homes.values(), *self.standby.values())
        return tuple(sorted({id for homes in both for ids in homes for id in ids}))

    def experts_of(self, shard_id: str) -> dict[int, list[int]]:
        """The experts that one shard should hold, by layer; layers of which it holds none are left out."""
        return _experts_of(self.homes, shard_id)

    def standby_of(self, shard_id: str) -> dict[int, list[int]]:
        """The experts that one shard should stand by for, likewise."""
        return _experts_of(self.standby, shard_id)

    def digest_of(self, shard_id: str) -> str:
        """The `held_digest` of a shard that holds what it should."""
        return held_digest(self.experts_of(shard_id), self.standby_of(shard_id))

    def cover(self, live: Collection[str] | None = None) -> int:
        """The number of homes, standing by or not, of the expert that has fewest; only those in `live` if given."""
        all_ids = (ids for layer in self.homes for ids in self.all_homes(layer))
        return min((len(ids if live is None else set(ids) & set(live)) for ids in all_ids), default=0)

    def to_json(self) -> str:
        index = {id: i for i, id in enumerate(self.shard_ids)}
        homes, standby = (
            {layer: [[index[id] for id in of_one] for of_one in homes] for layer, homes in by_layer.items()}
            for by_layer in (self.homes, self.standby)
        )
        body = {
            "epoch": self.epoch,
            "shards": self.shard_ids,
            "homes": homes,
            "standby": standby,
            "gains": dict(self.gains),
            "model": self.model,
        }
        return json.dumps(body, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; anything else is a ValueError."""
        try:
            body = json.loads(text)
            ids = [str(id) for id in body["shards"]]
            homes, standby = (
                {int(la): tuple(tuple(ids[i] for i in one) for one in rows) for la, rows in body[name].items()}
                for name in ("homes", "standby")
            )
            gains = {int(layer): int(gain) for layer, gain in body["gains"].items()}
            return cls(int(body["epoch"]), homes, gains, str(body["model"]), standby)
        except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
            keys = "epoch, shards, homes, standby, gains and model"
            raise ValueError(f"The stored placement is not a JSON object with the keys {keys} ({error!r}).") from error


def _experts_of(homes_of: Mapping[int, Homes], shard_id: str) -> dict[int, list[int]]:
    held = {layer: [e for e, ids in enumerate(homes) if shard_id in ids] for layer, homes in homes_of.items()}
    return {layer: experts for layer, experts in held.items() if experts}


def held_digest(held: Mapping[int, Iterable[int]], standby: Mapping[int, Iterable[int]] | None = None) -> str:
    """A short name for what a shard holds and stands by for: equal for equal sets, whatever the order."""
    both = [
        sorted((layer, sorted(experts)) for layer, experts in by_layer.items() if experts)
        for by_layer in (held, standby or {})
    ]
    return hashlib.blake2b(json.dumps(both, separators=(",", ":")).encode(), digest_size=8).hexdigest()
