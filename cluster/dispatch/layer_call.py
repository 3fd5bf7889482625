"""A `LayerCall` is a state machine that decides which picks go to which home, and how to react to each outcome.

The state machine has no sockets, threads or clock, and works with picks and request ids only. The caller makes the
messages, sends them and adds up the sums.

The picks of a call are divided into races, and each pick is in exactly one race. The picks of a race are first sent to
one home. If this home is late, the same picks are sent to other homes as well. Each such attempt consists of one
request, or of several requests that together carry all picks of the race. The first attempt whose requests are all
answered gives the sums of the race. The sums of the other attempts are ignored, so each pick is summed exactly once.

Legend: P picks of the call (the picks of a row stand together), K picks per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from cluster.dispatch.call_policy import CallPolicy
from cluster.dispatch.fleet_view import FleetView, ShardFleet
from cluster.dispatch.probe import make_probes
from cluster.dispatch.routing import NoLiveHome
from cluster.dispatch.shard_health import LinkState, ReplyTiming, ShardHealth
from cluster.dispatch.shard_request import (
    FRESH,
    NEVER,
    Attempt,
    Delay,
    PickIds,
    Race,
    RefusalCode,
    RetryHistory,
    ShardRequest,
    WaitingPicks,
)
from cluster.topology import Placement


@dataclass(eq=False, slots=True)
class LayerCall:
    """A `LayerCall` holds the picks of one layer's rows and decides which requests are sent for the picks.

    The caller reports each reply, each loss and each change of the fleet through an `on_...` method. The caller sends
    the requests that the method returns, each in one message. Each method may end the call: then `is_done` is true. If
    the call has failed, `failure` is a sentence that says why.
    """

    fleet: ShardFleet
    layer: int
    expert_P: PickIds
    top_k: int
    max_rows: int  # maximum number of rows in one message
    started_at: float
    expires_at: float = 0.0
    wake_at: float = NEVER  # the time at which `on_tick` must be called
    failure: str | None = None
    healed_until: float = 0.0  # waiting without a home before this time is already added to `expires_at`
    races: set[Race] = field(default_factory=set)
    waiting: list[WaitingPicks] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.failure is not None or not (self.races or self.waiting)

    @property
    def in_flight(self) -> Iterable[ShardRequest]:
        """Return the unanswered requests whose replies the call can still use."""
        return (
            request
            for race in self.races
            for attempt in race.attempts
            for request in attempt.requests
            if not request.is_answered
        )

    def start(self, now: float) -> list[ShardRequest]:
        """Return the first requests of the call, and the request of a probe if a probe is due."""
        self.wake_at = self.expires_at = now + self.fleet.policy.timeout_s
        requests: list[ShardRequest] = []
        if len(self.expert_P):
            requests = self._send(np.arange(len(self.expert_P)), FRESH, now)
            if self.fleet.probe_at <= now:
                requests += make_probes(self.fleet, self.layer, self.expert_P, self.top_k, self.max_rows, now)
        return requests

    # Events

    def on_reply(self, request_id: int, timing: ReplyTiming, now: float) -> list[int]:
        """Note that the sums of a request have come, and return the ids of the requests whose sums count now.

        When the reply completes an attempt, the sums of all requests of the attempt count. The list is empty if the
        attempt is still incomplete, or if another attempt was complete first.
        """
        request = self.fleet.note_reply(request_id, timing, now)
        if request is None or self.failure is not None:
            return []
        race, attempt = request.race, request.attempt
        if race is None or race.is_over or attempt is None:
            return []
        request.is_answered = True
        attempt.num_unanswered -= 1
        if attempt not in race.attempts or attempt.num_unanswered:
            return []
        race.is_over = True
        self.races.remove(race)
        if len(race.attempts) > 1:
            self._note_winner(race, attempt, now)
        return [request.id for request in attempt.requests]

    def on_refusal(self, request_id: int, code: RefusalCode, detail: str, now: float) -> list[ShardRequest]:
        """Note that a shard refused a request, and return the requests that replace the refused one."""
        is_fault = code in (RefusalCode.FAILED, RefusalCode.CORRUPT)
        request = self.fleet.note_failed(request_id, now) if is_fault else self.fleet.note_reply(request_id, None, now)
        refusals = self.fleet.traffic.refusals
        refusals[code] = refusals.get(code, 0) + 1
        if request is None:
            return []
        if code is RefusalCode.BAD_SHAPE:
            self.failure = f"Shard {request.shard_id} does not serve this model: {detail}"
            return []
        if code is RefusalCode.DRAINING:
            request.health.is_draining = self.fleet.is_changed = True
        is_busy, is_error = code is RefusalCode.OVERLOADED, code in (RefusalCode.FAILED, RefusalCode.BAD_SHAPE)
        return self._retry(request, detail, now, is_busy, is_error)

    def on_lost(self, request_id: int, now: float) -> list[ShardRequest]:
        """Note that the stream of a request broke, and return the requests that replace the lost one."""
        self.fleet.traffic.num_lost += 1
        request = self.fleet.note_failed(request_id, now)
        return self._retry(request, "the stream was lost", now) if request else []

    def on_corrupt(self, request_id: int, detail: str, now: float) -> list[ShardRequest]:
        """Note that the reply to a request was damaged on the way, and return the requests that replace the request."""
        self.fleet.traffic.num_corrupt += 1
        request = self.fleet.note_failed(request_id, now)
        return self._retry(request, detail, now) if request else []

    def on_change(self, now: float) -> list[ShardRequest]:
        """Note that the fleet has changed, and return the requests that can be sent because of the change."""
        for waiting in self.waiting:
            waiting.resume_at = now
        for race in self.races:
            race.check_at = now
        return self.on_tick(now)

    def on_tick(self, now: float) -> list[ShardRequest]:
        """Return the requests that are due at the time `now`, or fail the call if its timeout has passed.

        The caller must have reported every outcome so far.
        """
        requests: list[ShardRequest] = []
        if self.failure is not None:
            return requests
        for waiting in [waiting for waiting in self.waiting if waiting.resume_at <= now]:
            self.waiting.remove(waiting)
            requests += self._resume(waiting, now)
        for race in [race for race in self.races if race.check_at <= now]:
            requests += self._check(race, now)
        if self.failure is None and now >= self.expires_at and all(w.history.is_busy for w in self.waiting):
            shards = sorted({request.shard_id for request in self.in_flight}) or "that were asked"
            self.failure = (
                f"Layer {self.layer} was not computed within timeout_s = {self.fleet.policy.timeout_s}: "
                f"the shards {shards} have not answered."
            )
        expires_at = NEVER if now >= self.expires_at else self.expires_at
        checks = [race.check_at for race in self.races]
        self.wake_at = min([expires_at, *checks, *(waiting.resume_at for waiting in self.waiting)])
        return requests

    def stop_waiting(self) -> None:
        """Fail the call if some of its picks wait for a home, because the backbone stops."""
        if self.waiting:
            self.failure = f"Layer {self.layer} is given up, because this backbone stops."

    # Sending

    def _send(
        self, picks: PickIds, history: RetryHistory, now: float, may_ask_avoided: bool = False
    ) -> list[ShardRequest]:
        """Return requests for `picks` to homes not asked in this retry round; picks without such a home wait.

        Homes that should be avoided are asked only for picks that have no other home.
        """
        if not len(picks):
            return []
        sizes = (self.top_k, self.max_rows)
        try:
            grouped = self.fleet.route(
                self.layer, picks, self.expert_P, sizes, history.asked_shards, now, may_ask_avoided=may_ask_avoided
            )
        except NoLiveHome as none_left:
            is_stuck = np.isin(self.expert_P[picks], none_left.experts)
            requests = self._send(picks[~is_stuck], history, now, may_ask_avoided)
            stuck = picks[is_stuck]
            if may_ask_avoided:
                self._wait(stuck, history, now)
                return requests
            return requests + self._send(stuck, history, now, may_ask_avoided=True)
        requests = self.fleet.make_requests(self.layer, self.expert_P, grouped, now)
        for request in requests:
            attempt = request.attempt = Attempt([request], 1)
            check_at = now + request.late_after_s
            request.race = race = Race(request.picks, history, [attempt], check_at)
            self.races.add(race)
            if check_at < self.wake_at:
                self.wake_at = check_at
        self.fleet.budget.earn(len(requests))
        return requests

    # Hedges

    def _check(self, race: Race, now: float) -> list[ShardRequest]:
        """Return the requests of another attempt if the last attempt of `race` is late and another home is left."""
        delay = race.delay(now, self.fleet.policy)
        if delay is None:
            return []
        is_hedge, sizes = delay is Delay.LATE, (self.top_k, self.max_rows)
        try:
            grouped = self.fleet.route(
                self.layer, race.picks, self.expert_P, sizes, race.asked_shards, now, may_promote=not is_hedge
            )
        except NoLiveHome:
            if (health := race.shard_to_reset(now, self.fleet.policy)) is not None:
                self.fleet.request_reset(health)
            return []
        if is_hedge and not self.fleet.budget.take(len(grouped.shard_M)):
            self.fleet.traffic.num_hedges_denied += 1
            race.may_hedge = False
            return []
        requests = self.fleet.make_requests(self.layer, self.expert_P, grouped, now)
        race.add(requests, is_hedge)
        if is_hedge:
            self.fleet.traffic.num_hedged += len(requests)
        else:
            self.fleet.traffic.num_stalled += len(requests)
        return requests

    def _note_winner(self, race: Race, winner: Attempt, now: float) -> None:
        """Count a fault for each shard that has not answered a request of an attempt earlier than `winner`."""
        self.fleet.traffic.num_hedges_won += winner.is_hedge
        for request in race.beaten_by(winner):
            request.is_beaten = True
            self.fleet.note_fault(request.health, now)

    # Retries

    def _retry(
        self, request: ShardRequest, reason: str, now: float, is_busy: bool = False, is_error: bool = False
    ) -> list[ShardRequest]:
        """Return requests that send a failed request's picks to other homes; return none if an attempt still runs."""
        race, attempt = request.race, request.attempt
        if race is None or attempt is None or race.is_over or attempt not in race.attempts:
            return []
        race.attempts.remove(attempt)
        reason = f"shard {request.shard_id} failed last: {reason.rstrip('.')}"
        race.history = history = race.history.after(attempt, reason, is_busy, is_error)
        if not race.attempts:
            race.is_over = True
            self.races.remove(race)
        if history.num_errors >= self.fleet.policy.max_tries:
            tries = f"max_tries = {history.num_errors} tries"
            self.failure = f"Picks of layer {self.layer} were not computed in {tries}; {history.reason}."
            return []
        if race.attempts:
            race.check_at = self.wake_at = now
            return []
        return self._send(race.picks, history, now)

    def _wait(self, picks: PickIds, history: RetryHistory, now: float) -> None:
        """Let `picks` wait until a pause ends or the fleet changes, because no home is left that can be asked."""
        resume_at = now + history.pause_s(self.fleet.policy)
        if not history.is_busy:
            self.fleet.traffic.num_heals += history.num_rounds == 0
        self.waiting.append(WaitingPicks(picks, history.next_round(now), resume_at, now))
        self.wake_at = min(self.wake_at, resume_at)

    def _resume(self, waiting: WaitingPicks, now: float) -> list[ShardRequest]:
        """Return requests for picks that have waited, or fail the call if the picks had no home for `heal_timeout_s`.

        The time for which the picks had no home is added to `expires_at`. A period in which several groups of picks
        waited is added only once.
        """
        history, heal_timeout_s = waiting.history, self.fleet.policy.heal_timeout_s
        if not history.is_busy:
            self.expires_at += now - max(waiting.since, self.healed_until)
            self.healed_until = now
        if now - history.stuck_since >= heal_timeout_s:
            experts = np.unique(self.expert_P[waiting.picks]).tolist()
            self.failure = (
                f"Layer {self.layer} cannot be computed: The experts {experts} had no live home for "
                f"heal_timeout_s = {heal_timeout_s}; {history.reason}."
            )
            return []
        return self._send(waiting.picks, history, now)


@cache
def warm_up() -> None:
    """Compile the routing functions now, so that the first call does not wait for the compiler."""
    health = ShardHealth("s", CallPolicy(), link=LinkState.UP)
    fleet = ShardFleet(health.policy)
    fleet.adopt(FleetView(Placement(0, {0: (("s",),)}, {0: 0}), {"s": health}), 0.0)
    LayerCall(fleet, 0, np.zeros(1, np.int64), 1, 1, 0.0).start(0.0)
