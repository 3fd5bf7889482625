"""The classes of this module record which requests a layer call has sent for which picks, and what has been tried.

A race has one or more attempts, and an attempt has one or more requests. All times are seconds of the caller's clock.

Legend: P picks of the call, numbered from 0; the picks of a row stand together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, StrEnum

import numpy as np
from numpy.typing import NDArray

from cluster.dispatch.call_policy import CallPolicy
from cluster.dispatch.shard_health import ShardHealth, Work

PickIds = NDArray[np.int64]
NO_SHARDS: frozenset[str] = frozenset()
NEVER = float("inf")  # a time that is never reached
MAX_DOUBLINGS = 32  # limit for doubling a pause, so that the power of two stays a finite number


class RefusalCode(StrEnum):
    """A `RefusalCode` says why a shard refused to compute a request; the protocol uses the same names."""

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
    """A `ShardRequest` is one message to one shard; it says which picks are sent and when the reply is expected.

    The picks are in the order of their rows.
    """

    id: int
    health: ShardHealth
    picks: PickIds
    work: Work
    sent_at: float
    predicted_s: float  # seconds from sending until the reply should be here
    late_after_s: float  # seconds of silence after which the request may be hedged
    stalled_after_s: float  # seconds of silence after which the picks go to another home, even without a hedge token
    is_promoting: bool  # the shard is a standby of some of the experts and has to promote them first
    race: Race | None = None  # None for a probe, whose reply no call waits for
    attempt: Attempt | None = None
    is_answered: bool = False
    is_beaten: bool = False  # a later attempt was complete before this request was answered

    @property
    def shard_id(self) -> str:
        return self.health.shard_id

    @property
    def num_rows(self) -> int:
        return self.work.num_rows

    @property
    def silent_since(self) -> float:
        """Return the later of two times: the shard's last reply to any request, and the sending of this request."""
        return max(self.sent_at, self.health.heard_at)

    @property
    def late_at(self) -> float:
        """Return the time at which the request may be hedged, if the shard is silent until this time."""
        return self.silent_since + self.late_after_s

    @property
    def stalled_at(self) -> float:
        """Return the time at which the shard counts as stalled, if the shard is silent until this time."""
        return self.silent_since + self.stalled_after_s


@dataclass(eq=False, slots=True)
class Attempt:
    """An `Attempt` is one or more requests to different homes that together carry all picks of a race."""

    requests: list[ShardRequest]
    num_unanswered: int
    is_hedge: bool = False

    @property
    def late_at(self) -> float:
        """Return the time at which the last unanswered request of the attempt may be hedged."""
        return max(request.late_at for request in self.requests if not request.is_answered)

    @property
    def stalled_at(self) -> float:
        """Return the time at which the last unanswered request of the attempt counts as stalled."""
        return max(request.stalled_at for request in self.requests if not request.is_answered)


@dataclass(frozen=True, slots=True)
class RetryHistory:
    """A `RetryHistory` records the failed attempts to compute some picks.

    In one retry round, a call asks each home of the picks at most once. When no home is left, the call waits and begins
    the next retry round.
    """

    asked_shards: frozenset[str] = NO_SHARDS  # shards asked in this retry round
    num_errors: int = 0
    num_rounds: int = 0  # number of retry rounds in which all homes were asked in vain
    stuck_since: float = NEVER  # the first time at which no home was left
    reason: str = "no shard that holds them can be reached"  # the outcome of the last request, for error messages
    is_busy: bool = False  # the last asked shard refused because it had too much to do

    def after(self, attempt: Attempt, reason: str, is_busy: bool, is_error: bool) -> RetryHistory:
        """Return this retry history with `attempt` added as a failed attempt; `reason` says why `attempt` failed."""
        return replace(
            self,
            asked_shards=self.asked_shards | {request.shard_id for request in attempt.requests},
            num_errors=self.num_errors + is_error,
            reason=reason,
            is_busy=is_busy,
        )

    def next_round(self, now: float) -> RetryHistory:
        """Return the history for the next retry round, in which all homes are asked again.

        A retry round that ended at a busy shard is not counted, because a busy shard works. The timeout of the call
        limits how often busy shards are asked.
        """
        if self.is_busy:
            return replace(self, asked_shards=NO_SHARDS)
        stuck_since, num_rounds = min(self.stuck_since, now), self.num_rounds + 1
        return replace(self, asked_shards=NO_SHARDS, num_rounds=num_rounds, stuck_since=stuck_since)

    def pause_s(self, policy: CallPolicy) -> float:
        """Return the seconds to wait before the next retry round; the pause doubles with each counted retry round."""
        if self.is_busy:
            return policy.first_pause_s
        return min(policy.max_pause_s, policy.first_pause_s * 2.0 ** min(self.num_rounds, MAX_DOUBLINGS))


FRESH = RetryHistory()


class Delay(Enum):
    """A `Delay` says why picks need another attempt: the last attempt is late enough for a hedge, or even stalled."""

    LATE = "late"
    STALLED = "stalled"


@dataclass(eq=False, slots=True)
class Race:
    """A `Race` holds some picks and the attempts to compute the picks; the first complete attempt gives the sums."""

    picks: PickIds
    history: RetryHistory
    attempts: list[Attempt]
    check_at: float  # the time at which to check whether the last attempt is late
    may_hedge: bool = True
    is_reset: bool = False  # the stream of a silent shard has been reset for these picks
    is_over: bool = False

    @property
    def asked_shards(self) -> frozenset[str]:
        """Return the ids of the shards asked for the picks in this retry round, running attempts included."""
        return self.history.asked_shards | {
            request.shard_id for attempt in self.attempts for request in attempt.requests
        }

    def delay(self, now: float, policy: CallPolicy) -> Delay | None:
        """Return why the picks need another attempt now, or None if no attempt is needed; set `check_at`."""
        attempt = self.attempts[-1]
        if self.may_hedge and now < (late_at := attempt.late_at):
            self.check_at = late_at
            return None
        stalled_at = attempt.stalled_at
        is_stalled = now >= stalled_at
        self.check_at = now + policy.stall_s / 2 if is_stalled else stalled_at
        if len(self.attempts) >= policy.max_attempts or not (is_stalled or self.may_hedge):
            return None
        return Delay.STALLED if is_stalled else Delay.LATE

    def add(self, requests: list[ShardRequest], is_hedge: bool) -> None:
        """Add an attempt that consists of `requests`, which have just been sent."""
        attempt = Attempt(requests, len(requests), is_hedge)
        for request in requests:
            request.race, request.attempt = self, attempt
        self.attempts.append(attempt)
        self.may_hedge = True
        self.check_at = attempt.late_at

    def beaten_by(self, winner: Attempt) -> list[ShardRequest]:
        """Return the unanswered requests of the attempts that started before `winner`."""
        earlier = self.attempts[: self.attempts.index(winner)]
        return [request for attempt in earlier for request in attempt.requests if not request.is_answered]

    def shard_to_reset(self, now: float, policy: CallPolicy) -> ShardHealth | None:
        """Return a shard of the last attempt whose stream should be reset, or None; a race returns a shard only once.

        The shard has been silent for `reset_after` times the limit for a stalled shard. A reset may help, because the
        stream may be out of step although the shard is well.
        """
        if self.is_reset:
            return None
        for request in self.attempts[-1].requests:
            if now - request.silent_since >= policy.reset_after * request.stalled_after_s:
                self.is_reset = True
                return request.health
        return None


@dataclass(eq=False, slots=True)
class WaitingPicks:
    """`WaitingPicks` are picks that no home computes now; they are sent again at `resume_at`."""

    picks: PickIds
    history: RetryHistory
    resume_at: float
    since: float
