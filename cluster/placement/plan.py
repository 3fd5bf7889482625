"""What a plan is: the homes that experts should have, the moves that lead there, and what they cost and gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.topology import Homes

MIB = 2**20
NUMBERS = (
    *("num_bytes", "predicted_s_before", "predicted_s_after", "gain_s", "cost_s"),
    *("cover_before", "cover_after", "is_worth_it"),
)  # of a plan, as JSON tells them
Tier = Literal["device", "standby"]


@dataclass(frozen=True)
class PlanPolicy:
    """What a planner weighs: how much is computed per step, what moving costs, and how much better is worth it."""

    rows_per_step: float = 32.0
    risk: float = 1.0  # standard deviations above the mean that an expert's load is planned for
    share_of_time: float = 0.5  # of serving time that is spent waiting for experts
    stay_s: float = 600.0  # how long a load is expected to stay as it is
    bytes_per_s: float = 1e9  # of one move; moves are counted as if the fleet stood still meanwhile
    good_enough: float = 0.97  # a layer whose ideal is this part of its slowest shard's time stays as it is
    aim: float = 0.985  # the same ratio, at which work on a layer ends
    min_gain: float = 0.005  # of the time per step; less is within the error of the load
    cold_below: float = 0.0  # picks per second; experts with less may have only standby homes
    wake_us_per_mib: float = 100.0  # to bring an expert that stands by to the device
    headroom: int | None = None  # bytes left free on every shard; None: one expert, if all experts fit even so
    max_homes: int = 64
    is_device_cover: bool = True  # second homes are in device memory where there is room

    def __post_init__(self) -> None:
        assert self.rows_per_step > 0
        assert self.bytes_per_s > 0
        assert 0 < self.good_enough <= self.aim <= 1
        assert 0 < self.share_of_time <= 1
        assert min(self.risk, self.stay_s, self.min_gain, self.cold_below, self.wake_us_per_mib) >= 0
        assert self.headroom is None or self.headroom >= 0
        assert self.max_homes >= 1


@dataclass(frozen=True)
class Move:
    """An expert's weights come to a shard or leave it; `bytes` is what has to come from elsewhere."""

    layer: int
    expert: int
    shard_id: str
    kind: Literal["add", "drop"]
    tier: Tier
    bytes: int
    reason: str

    def __str__(self) -> str:
        where = "to" if self.kind == "add" else "from"
        return f"{self.kind} {self.layer}/{self.expert} {where} {self.shard_id} ({self.tier}): {self.reason}"


@dataclass(frozen=True)
class Plan:
    """Where experts should be, and how to get there: `moves` in order, those that add before those that drop.

    `homes` and `standby` are as in a Placement. Predicted times are seconds per step, summed over layers. `gain_s` is
    seconds saved per second of serving, `cost_s` the seconds that the moves take. Covers are the number of live homes
    of the expert with fewest. A blast radius is the share of routed picks that would have no live home if that shard
    died. `is_worth_it` is false where moves were refused, which are then not in `moves`; `reasons` say why.
    """

    homes: Mapping[int, Homes]
    standby: Mapping[int, Homes]
    moves: tuple[Move, ...]
    num_bytes: int
    predicted_s_before: float
    predicted_s_after: float
    gain_s: float
    cost_s: float
    cover_before: int
    cover_after: int
    blast_radius_before: Mapping[str, float]
    blast_radius_after: Mapping[str, float]
    reasons: tuple[str, ...]
    is_worth_it: bool

    def describe(self, max_moves: int = 20) -> str:
        """The plan for an operator, a few moves of it spelled out."""
        num_adds = sum(move.kind == "add" for move in self.moves)
        worst = [max(radius.values(), default=0.0) for radius in (self.blast_radius_before, self.blast_radius_after)]
        lines = [
            f"{num_adds} homes to add, {len(self.moves) - num_adds} to drop, {self.num_bytes / MIB:,.1f} MiB to move.",
            f"Predicted time per step: {1e3 * self.predicted_s_before:.3f} ms now, "
            f"{1e3 * self.predicted_s_after:.3f} ms then; it saves {self.gain_s:.4f} s per second "
            f"and takes {self.cost_s:.2f} s.",
            f"Cover (fewest live homes of an expert): {self.cover_before} now, {self.cover_after} then.",
            f"Largest blast radius: {worst[0]:.2%} of picks now, {worst[1]:.2%} then.",
            *self.reasons,
            *(f"  {move}" for move in self.moves[:max_moves]),
        ]
        if len(self.moves) > max_moves:
            lines.append(f"  and {len(self.moves) - max_moves} more")
        return "\n".join(lines)

    def to_dict(self, max_moves: int = 200) -> dict[str, Any]:
        """The plan's numbers, its words and some of its moves, for JSON."""
        return {
            **{name: getattr(self, name) for name in NUMBERS},
            "blast_radius_before": dict(self.blast_radius_before),
            "blast_radius_after": dict(self.blast_radius_after),
            "reasons": list(self.reasons),
            "num_moves": len(self.moves),
            "moves": [asdict(move) for move in self.moves[:max_moves]],
            "text": self.describe(),
        }
