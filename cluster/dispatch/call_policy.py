"""The bounds of a layer's call to its shards, and what is counted of the calls made."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CallPolicy:
    """Bounds of one call and of what it may ask of a shard; times in seconds.

    timeout_s: for a call, not counting the time in which some picks had no live home.
    heal_timeout_s: how long picks may be without a home that computes them before the call fails.
    max_tries: of one message's picks that end in an error of the shard's, before the call fails.
    first_pause_s, max_pause_s: before homes that all refused are asked again; twice as long each time.
    stall_s, patience: a shard that says nothing for `stall_s`, and `patience` times as long as its work should take, is
        passed over where the picks have another home.
    doubt: where they have no other, its stream is opened anew after so many times as long, once.
    hedge_floor_s: sooner than that no shard is late, whatever its 95th percentile says.
    hedge_share, hedge_burst: messages sent to a second home because the first was late, as a share of all messages,
        and how many may be saved up.
    max_lanes: homes that may work on the same picks at a time.
    promote_s: a home that stands by may take so much longer, to bring experts to its device.
    far_slower: a shard that takes so many times as long as was predicted is given a rest.
    first_rest_s, max_rest_s: for which a shard that failed is not asked if there is another; twice as long each time.
    piece_bytes: of rows in one message.
    """

    timeout_s: float = 30.0
    heal_timeout_s: float = 30.0
    max_tries: int = 6
    first_pause_s: float = 0.01
    max_pause_s: float = 0.5
    stall_s: float = 0.5
    patience: float = 8.0
    doubt: float = 4.0
    hedge_floor_s: float = 0.03
    hedge_share: float = 0.03
    hedge_burst: float = 8.0
    max_lanes: int = 3
    promote_s: float = 5.0
    far_slower: float = 20.0
    first_rest_s: float = 0.25
    max_rest_s: float = 30.0
    piece_bytes: int = 512 << 10

    def __post_init__(self) -> None:
        assert 0 < self.hedge_floor_s <= self.stall_s <= self.timeout_s
        assert self.patience >= 0
        assert self.doubt >= 1
        assert self.max_tries > 0
        assert self.max_lanes > 0
        assert 0 < self.first_pause_s <= self.max_pause_s
        assert 0 < self.first_rest_s <= self.max_rest_s
        assert 0 <= self.hedge_share < 1
        assert self.heal_timeout_s >= 0
        assert self.promote_s >= 0
        assert self.far_slower > 1
        assert self.piece_bytes > 0

    def allowed_silence_s(self, predicted_s: float) -> float:
        """Grows with the work, but leaves most of the time to another home: the shard may be hung for all that."""
        return self.stall_s + min(self.patience * predicted_s, self.timeout_s / 4)


@dataclass
class Traffic:
    """What went over the wire since the start; message bytes without gRPC's framing."""

    num_calls: int = 0
    num_rows: int = 0
    num_picks: int = 0
    num_sent: int = 0
    num_rows_sent: int = 0  # a row that goes to two shards counts twice
    sent_bytes: int = 0
    num_received: int = 0
    received_bytes: int = 0
    num_lost: int = 0
    num_stalled: int = 0  # messages whose picks went to another home because nothing was heard
    num_hedged: int = 0  # messages sent to a second home because the first was late
    num_hedges_won: int = 0  # times that the second home answered first
    num_hedges_denied: int = 0  # because hedge_share was used up
    num_probes: int = 0  # messages to a shard that rests, to learn whether it works again
    num_corrupt: int = 0  # replies whose checksum was wrong
    num_heals: int = 0  # times that picks had to wait because no home would compute them
    queue_us: int = 0
    compute_us: int = 0
    refusals: dict[str, int] = field(default_factory=dict)  # by code
