"""A plan lists the homes that experts should have, the moves that lead there, and the cost and gain of the moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.topology import Homes

MIB = 2**20
JSON_FIELDS = (
    *("num_bytes", "predicted_s_before", "predicted_s_after", "gain_s", "cost_s"),
    *("cover_before", "cover_after", "is_worth_it"),
)  # The fields that `Plan.to_dict` copies unchanged.
Tier = Literal["device", "standby"]


@dataclass(frozen=True)
class PlanPolicy:
    """A `PlanPolicy` tells the planner how large a step is, what a move costs, and which gain is worth a move."""

    rows_per_step: float = 32.0  # Number of rows of one step; every layer computes all of these rows.
    # The planner assumes that an expert's load is this many standard deviations above the mean load of the expert.
    risk: float = 1.0
    share_of_time: float = 0.5  # Share of the serving time that backbones spend waiting for experts.
    stay_s: float = 600.0  # Seconds for which the load is expected to stay as it is.
    bytes_per_s: float = 1e9  # Bytes that a move loads per second. The move's duration counts as time without serving.
    # Balance of a layer: the ideal level divided by the slowest shard's time. From `good_enough` on, the planner leaves
    # the layer as it is. Below `good_enough`, the planner improves the layer until the balance is `aim`.
    good_enough: float = 0.97
    aim: float = 0.985
    # Minimum gain of moves, as a share of the step time. A smaller gain may be due to errors in the measured load.
    min_gain: float = 0.005
    cold_below: float = 0.0  # Picks per second below which an expert may have only standbys.
    promotion_us_per_mib: float = 100.0  # Time of a promotion at a standby, in µs per MiB.
    # Bytes that stay free on every shard. None means the bytes of the largest expert. If not all experts fit with this
    # headroom, None means 0.
    headroom: int | None = None
    max_homes: int = 64  # Maximum number of homes of one expert.
    is_device_cover: bool = True  # True if second homes use free device memory before host memory.
    # True if the experts of a group should be on few shards, for models whose router picks a token's experts from a few
    # groups (`cluster.placement.expert_groups`). In a first placement, the slowest shard of a layer may need as long as
    # without groups, divided by `good_enough`. Later, moves for the sake of groups make no shard slower than the
    # slowest shard was, or than the ideal level divided by `good_enough`.
    keep_groups: bool = False
    # Share of the time that backbones wait for experts that is proportional to the number of shards to which a token
    # goes. This share is an assumption; it is less on a fast network and more on a slow network.
    share_of_wire: float = 0.25
    group_stay_s: float = 86400.0  # Seconds for which groups that are together count as saving time.
    max_regrouped: float = 0.05  # Share of a running layer's experts that one plan may move to keep groups together.

    def __post_init__(self) -> None:
        assert self.rows_per_step > 0
        assert self.bytes_per_s > 0
        assert 0 < self.good_enough <= self.aim <= 1
        assert 0 < self.share_of_time <= 1
        assert min(self.risk, self.stay_s, self.min_gain, self.cold_below, self.promotion_us_per_mib) >= 0
        assert self.headroom is None or self.headroom >= 0
        assert self.max_homes >= 1
        assert min(self.share_of_wire, self.group_stay_s, self.max_regrouped) >= 0


@dataclass(frozen=True)
class Move:
    """A `Move` adds an expert to a shard or drops it there; `bytes` is the number of bytes that the shard must load."""

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
    """A `Plan` says which homes and standbys experts should have, and which moves lead to them.

    - `homes` and `standby` are as in a `Placement`.
    - `moves` are in order: all moves that add come before all moves that drop.
    - `predicted_s_before` and `predicted_s_after` are seconds per step, summed over layers.
    - `gain_s` is how many seconds are saved per second of serving. `cost_s` is how many seconds the moves take.
    - `cover_before` and `cover_after` are the lowest cover of any expert.
    - `blast_radius_before` and `blast_radius_after` are shares of all picks, by shard id.
    - `is_worth_it` is False if moves were refused. Refused moves are not in `moves`; `reasons` say why.
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
        """Return the plan as text for an operator, with the first `max_moves` moves spelled out."""
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
        """Return the plan for JSON: its numbers, reasons and text, and its first `max_moves` moves."""
        return {
            **{name: getattr(self, name) for name in JSON_FIELDS},
            "blast_radius_before": dict(self.blast_radius_before),
            "blast_radius_after": dict(self.blast_radius_after),
            "reasons": list(self.reasons),
            "num_moves": len(self.moves),
            "moves": [asdict(move) for move in self.moves[:max_moves]],
            "text": self.describe(),
        }
