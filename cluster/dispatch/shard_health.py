"""What a client knows of one shard: whether it can be asked, how fast it is, when it is late.

Whatever a shard says is one sample among many: nothing that happens once moves a prediction far.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from cluster.dispatch.call_policy import CallPolicy
from cluster.topology import CostModel

NEW_SAMPLE = 0.2  # its weight in an average
MAX_STEP = 8.0  # one sample counts as at most so many times the average
LATE_UP, LATE_DOWN = 1.1, 1.1 ** -(0.05 / 0.95)  # balance where 5 % of the samples are above
SLOWNESS_HALF_LIFE_S = 10.0  # of what is known of a shard that is not asked
NO_BOUND = 1e9
MIN_COST_US = 1.0


class LinkState(StrEnum):
    """The connection to a shard; it is not known yet whether a new one comes up."""

    NEW = "new"
    UP = "up"
    DOWN = "down"


class Circuit(StrEnum):
    """Closed: asked like any other. Open: asked only where there is no other. Half open: one message finds out."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Work(NamedTuple):
    """What a message asks for: experts touched, rows, MiB of one expert."""

    num_experts: int
    num_rows: int
    mib: float


UNKNOWN_COST, SMALL_WORK = CostModel(), Work(1, 1, 1.0)


class ReplyTiming(NamedTuple):
    """What a reply says of itself."""

    queue_us: int = 0
    compute_us: int = 0
    queue_depth: int = 0


@dataclass(eq=False, slots=True)
class ShardHealth:
    """One incarnation of a shard. `link` may be set by any thread, the rest belongs to the one that calls."""

    shard_id: str
    policy: CallPolicy
    cost_model: CostModel = UNKNOWN_COST
    link: LinkState = LinkState.NEW
    is_draining: bool = False
    circuit: Circuit = Circuit.CLOSED
    num_failures: int = 0  # in a row
    rests_until: float = 0.0
    heard_at: float = 0.0
    free_at: float = 0.0  # when it should be done with all that it is known to have
    overhead_us: float = 500.0  # of a message and its reply, apart from waiting and computing
    slowness: float = 1.0  # time to compute over what `pace` says
    lateness: float = 0.0  # 95th percentile of time to answer over what was predicted; 0 before the first
    mean_us: float = 0.0  # to compute a message
    adopted_at: float = 0.0
    learn_at: float = 0.0
    num_learned: int = 0
    place: int = -1  # among the shards of the placement
    last_work: Work = SMALL_WORK

    @property
    def should_be_avoided(self) -> bool:
        """Not asked where there is another home."""
        return self.link is not LinkState.UP or self.circuit is not Circuit.CLOSED or self.is_draining

    def compute_us(self, work: Work) -> float:
        """How long it should compute."""
        num_experts, num_rows, mib = work
        pace = self.cost_model
        unit = pace.weight_us_per_mib * num_experts + pace.row_us_per_mib * num_rows
        return max(MIN_COST_US, self.slowness * (pace.call_us + mib * unit))

    def send(self, compute_us: float, now: float) -> float:
        """Takes note of a message; returns in how many seconds its answer should be here."""
        self.free_at = max(self.free_at, now) + 1e-6 * compute_us
        return self.free_at - now + 1e-6 * self.overhead_us

    def late_after_s(self, predicted_s: float) -> float:
        """How long it may be silent until its picks are sent to another home as well, if that may be."""
        policy = self.policy
        late_s = (self.lateness or policy.patience) * predicted_s
        return max(policy.hedge_floor_s, min(late_s, policy.allowed_silence_s(predicted_s)))

    def answer(self, work: Work, timing: ReplyTiming, took_s: float, predicted_s: float, now: float) -> None:
        """Learns from a reply."""
        self.heard_at, self.last_work = now, work
        queue_us, said_us, depth = timing
        took_us = 1e6 * took_s
        compute_us = min(said_us, took_us)  # whatever it says
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
        """It rests: it was late, or broke the connection; however many messages failed, for one rest at a time."""
        if self.circuit is Circuit.OPEN:
            return
        self.circuit = Circuit.OPEN
        rest_s = self.policy.first_rest_s * 2.0 ** min(self.num_failures, 32)
        self.rests_until = now + min(rest_s, self.policy.max_rest_s)
        self.num_failures += 1

    def succeed(self) -> None:
        self.circuit, self.num_failures = Circuit.CLOSED, 0

    def come_late(self) -> None:
        """It answered after another home had: the first time, that ends its rest."""
        if self.circuit is Circuit.OPEN and self.num_failures < 2:
            self.circuit = Circuit.CLOSED

    def adopt(self, pace: CostModel, now: float) -> None:
        """Takes a new pace without a jump in what is predicted; what is known of old fades away."""
        if not self.num_learned:  # what it says of itself is all that is known
            self.cost_model = pace
        elif pace != self.cost_model:
            before = self.compute_us(self.last_work)
            self.cost_model, self.slowness = pace, 1.0
            self.slowness = before / self.compute_us(self.last_work)
        if self.heard_at:
            silent_s = max(0.0, now - max(self.heard_at, self.adopted_at))
            self.slowness = 1.0 + (self.slowness - 1.0) * 0.5 ** (silent_s / SLOWNESS_HALF_LIFE_S)
        self.adopted_at = now


@dataclass(slots=True)
class HedgeBudget:
    """A token for each message that may be sent on suspicion; every other message adds `share` of one."""

    share: float
    burst: float
    tokens: float

    def earn(self, num_messages: int) -> None:
        self.tokens = min(self.burst, self.tokens + self.share * num_messages)

    def take(self, num_messages: int) -> bool:
        if self.tokens < num_messages:
            return False
        self.tokens -= num_messages
        return True
