"""A client sees the shards as a `ShardFleet`: the placement, the health of each shard and the requests in flight.

The module uses no sockets, threads or clock, so that the real client and the simulation can drive the same code. The
calling thread is the thread that makes the layer calls. Only this thread may use a fleet and the fleet's `ShardHealth`
objects, with one exception: any thread may set the `link` of a `ShardHealth` and then `is_changed` of the fleet.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from cluster.dispatch.call_policy import CallPolicy, Traffic
from cluster.dispatch.routing import Grouped, HomeTable, route
from cluster.dispatch.shard_health import Circuit, HedgeBudget, LinkState, ReplyTiming, ShardHealth, Work
from cluster.dispatch.shard_request import NEVER, ShardRequest
from cluster.topology import CostModel, Placement

MESSAGE_US = 200.0  # µs that one more message costs the caller
LEARN_EVERY_S = 0.005  # seconds between two updates of one shard's predictions, because an update takes time
SURPRISING = 4.0  # a reply that takes more than this many times the predicted time updates the predictions at once
EXPERT, ROW, MESSAGE, FREE = range(4)  # indices of the rows of `costs_CS`

Tables = Mapping[int, HomeTable]
Ids = NDArray[np.int64]


class FleetView:
    """A `FleetView` combines a placement with the health and the cost model of each shard; a change makes a new view.

    placement: the placement that calls follow.
    healths: the health of each registered shard, by shard id; shards outside the placement are ignored.
    cost_models: the cost model that each shard publishes, by shard id.
    draining: the ids of the shards that drain.
    previous: the view that this view replaces. The home tables of `previous` are used again for layers whose placement
        did not change.
    """

    def __init__(
        self,
        placement: Placement,
        healths: Mapping[str, ShardHealth],
        cost_models: Mapping[str, CostModel] | None = None,
        draining: Collection[str] = (),
        previous: FleetView | None = None,
    ) -> None:
        self.placement, self.cost_models, self.draining = placement, cost_models or {}, frozenset(draining)
        self.shard_ids = placement.shard_ids
        self.healths = {id: healths[id] for id in self.shard_ids if id in healths}
        self.tables = _tables(placement, self.shard_ids, previous)

    def is_like(self, other: FleetView) -> bool:
        """Return True if this view and `other` have the same homes, standbys, draining shards and `healths`.

        If this view then replaces `other`, waiting calls need not be routed again.
        """
        mine, theirs = ((v.placement.homes, v.placement.standby, v.draining, v.healths) for v in (self, other))
        return mine == theirs


def _tables(placement: Placement, shard_ids: tuple[str, ...], previous: FleetView | None) -> Tables:
    """Return the home table of every layer.

    The previous view's tables are used again where the placement did not change, because building a table is slow.
    """

    def table(layer: int) -> HomeTable:
        homes, standby = placement.homes[layer], placement.standby.get(layer)
        if previous is not None and previous.shard_ids == shard_ids and layer in previous.tables:
            was = previous.placement
            if was.homes[layer] == homes and was.standby.get(layer) == standby:
                return previous.tables[layer]
        return HomeTable(homes, standby, shard_ids)

    return {layer: table(layer) for layer in placement.homes}


class ShardFleet:
    """A `ShardFleet` holds what all calls of a client share: the view in use, the shards' costs, and the counters.

    policy: the limits of a call.
    expert_mib: the size of one expert in MiB, by layer. For a layer without an entry, an expert counts as 1 MiB.
    """

    def __init__(self, policy: CallPolicy, expert_mib: Mapping[int, float] | None = None) -> None:
        self.policy, self.expert_mib = policy, expert_mib or {}
        self.traffic = Traffic()
        self.budget = HedgeBudget(policy.hedge_share, policy.hedge_burst, policy.hedge_burst)
        self.in_flight: dict[int, ShardRequest] = {}  # requests that are neither answered nor lost, by id
        self.is_changed = False  # the link or the circuit of a shard has changed since the last `refresh`
        self.probe_at = NEVER  # the next time at which a probe is due, or a probe without a reply is given up
        # replies with sums that `learn` has not used yet: request, timing, arrival time
        self.to_learn: list[tuple[ShardRequest, ReplyTiming, float]] = []
        self.view: FleetView | None = None
        self._ids = itertools.count(1)
        self._probes: dict[int, ShardRequest] = {}
        self._resets: list[ShardHealth] = []

    def adopt(self, view: FleetView, now: float) -> None:
        """Use `view` for all requests that are sent from now on."""
        for health in self.view.healths.values() if self.view else ():
            health.shard_index = -1
        self.view = view
        num_shards = len(view.shard_ids)
        self.costs_CS = np.zeros((4, num_shards))  # the argument `costs_CS` of `routing.route`
        self._shards: list[ShardHealth | None] = [view.healths.get(id) for id in view.shard_ids]
        for shard_index, shard in enumerate(self._shards):
            if shard is not None:
                shard.shard_index, shard.is_draining = shard_index, shard.shard_id in view.draining
                shard.adopt(view.cost_models.get(shard.shard_id, shard.cost_model), now)
        shards = view.healths.values()
        self._usual_overhead_us = min((health.overhead_us for health in shards), default=0.0)
        for health in view.healths.values():
            self._note_costs(health)
        cost_models = [health.cost_model for health in shards] or [CostModel()]
        per_row = sum(cost_model.row_us_per_mib for cost_model in cost_models)
        per_expert = sum(cost_model.weight_us_per_mib for cost_model in cost_models)
        self._max_piece = max(1, int(per_expert / max(per_row, 1e-9)))
        self.is_changed = True

    def refresh(self) -> None:
        """If a link or a circuit has changed, determine again which shards may be asked and when a probe is due."""
        if self.is_changed:
            self.is_changed = False  # reset first, because another thread may set `is_changed` again meanwhile
            shards = self._shards
            self._avoided_S = np.array([h is None or h.should_be_avoided for h in shards], dtype=np.bool_)
            self._down_S = np.array([h is None or h.link is not LinkState.UP for h in shards], dtype=np.bool_)
            resting = [h.rests_until for h in shards if h is not None and h.circuit is Circuit.OPEN]
            waiting = [request.sent_at + self.policy.stall_s for request in self._probes.values()]
            self.probe_at = min((*resting, *waiting), default=NEVER)

    def _note_costs(self, health: ShardHealth) -> None:
        costs_CS, shard_index = self.costs_CS, health.shard_index
        if shard_index >= 0:
            costs_CS[EXPERT, shard_index] = health.slowness * health.cost_model.weight_us_per_mib
            costs_CS[ROW, shard_index] = health.slowness * health.cost_model.row_us_per_mib
            excess_us = max(0.0, health.overhead_us - 2 * self._usual_overhead_us)
            costs_CS[MESSAGE, shard_index] = MESSAGE_US + health.slowness * health.cost_model.call_us + excess_us
            costs_CS[FREE, shard_index] = health.free_at

    # Choosing homes

    def route(
        self,
        layer: int,
        picks: Ids,
        expert_P: Ids,
        sizes: tuple[int, int],
        asked_shards: Collection[str],
        now: float,
        may_promote: bool = True,
        may_ask_avoided: bool = False,
    ) -> Grouped:
        """Return which picks travel to which shards; raise NoLiveHome if an expert has no home that may be asked.

        In the result, each shard is an index into `view.shard_ids`.

        picks: the picks to send, ascending, as indices into `expert_P`.
        sizes: the pair (number of picks per row, maximum number of rows in a message).
        asked_shards: the ids of the shards that were asked before and must not be asked again.
        may_promote: whether a standby may be asked for an expert if none of the expert's homes may be asked.
        may_ask_avoided: whether connected shards that should be avoided may be asked, too.
        """
        assert self.view is not None
        self.refresh()
        is_excluded_S = self._down_S if may_ask_avoided else self._avoided_S
        if asked_shards:
            is_excluded_S = is_excluded_S | np.array([id in asked_shards for id in self.view.shard_ids], dtype=np.bool_)
        table, expert_mib = self.view.tables[layer], self.expert_mib.get(layer, 1.0)
        costs = (self.costs_CS, now, expert_mib, self._max_piece)
        return route(picks, expert_P, table, *costs, is_excluded_S, *sizes, may_promote)

    # Requests and their outcomes

    def make_requests(self, layer: int, expert_P: Ids, grouped: Grouped, now: float) -> list[ShardRequest]:
        """Return a request for each message of `grouped`, and note that the caller sends the requests now."""
        assert self.view is not None
        table, policy, expert_mib = self.view.tables[layer], self.policy, self.expert_mib.get(layer, 1.0)
        pick_Q, first_M, shard_M, num_rows_M, num_experts_M = grouped
        requests = []
        for m, shard_index in enumerate(shard_M):
            picks = pick_Q[first_M[m] : first_M[m + 1]]
            health, work = self._shards[shard_index], Work(num_experts_M[m], num_rows_M[m], expert_mib)
            assert health is not None
            is_promoting = table.has_standby and not (table.homes_EH[expert_P[picks]] == shard_index).any(1).all()
            predicted_s = health.note_sent(health.compute_us(work), now)
            late_s, stalled_s = health.late_after_s(predicted_s), policy.allowed_silence_s(predicted_s)
            if is_promoting:
                late_s, stalled_s = policy.promote_s + predicted_s, policy.promote_s + stalled_s
            request = ShardRequest(
                next(self._ids), health, picks, work, now, predicted_s, late_s, stalled_s, is_promoting
            )
            self.in_flight[request.id] = request
            self.costs_CS[FREE, shard_index] = health.free_at
            requests.append(request)
        return requests

    def note_reply(self, request_id: int, timing: ReplyTiming | None, now: float) -> ShardRequest | None:
        """Note that a request was answered, and return the request, or None if the request is not in flight.

        `timing` is the timing in a reply with sums, or None if the reply is a refusal.
        """
        request = self.in_flight.pop(request_id, None)
        if request is None:
            return None
        health, took_s = request.health, now - request.sent_at
        health.heard_at = now
        is_slow = timing is not None and not request.is_promoting and health.is_far_slower(took_s, request.predicted_s)
        if is_slow or request.is_beaten or health.num_failures:
            self._judge(request, is_slow, now)
        if timing is not None:
            if not timing.queue_depth:
                health.free_at = now
                if health.shard_index >= 0:
                    self.costs_CS[FREE, health.shard_index] = now
            if now >= health.learn_at and not request.is_promoting:
                health.learn_at = now + LEARN_EVERY_S
                self.to_learn.append((request, timing, now))
                if took_s > SURPRISING * request.predicted_s:
                    self.learn()
        return request

    def _judge(self, request: ShardRequest, is_slow: bool, now: float) -> None:
        if request.is_beaten:
            request.health.note_late_reply()
        elif is_slow:
            request.health.fail(now)
        else:
            request.health.succeed()
        self._probes.pop(request.id, None)
        self.is_changed = True

    def learn(self) -> None:
        """Update the predictions with the replies in `to_learn`.

        A client should call `learn` before the client waits for replies, so that the update delays no request.
        """
        for request, timing, at in self.to_learn:
            request.health.learn(request.work, timing, at - request.sent_at, request.predicted_s, at)
            self._note_costs(request.health)
        self.to_learn.clear()

    def note_failed(self, request_id: int, now: float) -> ShardRequest | None:
        """Note that a request failed, and return the request, or None if the request is not in flight.

        A request fails if its stream is lost, or if its reply is corrupt or reports an error.
        """
        request = self.in_flight.pop(request_id, None)
        if request is not None:
            self._probes.pop(request_id, None)
            self.note_fault(request.health, now)
        return request

    def note_fault(self, health: ShardHealth, now: float) -> None:
        """Open the circuit of a shard that failed a request or was late."""
        health.fail(now)
        self.is_changed = True

    # Shards whose circuit is open

    def due_probe(self, now: float) -> ShardHealth | None:
        """Return a shard that should be probed now, or None; give up probes that had no reply for `stall_s`.

        A shard should be probed when it is connected and its circuit has been open long enough. The streams of shards
        that did not answer their probe are marked for a reset.
        """
        for request in [request for request in self._probes.values() if now >= request.sent_at + self.policy.stall_s]:
            del self._probes[request.id]
            request.is_beaten = True
            request.health.fail(now)
            self._resets.append(request.health)
        self.is_changed = True
        self.refresh()
        is_due = (
            h
            for h in self._shards
            if h is not None and h.circuit is Circuit.OPEN and now >= h.rests_until and h.link is LinkState.UP
        )
        return next(is_due, None)

    def note_probe(self, request: ShardRequest) -> None:
        """Note that `request` is a probe; the circuit of the probed shard is half-open until the probe is answered."""
        request.health.circuit = Circuit.HALF_OPEN
        self._probes[request.id] = request
        self.is_changed = True

    def postpone_probe(self, health: ShardHealth, now: float) -> None:
        """Postpone the probe of a shard, because the call has no picks for the shard."""
        health.rests_until = now + self.policy.first_rest_s
        self.is_changed = True

    def request_reset(self, health: ShardHealth) -> None:
        """Ask the client to reset a shard's stream; the requests in flight on the stream are lost and sent again."""
        self._resets.append(health)

    @property
    def has_resets(self) -> bool:
        return bool(self._resets)

    def take_resets(self) -> list[ShardHealth]:
        """Return the shards whose streams the client must reset, and clear the list of these shards."""
        shards, self._resets = self._resets, []
        return shards

    def circuits(self, now: float) -> dict[str, Circuit]:
        """Return the circuit of each shard, by shard id.

        A circuit that has been open long enough for a probe is already reported as half-open. Only calls send probes.
        Without calls, such a circuit would otherwise be reported as open for ever.
        """
        shards: Iterable[ShardHealth] = self.view.healths.values() if self.view else ()
        return {
            h.shard_id: Circuit.HALF_OPEN if h.circuit is Circuit.OPEN and now >= h.rests_until else h.circuit
            for h in shards
        }
