"""The shards as a client sees them: the placement, the health of each, and what they owe.

No sockets, threads or clock: the real client and the simulation drive the same code. Everything belongs to the thread
that calls, except that any thread may set a shard's `link` and then `is_changed`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cluster.dispatch.call_policy import CallPolicy, Traffic
from cluster.dispatch.routing import Grouped, HomeTable, route
from cluster.dispatch.shard_health import Circuit, HedgeBudget, LinkState, ReplyTiming, ShardHealth
from cluster.topology import CostModel, Placement

if TYPE_CHECKING:
    from cluster.dispatch.layer_call import ShardRequest

MESSAGE_US = 200.0  # what one more message costs the caller
LEARN_EVERY_S = 0.005  # from a shard's replies: each would cost more than it tells
SURPRISING = 4.0  # times what was predicted: learned from before the next message
EXPERT, ROW, MESSAGE, FREE = range(4)  # rows of `costs_CS`
NEVER = float("inf")

Tables = Mapping[int, HomeTable]
Ids = NDArray[np.int64]


class FleetView:
    """A placement, the shards that are registered, and their paces; replaced as a whole."""

    def __init__(
        self,
        placement: Placement,
        healths: Mapping[str, ShardHealth],
        paces: Mapping[str, CostModel] | None = None,
        draining: Collection[str] = (),
        before: FleetView | None = None,
    ) -> None:
        self.placement, self.paces, self.draining = placement, paces or {}, frozenset(draining)
        self.shard_ids = placement.shard_ids
        self.healths = {id: healths[id] for id in self.shard_ids if id in healths}
        self.tables = _tables(placement, self.shard_ids, before)

    def is_like(self, other: FleetView) -> bool:
        """Whether there is nothing in it that calls which wait might have waited for."""
        mine, theirs = ((v.placement.homes, v.placement.standby, v.draining, v.healths) for v in (self, other))
        return mine == theirs


def _tables(placement: Placement, shard_ids: tuple[str, ...], before: FleetView | None) -> Tables:
    """Those of before where nothing changed: they take a while to make."""

    def table(layer: int) -> HomeTable:
        homes, standby = placement.homes[layer], placement.standby.get(layer)
        if before is not None and before.shard_ids == shard_ids and layer in before.tables:
            was = before.placement
            if was.homes[layer] == homes and was.standby.get(layer) == standby:
                return before.tables[layer]
        return HomeTable(homes, standby, shard_ids)

    return {layer: table(layer) for layer in placement.homes}


class ShardFleet:
    """What calls share. `expert_mib` says by layer how large one expert is; where it does not, 1 MiB is assumed."""

    def __init__(self, policy: CallPolicy, expert_mib: Mapping[int, float] | None = None) -> None:
        self.policy, self.expert_mib = policy, expert_mib or {}
        self.traffic = Traffic()
        self.budget = HedgeBudget(policy.hedge_share, policy.hedge_burst, policy.hedge_burst)
        self.ids = itertools.count(1)
        self.owed: dict[int, ShardRequest] = {}  # what was sent and neither answered nor lost
        self.is_changed = False  # a link came up or went down
        self.probe_at = NEVER  # when a shard that rests is to be tried, or a try to be given up
        self._probes: dict[int, ShardRequest] = {}
        self.to_learn: list[tuple[ShardRequest, ReplyTiming, float]] = []
        self._unanswered: list[ShardHealth] = []
        self.view: FleetView | None = None

    def adopt(self, view: FleetView, now: float) -> None:
        """Uses this view for all that is sent from now on."""
        for health in self.view.healths.values() if self.view else ():
            health.place = -1
        self.view = view
        num_shards = len(view.shard_ids)
        self.costs_CS = np.zeros((4, num_shards))  # per MiB: an expert, a row; a message; when it is free
        self._shards: list[ShardHealth | None] = [view.healths.get(id) for id in view.shard_ids]
        for place, shard in enumerate(self._shards):
            if shard is not None:
                shard.place, shard.is_draining = place, shard.shard_id in view.draining
                shard.adopt(view.paces.get(shard.shard_id, shard.cost_model), now)
        shards = view.healths.values()
        self._usual_overhead_us = min((health.overhead_us for health in shards), default=0.0)
        for health in view.healths.values():
            self._note_costs(health)
        paces = [health.cost_model for health in shards] or [CostModel()]
        per_row = sum(pace.row_us_per_mib for pace in paces)
        self._max_piece = max(1, int(sum(pace.weight_us_per_mib for pace in paces) / max(per_row, 1e-9)))
        self.is_changed = True

    def refresh(self) -> None:
        """Looks again at which shards can be asked, if something has changed."""
        if self.is_changed:
            self.is_changed = False  # first: it may be set again meanwhile
            shards = self._shards
            self._avoided_S = np.array([h is None or h.should_be_avoided for h in shards], dtype=np.bool_)
            self._down_S = np.array([h is None or h.link is not LinkState.UP for h in shards], dtype=np.bool_)
            resting = [h.rests_until for h in shards if h is not None and h.circuit is Circuit.OPEN]
            waiting = [ask.sent_at + self.policy.stall_s for ask in self._probes.values()]
            self.probe_at = min((*resting, *waiting), default=NEVER)

    def _note_costs(self, health: ShardHealth) -> None:
        costs_CS, place = self.costs_CS, health.place
        if place >= 0:
            costs_CS[EXPERT, place] = health.slowness * health.cost_model.weight_us_per_mib
            costs_CS[ROW, place] = health.slowness * health.cost_model.row_us_per_mib
            excess_us = max(0.0, health.overhead_us - 2 * self._usual_overhead_us)
            costs_CS[MESSAGE, place] = MESSAGE_US + health.slowness * health.cost_model.call_us + excess_us
            costs_CS[FREE, place] = health.free_at

    # Choosing

    def route(
        self,
        layer: int,
        picks: Ids,
        expert_P: Ids,
        sizes: tuple[int, int],
        passed: Collection[str],
        now: float,
        may_promote: bool = True,
        is_picky: bool = True,
    ) -> Grouped:
        """The messages for some picks, their shards as places in `view.shard_ids`; raises NoLiveHome.

        No home is among `passed`; where it `is_picky`, none that should be avoided. Sizes: picks of a row, and rows of
        a message at most.
        """
        assert self.view is not None
        self.refresh()
        is_excluded_S = self._avoided_S if is_picky else self._down_S
        if passed:
            is_excluded_S = is_excluded_S | np.array([id in passed for id in self.view.shard_ids], dtype=np.bool_)
        table, mib = self.view.tables[layer], self.expert_mib.get(layer, 1.0)
        costs = (self.costs_CS, now, mib, self._max_piece)
        return route(picks, expert_P, table, *costs, is_excluded_S, *sizes, may_promote)

    def shard_at(self, place: int) -> ShardHealth:
        health = self._shards[place]
        assert health is not None
        return health

    # What was sent, and what came of it

    def note_sent(self, ask: ShardRequest) -> None:
        self.owed[ask.id] = ask
        health = ask.health
        if health.place >= 0:
            self.costs_CS[FREE, health.place] = health.free_at

    def note_reply(self, request_id: int, timing: ReplyTiming | None, now: float) -> ShardRequest | None:
        """Takes note of sums, or without a timing of a refusal; returns what was asked, unless that is not known."""
        ask = self.owed.pop(request_id, None)
        if ask is None:
            return None
        health, took_s = ask.health, now - ask.sent_at
        health.heard_at = now
        is_slow = timing is not None and not ask.is_promoting and health.is_far_slower(took_s, ask.predicted_s)
        if is_slow or ask.is_beaten or health.num_failures:
            self._judge(ask, is_slow, now)
        if timing is not None:
            if not timing.queue_depth:
                health.free_at = now
                if health.place >= 0:
                    self.costs_CS[FREE, health.place] = now
            if now >= health.learn_at and not ask.is_promoting:
                health.learn_at = now + LEARN_EVERY_S
                self.to_learn.append((ask, timing, now))
                if took_s > SURPRISING * ask.predicted_s:
                    self.learn()
        return ask

    def _judge(self, ask: ShardRequest, is_slow: bool, now: float) -> None:
        if ask.is_beaten:
            ask.health.come_late()
        elif is_slow:
            ask.health.fail(now)
        else:
            ask.health.succeed()
        self._probes.pop(ask.id, None)
        self.is_changed = True

    def learn(self) -> None:
        """Learns from the replies noted; best called while there is nothing to do but wait."""
        for ask, timing, at in self.to_learn:
            ask.health.answer(ask.work, timing, at - ask.sent_at, ask.predicted_s, at)
            self._note_costs(ask.health)
        self.to_learn.clear()

    def note_failed(self, request_id: int, now: float) -> ShardRequest | None:
        """Takes note of a message that came to nothing: its stream was lost, or what came back was corrupt."""
        ask = self.owed.pop(request_id, None)
        if ask is not None:
            self._probes.pop(request_id, None)
            self.note_fault(ask.health, now)
        return ask

    def note_fault(self, health: ShardHealth, now: float) -> None:
        health.fail(now)
        self.is_changed = True

    # Shards that rest

    def due_probe(self, now: float) -> ShardHealth | None:
        """A shard that has rested, to be asked for something whose answer nobody waits for."""
        for ask in [ask for ask in self._probes.values() if now >= ask.sent_at + self.policy.stall_s]:
            del self._probes[ask.id]
            ask.is_beaten = True
            ask.health.fail(now)
            self._unanswered.append(ask.health)
        self.is_changed = True
        self.refresh()
        is_due = (
            h
            for h in self._shards
            if h is not None and h.circuit is Circuit.OPEN and now >= h.rests_until and h.link is LinkState.UP
        )
        return next(is_due, None)

    def note_probe(self, ask: ShardRequest) -> None:
        ask.health.circuit = Circuit.HALF_OPEN
        self._probes[ask.id] = ask
        self.is_changed = True

    def postpone(self, health: ShardHealth, now: float) -> None:
        """There was nothing to ask it for."""
        health.rests_until = now + self.policy.first_rest_s
        self.is_changed = True

    def ask_anew(self, health: ShardHealth) -> None:
        """Has its stream opened anew: what is owed on it is lost, and sent again."""
        self._unanswered.append(health)

    @property
    def has_unanswered(self) -> bool:
        return bool(self._unanswered)

    def take_unanswered(self) -> list[ShardHealth]:
        """Shards that do not answer: their streams are to be opened anew, or what they owe would grow."""
        shards, self._unanswered = self._unanswered, []
        return shards

    def circuits(self, now: float) -> dict[str, Circuit]:
        """Of each shard; one whose rest is over counts as half open already: while nobody calls, none would close."""
        shards: Iterable[ShardHealth] = self.view.healths.values() if self.view else ()
        return {
            h.shard_id: Circuit.HALF_OPEN if h.circuit is Circuit.OPEN and now >= h.rests_until else h.circuit
            for h in shards
        }
