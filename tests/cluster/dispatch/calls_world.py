"""A `World` lets tests drive the state machine of a call, and counts how often each pick is summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.dispatch.call_policy import CallPolicy
from cluster.dispatch.fleet_view import FleetView, ShardFleet
from cluster.dispatch.layer_call import LayerCall
from cluster.dispatch.shard_health import LinkState, ReplyTiming, ShardHealth
from cluster.dispatch.shard_request import RefusalCode, ShardRequest
from cluster.topology import Homes, Placement

TOP_K, NUM_EXPERTS = 3, 12
QUICK = ReplyTiming(0, 100, 0)
POLICY = CallPolicy(timeout_s=10.0, heal_timeout_s=5.0)


@dataclass
class World:
    """A `World` is a fleet with a clock that only the test moves; `counts` says how often each pick was summed."""

    homes: Homes
    policy: CallPolicy = POLICY
    standby: Homes | None = None
    now: float = 100.0
    epoch: int = 1
    expert_mib: float = 0.01  # with this size, a second message costs more than three experts
    counts: Counter[int] = field(default_factory=Counter)
    requests: dict[int, ShardRequest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fleet = ShardFleet(self.policy, {0: self.expert_mib})
        self.healths: dict[str, ShardHealth] = {}
        self.place(self.homes, self.standby)

    def place(self, homes: Homes, standby: Homes | None = None) -> None:
        placement = Placement(self.epoch, {0: homes}, {0: 0}, standby={0: standby} if standby else {})
        for id in placement.shard_ids:
            self.healths.setdefault(id, ShardHealth(id, self.policy, link=LinkState.UP))
        self.fleet.adopt(FleetView(placement, self.healths, previous=self.fleet.view), self.now)
        self.epoch += 1

    def link(self, shard_id: str, link: LinkState) -> None:
        self.healths[shard_id].link = link
        self.fleet.is_changed = True

    def start(self, experts: Sequence[int], max_rows: int = 100) -> tuple[LayerCall, list[ShardRequest]]:
        call = LayerCall(self.fleet, 0, np.array(experts, dtype=np.int64), TOP_K, max_rows, self.now)
        return call, self.sent(call.start(self.now))

    def sent(self, requests: list[ShardRequest]) -> list[ShardRequest]:
        self.requests |= {request.id: request for request in requests}
        return requests

    def answer(self, call: LayerCall, request: ShardRequest, timing: ReplyTiming = QUICK) -> list[int]:
        counting = call.on_reply(request.id, timing, self.now)
        for id in counting:
            self.counts.update(self.requests[id].picks.tolist())
        return counting

    def tick(self, call: LayerCall, seconds: float) -> list[ShardRequest]:
        self.now += seconds
        return self.sent(call.on_tick(self.now))

    def refuse(self, call: LayerCall, request: ShardRequest, code: RefusalCode) -> list[ShardRequest]:
        return self.sent(call.on_refusal(request.id, code, "No.", self.now))

    def lose(self, call: LayerCall, request: ShardRequest) -> list[ShardRequest]:
        return self.sent(call.on_lost(request.id, self.now))

    def corrupt(self, call: LayerCall, request: ShardRequest) -> list[ShardRequest]:
        return self.sent(call.on_corrupt(request.id, "It was changed.", self.now))

    def is_exact(self, call: LayerCall) -> bool:
        return call.failure is None and self.counts == Counter(range(len(call.expert_P)))


def on(*shard_ids: str) -> Homes:
    """Return the homes of a layer in which every expert has the homes `shard_ids`."""
    return (shard_ids,) * NUM_EXPERTS


def shards_of(requests: Sequence[ShardRequest]) -> list[str]:
    return sorted(request.shard_id for request in requests)


def hit_late(world: World, call: LayerCall, request: ShardRequest) -> list[ShardRequest]:
    """Move the clock to the time at which `request` is late, and return the requests that the call then sends."""
    return world.tick(call, request.late_after_s + 1e-6)
