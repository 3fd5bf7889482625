"""A `CallPolicy` sets the limits of layer calls, and `Traffic` counts what the calls sent and received."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CallPolicy:
    """A `CallPolicy` sets the timeouts and the limits of layer calls; every time is in seconds.

    timeout_s: a call fails after this time. The time in which some picks had no live home is not counted.
    heal_timeout_s: a call fails when some of its picks have had no live home for this time.
    max_tries: a call fails when shards have answered requests for the same picks with an error this many times.
    first_pause_s, max_pause_s: when all homes were asked in vain, the call waits for a pause and then asks all homes
        again. The pause starts at `first_pause_s` and doubles up to `max_pause_s`.
    stall_s, patience: a shard counts as stalled after a silence of `stall_s` plus `patience` times the predicted time
        of a request. The picks of the request then go to another home if there is one.
    reset_after: the client resets a shard's stream after a silence of `reset_after` times the limit for a stalled
        shard. The client does so only if the picks have no other home, and at most once for the same picks.
    hedge_floor_s: the shortest silence after which a request may be hedged, even if 95 % of the shard's replies come
        sooner.
    hedge_share, hedge_burst: each message that is not a hedge earns `hedge_share` hedge tokens, and a hedged message
        costs one hedge token. At most `hedge_burst` hedge tokens are saved up.
    max_attempts: the maximum number of attempts that may run for the same picks at the same time.
    promote_s: the additional time for a request whose shard is a standby and has to promote experts first.
    far_slower: the circuit of a shard opens if a reply takes longer than `hedge_floor_s` plus this many times the
        predicted time.
    first_rest_s, max_rest_s: how long a circuit stays open. The time starts at `first_rest_s` and doubles with each
        failure in a row, up to `max_rest_s`.
    piece_bytes: the maximum number of bytes that the rows of one message take.
    """

    timeout_s: float = 30.0
    heal_timeout_s: float = 30.0
    max_tries: int = 6
    first_pause_s: float = 0.01
    max_pause_s: float = 0.5
    stall_s: float = 0.5
    patience: float = 8.0
    reset_after: float = 4.0
    hedge_floor_s: float = 0.03
    hedge_share: float = 0.03
    hedge_burst: float = 8.0
    max_attempts: int = 3
    promote_s: float = 5.0
    far_slower: float = 20.0
    first_rest_s: float = 0.25
    max_rest_s: float = 30.0
    piece_bytes: int = 512 << 10

    def __post_init__(self) -> None:
        assert 0 < self.hedge_floor_s <= self.stall_s <= self.timeout_s
        assert self.patience >= 0
        assert self.reset_after >= 1
        assert self.max_tries > 0
        assert self.max_attempts > 0
        assert 0 < self.first_pause_s <= self.max_pause_s
        assert 0 < self.first_rest_s <= self.max_rest_s
        assert 0 <= self.hedge_share < 1
        assert self.heal_timeout_s >= 0
        assert self.promote_s >= 0
        assert self.far_slower > 1
        assert self.piece_bytes > 0

    def allowed_silence_s(self, predicted_s: float) -> float:
        """Return the seconds of silence after which a shard counts as stalled, for a predicted time of `predicted_s`.

        The limit grows with `predicted_s`, but by at most a quarter of `timeout_s`. So the call has time left to ask
        another home if the shard hangs.
        """
        return self.stall_s + min(self.patience * predicted_s, self.timeout_s / 4)


@dataclass
class Traffic:
    """`Traffic` counts a client's calls, messages and bytes since its start; the bytes exclude gRPC's framing."""

    num_calls: int = 0
    num_rows: int = 0
    num_picks: int = 0
    num_sent: int = 0
    num_rows_sent: int = 0  # a row that goes to two shards counts twice
    sent_bytes: int = 0
    num_received: int = 0
    received_bytes: int = 0
    num_lost: int = 0  # messages whose stream broke before the reply came
    num_stalled: int = 0  # messages sent to another home because the first home was stalled
    num_hedged: int = 0  # messages sent to another home because the first home was late
    num_hedges_won: int = 0  # hedges that were complete before the late attempt
    num_hedges_denied: int = 0  # hedges that were not sent because the hedge budget was used up
    num_probes: int = 0  # messages to a shard whose circuit is open, to learn whether the shard works again
    num_corrupt: int = 0  # replies whose checksum was wrong
    num_heals: int = 0  # how often picks had to wait, because no home could compute the picks
    queue_us: int = 0  # microseconds that requests waited at shards
    compute_us: int = 0  # microseconds that shards computed
    refusals: dict[str, int] = field(default_factory=dict)  # how often shards refused, by refusal code
