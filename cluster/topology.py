"""The topology describes the fleet: its layers of experts, its shards, and the placement of experts on shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from model.configs.expert_memory import ExpertMemory
from model.configs.expert_shape import ExpertShape

# homes[expert] = ids of the shards that are the expert's homes, the preferred home first.
Homes = tuple[tuple[str, ...], ...]
Experts = Mapping[int, Sequence[int]]  # Expert ids by layer.


@dataclass(frozen=True)
class LayerSpec:
    """A `LayerSpec` describes one layer of experts to the planner.

    - `expert_bytes` is the size of one expert as it is stored and sent between shards.
    - `device_bytes` and `host_bytes` are the memory that one expert takes on a shard with the device of the key: as a
      home, and as a standby in host memory. On other devices, an expert takes `expert_bytes`.
    - `num_groups` and `top_groups` are as in an `ExpertShape`.
    """

    layer: int
    num_experts: int
    expert_bytes: int
    top_k: int
    device_bytes: Mapping[str, int] = field(default_factory=dict, hash=False)
    host_bytes: Mapping[str, int] = field(default_factory=dict, hash=False)
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        assert self.layer >= 0
        assert min((self.expert_bytes, *self.device_bytes.values(), *self.host_bytes.values())) > 0
        assert 0 < self.top_k <= self.num_experts
        assert self.num_experts % self.num_groups == 0
        assert 1 <= self.top_groups <= self.num_groups

    @classmethod
    def of(cls, shape: ExpertShape, expert_bytes: int, memory: Mapping[str, ExpertMemory]) -> Self:
        """Return the spec of the layer of `shape`, whose experts take `memory` on the devices that are its keys."""
        device_bytes = {device: one.device for device, one in memory.items()}
        host_bytes = {device: one.host for device, one in memory.items()}
        groups = {"num_groups": shape.num_groups, "top_groups": shape.top_groups}
        return cls(shape.layer, shape.num_experts, expert_bytes, shape.top_k, device_bytes, host_bytes, **groups)

    @property
    def group_size(self) -> int:
        """Return the number of experts in each group of the router."""
        return self.num_experts // self.num_groups

    def on_device(self, device: str) -> int:
        """Return the bytes of device memory that one expert takes on a shard with `device`, for example "cuda"."""
        return self.device_bytes.get(device.partition(":")[0], self.expert_bytes)

    def in_host_memory(self, device: str) -> int:
        """Return the bytes of host memory that one expert takes as a standby on a shard with `device`."""
        return self.host_bytes.get(device.partition(":")[0], self.expert_bytes)


@dataclass(frozen=True)
class CostModel:
    """A `CostModel` predicts the time that a shard needs for a call.

    The time in µs is: call + MiB of one expert · (weight · experts touched + row · rows). The formula needs an expert's
    size, but not its shape, because reading weights and multiplying by weights take time in proportion to the size.
    """

    call_us: float = 50.0
    weight_us_per_mib: float = 100.0
    row_us_per_mib: float = 10.0

    def __post_init__(self) -> None:
        assert min(self.call_us, self.weight_us_per_mib, self.row_us_per_mib) >= 0


@dataclass(frozen=True)
class Shard:
    """A `Shard` is the record that an expert shard writes about itself in every heartbeat.

    - `endpoint` serves every rpc. `compute_endpoint` serves only `Compute`, at less cost.
    - `incarnation` is new at each start of the process.
    - `memory_budget` and `host_budget` are the bytes for experts in device memory and for standbys in host memory.
    - `held_digest` is the result of `held_digest()` for the experts that the shard holds.
    - `queue_depth` counts the calls that wait for the shard's device.
    - `cost_model` is fitted to the shard's own calls.
    - `rows_per_call` is the mean number of rows of the shard's last calls.
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
        """Return the fields as strings, for a Redis hash."""
        values = asdict(self)
        values |= values.pop("cost_model")
        return {name: str(int(value) if isinstance(value, bool) else value) for name, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary for the admin API, in which the cost model has the key `pace`."""
        values = asdict(self)
        values["pace"] = values.pop("cost_model")
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Create a shard from the dictionary that `to_json` returned."""
        named = dict(values)
        cost_model = CostModel(**named.pop("pace"))
        return cls(**named, cost_model=cost_model)

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> Self:
        """Create a shard from the record that `to_record` returned.

        Raises ValueError with the field's name if a field is missing or has a wrong value.
        """
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
    """A `Placement` says which shards hold which expert, from one epoch on.

    - `homes[layer][expert]`: the ids of the shards that hold the expert in device memory, the preferred shard first.
    - `standby[layer][expert]`: the ids of the shards that hold the expert in host memory or on disk. Standbys promote
      the expert when a call needs it; backbones call standbys only when no home answers.
    - `gains[layer]`: the largest gain exponent of the layer's experts, which backbones need to compute sums that do not
      depend on the placement.
    - `model`: the digest of the checkpoint for which the placement was made.
    """

    epoch: int
    homes: Mapping[int, Homes]
    gains: Mapping[int, int]
    model: str = ""
    standby: Mapping[int, Homes] = field(default_factory=dict)  # Layers without standbys may be missing.

    def __post_init__(self) -> None:
        assert self.epoch >= 0
        assert self.standby.keys() <= self.homes.keys()
        for layer in self.homes:
            assert all(len(set(ids)) == len(ids) for ids in self.all_homes(layer)), "an expert has the same home twice"

    def all_homes(self, layer: int) -> Homes:
        """Return, for one layer, the ids of each expert's homes followed by the ids of the expert's standbys."""
        homes, standby = self.homes[layer], self.standby.get(layer)
        return homes if standby is None else tuple(first + then for first, then in zip(homes, standby, strict=True))

    @property
    def shard_ids(self) -> tuple[str, ...]:
        """Return the ids of all shards that are a home or a standby of any expert, sorted."""
        all_layers = (*self.homes.values(), *self.standby.values())
        return tuple(sorted({id for homes in all_layers for ids in homes for id in ids}))

    def experts_of(self, shard_id: str) -> dict[int, list[int]]:
        """Return, by layer, the ids of the experts of which a shard is a home; layers without any home are missing."""
        return _experts_of(self.homes, shard_id)

    def standby_of(self, shard_id: str) -> dict[int, list[int]]:
        """Return, by layer, the ids of the experts of which a shard is a standby; layers without any are missing."""
        return _experts_of(self.standby, shard_id)

    def digest_of(self, shard_id: str) -> str:
        """Return the `held_digest` that a shard reports when the shard holds exactly its experts of this placement."""
        return held_digest(self.experts_of(shard_id), self.standby_of(shard_id))

    def cover(self, live: Collection[str] | None = None) -> int:
        """Return the placement's cover: the smallest number of live homes and standbys that any expert has.

        `live` holds the ids of the live shards. If `live` is None, all shards count as live.
        """
        all_ids = (ids for layer in self.homes for ids in self.all_homes(layer))
        return min((len(ids if live is None else set(ids) & set(live)) for ids in all_ids), default=0)

    def to_json(self) -> str:
        """Return the placement as JSON text, in which the list `shards` names each shard once.

        `homes` and `standby` refer to a shard by its index in `shards`.
        """
        index = {id: i for i, id in enumerate(self.shard_ids)}
        homes, standby = (
            {layer: [[index[id] for id in ids] for ids in homes] for layer, homes in by_layer.items()}
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
        """Create a placement from the text that `to_json` returned; any other text raises ValueError."""
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
    """Return a short digest of the experts of which a shard is a home (`held`) or a standby (`standby`), by layer.

    The digest does not depend on the order of the layers or of the experts.
    """
    tiers = [
        sorted((layer, sorted(experts)) for layer, experts in by_layer.items() if experts)
        for by_layer in (held, standby or {})
    ]
    return hashlib.blake2b(json.dumps(tiers, separators=(",", ":")).encode(), digest_size=8).hexdigest()
