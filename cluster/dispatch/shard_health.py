"""A `ShardHealth` tells a client whether a shard can be asked, how fast the shard is, and when a reply is late.

Each reply is one sample among many: no single reply moves a prediction far.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from cluster.dispatch.call_policy import CallPolicy
from cluster.topology import CostModel

NEW_SAMPLE = 0.2  # weight of a new sample in an average
MAX_STEP = 8.0  # a sample counts as at most this many times the average
LATE_UP, LATE_DOWN = 1.1, 1.1 ** -(0.05 / 0.95)  # the two factors balance if 5 % of the samples are late
SLOWNESS_HALF_LIFE_S = 10.0  # seconds without a reply in which half of a shard's measured slowness is forgotten
NO_BOUND = 1e9
MIN_COST_US = 1.0
MAX_DOUBLINGS = 32  # limit for doubling the time that a circuit stays open, so that the power of two stays finite


class LinkState(StrEnum):
    """A `LinkState` is the state of the connection to a shard; NEW means that no attempt to connect has ended yet."""

    NEW = "new"
    UP = "up"
    DOWN = "down"


class Circuit(StrEnum):
    """A `Circuit` says whether a shard is called.

    CLOSED: the shard is called like any other shard.
    OPEN: the shard is called only for picks that have no other home.
    HALF_OPEN: one request is on its way to find out whether the shard works again.
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Work(NamedTuple):
    """`Work` says how much one message asks a shard to compute."""

    num_experts: int  # number of distinct experts
    num_rows: int
    expert_mib: float  # size of one expert in MiB


UNKNOWN_COST, SMALL_WORK = CostModel(), Work(1, 1, 1.0)


class ReplyTiming(NamedTuple):
    """A `ReplyTiming` holds what a reply says: the waiting time, the computing time and the length of the queue."""

    queue_us: int = 0
    compute_us: int = 0
    queue_depth: int = 0


@dataclass(eq=False, slots=True)
class ShardHealth:
    """A `ShardHealth` is what a client knows about one incarnation of a shard.

    Any thread may set `link`. Only the calling thread may use the other fields and the methods.
    """

    shard_id: str
    policy: CallPolicy
    cost_model: CostModel = UNKNOWN_COST
    link: LinkState = LinkState.NEW
    is_draining: bool = False
    circuit: Circuit = Circuit.CLOSED
    num_failures: int = 0  # number of consecutive failures
    rests_until: float = 0.0  # the time from which an open circuit may be probed
    heard_at: float = 0.0  # the time of the last reply
    free_at: float = 0.0  # the time at which the shard should have finished all known work
    overhead_us: float = 500.0  # time of a message and its reply, without the time in the queue and the computing
    slowness: float = 1.0  # measured computing time / computing time that the cost model predicts
    lateness: float = 0.0  # 95th percentile of (reply time / predicted time); 0 before the first reply
    mean_us: float = 0.0  # mean computing time of a message
    adopted_at: float = 0.0
    learn_at: float = 0.0  # replies before this time do not update the predictions
    num_learned: int = 0
    shard_index: int = -1  # index among the shards of the placement; -1 outside the placement
    last_work: Work = SMALL_WORK

    @property
    def should_be_avoided(self) -> bool:
        """Return True if the shard is asked only for picks that have no other home."""
        return self.link is not LinkState.UP or self.circuit is not Circuit.CLOSED or self.is_draining

    def compute_us(self, work: Work) -> float:
        """Return the predicted time of computing `work` on the shard, in microseconds."""
        num_experts, num_rows, expert_mib = work
        cost_model = self.cost_model
        unit = cost_model.weight_us_per_mib * num_experts + cost_model.row_us_per_mib * num_rows
        return max(MIN_COST_US, self.slowness * (cost_model.call_us + expert_mib * unit))

    def note_sent(self, compute_us: float, now: float) -> float:
        """Note that a message was sent, and return the predicted seconds until its reply."""
        self.free_at = max(self.free_at, now) + 1e-6 * compute_us
        return self.free_at - now + 1e-6 * self.overhead_us

    def late_after_s(self, predicted_s: float) -> float:
        """Return the seconds of silence after which a request may be hedged."""
        policy = self.policy
        late_s = (self.lateness or policy.patience) * predicted_s
        return max(policy.hedge_floor_s, min(late_s, policy.allowed_silence_s(predicted_s)))

    def learn(self, work: Work, timing: ReplyTiming, took_s: float, predicted_s: float, now: float) -> None:
        """Update the predictions with a reply to `work` that took `took_s` seconds; `predicted_s` was predicted."""
        self.heard_at, self.last_work = now, work
        queue_us, reported_us, depth = timing
        took_us = 1e6 * took_s
        compute_us = min(reported_us, took_us)  # the shard cannot have computed for longer than the reply took
        self.num_learned += 1
        weight, step = (1 / self.num_learned, NO_BOUND) if self.num_learned < 4 else (NEW_SAMPLE, MAX_STEP)
        expected = self.compute_us(work) / self.slowness
        sample = min(max(compute_us, MIN_COST_US) / expected, step * self.slowness)
        self.slowness += weight * (sample - self.slowness)
        overhead = min(max(0.0, took_us - compute_us - queue_us), step * self.overhead_us)
        self.overhead_us += weight * (overhead - self.overhead_us)
        self.mean_us += weight * (min(compute_us, step * max(1.0, self.mean_us)) - self.mean_us)
        self.free_at = now + min(1e-6 * depth * self.mean_us, self.policy.stall_s)
        late = self.lateness or self.policy.patience
        self.lateness = max(1.0, late * (LATE_UP if took_s > late * predicted_s else LATE_DOWN))

    def is_far_slower(self, took_s: float, predicted_s: float) -> bool:
        return took_s > self.policy.hedge_floor_s + self.policy.far_slower * predicted_s

    def fail(self, now: float) -> None:
        """Open the circuit, because the shard was late or broke the connection.

        The circuit stays open longer with each failure in a row. While the circuit is open, further failures are not
        counted.
        """
        if self.circuit is Circuit.OPEN:
            return
        self.circuit = Circuit.OPEN
        rest_s = self.policy.first_rest_s * 2.0 ** min(self.num_failures, MAX_DOUBLINGS)
        self.rests_until = now + min(rest_s, self.policy.max_rest_s)
        self.num_failures += 1

    def succeed(self) -> None:
        """Close the circuit after a reply that was not late."""
        self.circuit, self.num_failures = Circuit.CLOSED, 0

    def note_late_reply(self) -> None:
        """Close an open circuit after a late reply, if the shard has failed fewer than two times in a row.

        A reply is late if another home has already computed the same picks.
        """
        if self.circuit is Circuit.OPEN and self.num_failures < 2:
            self.circuit = Circuit.CLOSED

    def adopt(self, cost_model: CostModel, now: float) -> None:
        """Adopt a newly published cost model without a jump in the predictions, and let old measurements fade."""
        if not self.num_learned:  # there are no measurements yet, so the published cost model is all that is known
            self.cost_model = cost_model
        elif cost_model != self.cost_model:
            before = self.compute_us(self.last_work)
            self.cost_model, self.slowness = cost_model, 1.0
            self.slowness = before / self.compute_us(self.last_work)
        if self.heard_at:
            silent_s = max(0.0, now - max(self.heard_at, self.adopted_at))
            self.slowness = 1.0 + (self.slowness - 1.0) * 0.5 ** (silent_s / SLOWNESS_HALF_LIFE_S)
        self.adopted_at = now


@dataclass(slots=True)
class HedgeBudget:
    """A `HedgeBudget` limits hedges: a hedged message costs one hedge token, and any other message earns `share`."""

    share: float
    burst: float  # maximum number of hedge tokens that can be saved up
    tokens: float

    def earn(self, num_messages: int) -> None:
        self.tokens = min(self.burst, self.tokens + self.share * num_messages)

    def take(self, num_messages: int) -> bool:
        """Take one hedge token for each message and return True; return False if there are too few hedge tokens."""
        if self.tokens < num_messages:
            return False
        self.tokens -= num_messages
        return True
