"""One layer's call as a state machine: which picks go to which home, and what follows from what comes of it.

No sockets, threads or clock. It deals in picks and request ids; whoever drives it makes the messages and adds the sums.

A call's picks are parted into races, each pick in one. The picks of a race are first sent to one home, then, if that
one is late, to others as well; each such attempt is a lane, of one message or of several that make up the race. The
first lane whose messages are all answered gives the race's sums, and no other does: that is how each pick is summed
exactly once.

Legend: P picks of the call (the picks of a row stand together), K picks a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cluster.dispatch.call_policy import CallPolicy, Traffic
from cluster.dispatch.fleet_view import NEVER, FleetView, ShardFleet
from cluster.dispatch.routing import Grouped, NoLiveHome, group
from cluster.dispatch.shard_health import LinkState, ReplyTiming, ShardHealth, Work
from cluster.topology import Placement

Picks = NDArray[np.int64]
NOBODY: frozenset[str] = frozenset()
PROBED_PICKS = 8


class RefusalCode(StrEnum):
    """Why a shard did not compute; the names are those of the wire."""

    NOT_HOSTED = "NOT_HOSTED"
    STALE_EPOCH = "STALE_EPOCH"
    OVERLOADED = "OVERLOADED"
    DRAINING = "DRAINING"
    BAD_SHAPE = "BAD_SHAPE"
    DEADLINE = "DEADLINE"
    FAILED = "FAILED"
    CORRUPT = "CORRUPT"


@dataclass(eq=False, slots=True)
class ShardRequest:
    """One message to one shard: the picks it carries (in the order of their rows) and what is expected of it."""

    id: int
    health: ShardHealth
    picks: Picks
    work: Work
    sent_at: float
    predicted_s: float
    late_after_s: float  # of silence
    stalled_after_s: float
    is_promoting: bool
    race: Race | None  # None: a probe, whose answer nobody waits for
    lane: Attempt | None = None
    is_answered: bool = False
    is_beaten: bool = False  # another home answered first

    @property
    def shard_id(self) -> str:
        return self.health.shard_id

    @property
    def num_rows(self) -> int:
        return self.work.num_rows

    def due_at(self, is_hedge: bool) -> float:
        """When its silence has lasted long enough."""
        return max(self.sent_at, self.health.heard_at) + (self.late_after_s if is_hedge else self.stalled_after_s)


@dataclass(eq=False, slots=True)
class Attempt:
    """Messages that together carry the picks of a race."""

    asks: list[ShardRequest]
    num_waiting: int
    is_hedge: bool = False

    def due_at(self, is_hedge: bool) -> float:
        return max(ask.due_at(is_hedge) for ask in self.asks if not ask.is_answered)


@dataclass(frozen=True, slots=True)
class RetryHistory:
    """What has been tried for some picks; `reason` is what came of the last try."""

    passed: frozenset[str] = NOBODY  # shards asked since all were last asked
    num_errors: int = 0
    num_rounds: int = 0  # of all homes
    stuck_since: float = NEVER  # when no home was left first
    reason: str = "no shard that holds them can be reached"
    is_busy: bool = False  # the last shard works, but has too much to do


FRESH = RetryHistory()


@dataclass(eq=False, slots=True)
class Race:
    """Picks that wait for the first of their lanes to be answered."""

    picks: Picks
    past: RetryHistory
    lanes: list[Attempt]
    look_at: float  # when to see whether it is late
    may_hedge: bool = True
    is_doubted: bool = False
    is_over: bool = False


@dataclass(eq=False, slots=True)
class WaitingPicks:
    """Picks that no home computes just now."""

    picks: Picks
    past: RetryHistory
    resume_at: float
    since: float


@dataclass(eq=False, slots=True)
class LayerCall:
    """The picks of one layer's rows. What its methods return is to be sent, in one message each.

    After each of them `is_done` may hold; then `failure` says in a sentence why not all was computed, if so.
    """

    fleet: ShardFleet
    layer: int
    expert_P: Picks
    top_k: int
    max_rows: int  # of one message
    started_at: float
    expires_at: float = 0.0
    wake_at: float = NEVER  # when `on_tick` has something to do
    failure: str | None = None
    healed_until: float = 0.0  # the time without a home before that has been added to `expires_at`
    races: set[Race] = field(default_factory=set)
    parked: list[WaitingPicks] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.failure is not None or not (self.races or self.parked)

    @property
    def under_way(self) -> Iterable[ShardRequest]:
        """The messages whose answers may still count."""
        return (ask for race in self.races for lane in race.lanes for ask in lane.asks if not ask.is_answered)

    @property
    def _mib(self) -> float:
        return self.fleet.expert_mib.get(self.layer, 1.0)

    @property
    def _traffic(self) -> Traffic:
        return self.fleet.traffic

    def start(self, now: float) -> list[ShardRequest]:
        self.wake_at = self.expires_at = now + self.fleet.policy.timeout_s
        asks: list[ShardRequest] = []
        if len(self.expert_P):
            asks = self._send(np.arange(len(self.expert_P)), FRESH, now)
            if self.fleet.probe_at <= now:
                asks += self._probe(now)
        return asks

    # What comes back

    def on_reply(self, request_id: int, timing: ReplyTiming, now: float) -> list[int]:
        """Sums have come: the ids of those that count now, which are this one, and others that came before, or none."""
        ask = self.fleet.note_reply(request_id, timing, now)
        if ask is None or ask.race is None or ask.race.is_over or ask.lane is None or self.failure is not None:
            return []
        race, lane = ask.race, ask.lane
        ask.is_answered = True
        lane.num_waiting -= 1
        if lane not in race.lanes or lane.num_waiting:
            return []
        race.is_over = True
        self.races.remove(race)
        if len(race.lanes) > 1:
            self._settle(race, lane, now)
        return [ask.id for ask in lane.asks]

    def on_refusal(self, request_id: int, code: RefusalCode, detail: str, now: float) -> list[ShardRequest]:
        is_fault = code in (RefusalCode.FAILED, RefusalCode.CORRUPT)
        ask = self.fleet.note_failed(request_id, now) if is_fault else self.fleet.note_reply(request_id, None, now)
        self._traffic.refusals[code] = self._traffic.refusals.get(code, 0) + 1
        if ask is None:
            return []
        if code is RefusalCode.BAD_SHAPE:
            self.failure = f"Shard {ask.shard_id} does not serve this model: {detail}"
            return []
        if code is RefusalCode.DRAINING:
            ask.health.is_draining = self.fleet.is_changed = True
        is_busy, is_error = code is RefusalCode.OVERLOADED, code in (RefusalCode.FAILED, RefusalCode.BAD_SHAPE)
        return self._give_up(ask, detail, now, is_busy, is_error)

    def on_lost(self, request_id: int, now: float) -> list[ShardRequest]:
        """The stream broke."""
        self._traffic.num_lost += 1
        ask = self.fleet.note_failed(request_id, now)
        return self._give_up(ask, "the stream was lost", now) if ask else []

    def on_corrupt(self, request_id: int, detail: str, now: float) -> list[ShardRequest]:
        """What came is not what was sent."""
        self._traffic.num_corrupt += 1
        ask = self.fleet.note_failed(request_id, now)
        return self._give_up(ask, detail, now) if ask else []

    def on_change(self, now: float) -> list[ShardRequest]:
        """The fleet is another: what waited for that goes on."""
        for parked in self.parked:
            parked.resume_at = now
        for race in self.races:
            race.look_at = now
        return self.on_tick(now)

    def on_tick(self, now: float) -> list[ShardRequest]:
        """Time has passed, and everything that has come was taken."""
        asks: list[ShardRequest] = []
        if self.failure is not None:
            return asks
        for parked in [parked for parked in self.parked if parked.resume_at <= now]:
            self.parked.remove(parked)
            asks += self._resume(parked, now)
        for race in [race for race in self.races if race.look_at <= now]:
            asks += self._look_at(race, now)
        if self.failure is None and now >= self.expires_at and all(p.past.is_busy for p in self.parked):
            waiting = sorted({ask.shard_id for ask in self.under_way}) or "that were asked"
            self.failure = (
                f"Layer {self.layer} was not computed within timeout_s = {self.fleet.policy.timeout_s}: "
                f"the shards {waiting} still owe an answer."
            )
        looks = [race.look_at for race in self.races]
        self.wake_at = min([self._expiry(now), *looks, *(parked.resume_at for parked in self.parked)])
        return asks

    def _expiry(self, now: float) -> float:
        return NEVER if now >= self.expires_at else self.expires_at

    # Sending

    def _send(self, picks: Picks, past: RetryHistory, now: float, may_hurt: bool = False) -> list[ShardRequest]:
        """Sends picks to homes that were not asked for them yet: rather to none that should be avoided, but to such a
        one rather than to none. The rest waits."""
        if not len(picks):
            return []
        sizes = (self.top_k, self.max_rows)
        try:
            grouped = self.fleet.route(self.layer, picks, self.expert_P, sizes, past.passed, now, is_picky=not may_hurt)
        except NoLiveHome as none_left:
            is_stuck = np.isin(self.expert_P[picks], none_left.experts)
            asks = self._send(picks[~is_stuck], past, now, may_hurt)
            stuck = picks[is_stuck]
            return asks + (self._park(stuck, past, now) if may_hurt else self._send(stuck, past, now, may_hurt=True))
        asks = self._post(grouped, now)
        for ask in asks:
            lane = ask.lane = Attempt([ask], 1)
            look_at = now + ask.late_after_s
            ask.race = race = Race(ask.picks, past, [lane], look_at)
            self.races.add(race)
            if look_at < self.wake_at:
                self.wake_at = look_at
        self.fleet.budget.earn(len(asks))
        return asks

    def _post(self, grouped: Grouped, now: float) -> list[ShardRequest]:
        fleet = self.fleet
        assert fleet.view is not None
        table = fleet.view.tables[self.layer]
        pick_Q, first_M, shard_M, num_rows_M, num_experts_M = grouped
        mib, asks, policy = self._mib, [], fleet.policy
        for m, place in enumerate(shard_M):
            own = pick_Q[first_M[m] : first_M[m + 1]]
            health, work = fleet.shard_at(place), Work(num_experts_M[m], num_rows_M[m], mib)
            is_promoting = table.has_standby and not (table.homes_EH[self.expert_P[own]] == place).any(1).all()
            predicted_s = health.send(health.compute_us(work), now)
            late_s, stalled_s = health.late_after_s(predicted_s), policy.allowed_silence_s(predicted_s)
            if is_promoting:
                late_s, stalled_s = policy.promote_s + predicted_s, policy.promote_s + stalled_s
            ask = ShardRequest(
                next(fleet.ids), health, own, work, now, predicted_s, late_s, stalled_s, is_promoting, None
            )
            fleet.note_sent(ask)
            asks.append(ask)
        return asks

    def _probe(self, now: float) -> list[ShardRequest]:
        """A message to a shard that has rested: with picks that another home computes as well."""
        fleet = self.fleet
        health = fleet.due_probe(now)
        if health is None:
            return []
        assert fleet.view is not None
        table = fleet.view.tables[self.layer]
        picks = (table.homes_EH[self.expert_P] == health.place).any(1).nonzero()[0]
        if not len(picks):
            fleet.postpone(health, now)
            return []
        picks = picks[picks // self.top_k == picks[0] // self.top_k][:PROBED_PICKS]
        sizes = (self.top_k, len(table.shard_ids), len(table.homes), self.max_rows)
        asks = self._post(group(picks, np.full(len(picks), health.place), self.expert_P, *sizes), now)
        for ask in asks:
            fleet.note_probe(ask)
        self._traffic.num_probes += len(asks)
        return asks

    # What is late

    def _look_at(self, race: Race, now: float) -> list[ShardRequest]:
        lane, policy = race.lanes[-1], self.fleet.policy
        if race.may_hedge and now < (due_at := lane.due_at(is_hedge=True)):
            race.look_at = due_at
            return []
        stalled_at = lane.due_at(is_hedge=False)
        is_stalled = now >= stalled_at
        race.look_at = now + policy.stall_s / 2 if is_stalled else stalled_at
        if len(race.lanes) >= policy.max_lanes or not (is_stalled or race.may_hedge):
            return []
        passed = race.past.passed | {ask.shard_id for lane in race.lanes for ask in lane.asks}
        sizes = (self.top_k, self.max_rows)
        try:
            grouped = self.fleet.route(
                self.layer, race.picks, self.expert_P, sizes, passed, now, may_promote=is_stalled
            )
        except NoLiveHome:
            self._doubt(race, now)
            return []
        if not is_stalled and not self.fleet.budget.take(len(grouped.shard_M)):
            self._traffic.num_hedges_denied += 1
            race.may_hedge = False
            return []
        return self._join(race, self._post(grouped, now), not is_stalled)

    def _doubt(self, race: Race, now: float) -> None:
        """There is no other home. The stream may be out of step and not the shard: it is opened anew, once."""
        for ask in race.lanes[-1].asks:
            silent_s = now - max(ask.sent_at, ask.health.heard_at)
            if not race.is_doubted and silent_s >= self.fleet.policy.doubt * ask.stalled_after_s:
                race.is_doubted = True
                self.fleet.ask_anew(ask.health)

    def _join(self, race: Race, asks: list[ShardRequest], is_hedge: bool) -> list[ShardRequest]:
        """Adds a lane."""
        lane = Attempt(asks, len(asks), is_hedge)
        for ask in asks:
            ask.race, ask.lane = race, lane
        race.lanes.append(lane)
        race.may_hedge = True
        race.look_at = lane.due_at(is_hedge=True)
        if is_hedge:
            self._traffic.num_hedged += len(asks)
        else:
            self._traffic.num_stalled += len(asks)
        return asks

    def _settle(self, race: Race, winner: Attempt, now: float) -> None:
        """Those that were asked before the winner, and have not answered, have lost."""
        self._traffic.num_hedges_won += winner.is_hedge
        for lane in race.lanes[: race.lanes.index(winner)]:
            for ask in lane.asks:
                if not ask.is_answered:
                    ask.is_beaten = True
                    self.fleet.note_fault(ask.health, now)

    # What came to nothing

    def _give_up(
        self, ask: ShardRequest, reason: str, now: float, is_busy: bool = False, is_error: bool = False
    ) -> list[ShardRequest]:
        """A message came to nothing: its picks go to another home, unless one is computing them already."""
        race, lane = ask.race, ask.lane
        if race is None or race.is_over or lane not in race.lanes:
            return []
        assert lane is not None
        race.lanes.remove(lane)
        past, passed = race.past, {one.shard_id for one in lane.asks}
        race.past = past = replace(
            past,
            passed=past.passed | passed,
            num_errors=past.num_errors + is_error,
            reason=f"shard {ask.shard_id} last said: {reason.rstrip('.')}",
            is_busy=is_busy,
        )
        if not race.lanes:
            race.is_over = True
            self.races.remove(race)
        if past.num_errors >= self.fleet.policy.max_tries:
            tries = f"max_tries = {past.num_errors} tries"
            self.failure = f"Picks of layer {self.layer} were not computed in {tries}; {past.reason}."
            return []
        if race.lanes:
            race.look_at = self.wake_at = now
            return []
        return self._send(race.picks, past, now)

    def _park(self, picks: Picks, past: RetryHistory, now: float) -> list[ShardRequest]:
        """Every home was asked, or cannot be: they are asked once more after a pause, or when the fleet has changed."""
        policy = self.fleet.policy
        if past.is_busy:  # it works, so the call's deadline is bound enough
            again, pause_s = replace(past, passed=NOBODY), policy.first_pause_s
        else:
            stuck_since, num_rounds = min(past.stuck_since, now), past.num_rounds + 1
            again = replace(past, passed=NOBODY, num_rounds=num_rounds, stuck_since=stuck_since)
            pause_s = min(policy.max_pause_s, policy.first_pause_s * 2.0 ** min(past.num_rounds, 32))
            self._traffic.num_heals += past.num_rounds == 0
        self.parked.append(WaitingPicks(picks, again, now + pause_s, now))
        self.wake_at = min(self.wake_at, now + pause_s)
        return []

    def _resume(self, parked: WaitingPicks, now: float) -> list[ShardRequest]:
        past, heal_timeout_s = parked.past, self.fleet.policy.heal_timeout_s
        if not past.is_busy:
            self.expires_at += now - max(parked.since, self.healed_until)
            self.healed_until = now
        if now - past.stuck_since >= heal_timeout_s:
            experts = np.unique(self.expert_P[parked.picks]).tolist()
            self.failure = (
                f"Layer {self.layer} cannot be computed: The experts {experts} had no live home for "
                f"heal_timeout_s = {heal_timeout_s}; {past.reason}."
            )
            return []
        return self._send(parked.picks, past, now)


@cache
def warm_up() -> None:
    """Compiles now what the first call would wait for."""
    health = ShardHealth("s", CallPolicy(), link=LinkState.UP)
    fleet = ShardFleet(health.policy)
    fleet.adopt(FleetView(Placement(0, {0: (("s",),)}, {0: 0}), {"s": health}), 0.0)
    LayerCall(fleet, 0, np.zeros(1, np.int64), 1, 1, 0.0).start(0.0)
