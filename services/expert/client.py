"""`RemoteExperts`: a layer's routed experts, computed by the shards that hold them.

One call sends every shard one message (or several pieces), adds the int64 sums that come back, and sends what was
refused or lost to another home. All of it happens on the caller's thread.

Legend: N rows, L expert input dim, K picks a row, P = N·K picks; the picks of a row stand together.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.routing import HomeTable, NoLiveHome, choose_homes
from cluster.topology import Placement, Shard
from model.cpu.team import TEAM
from model.exact import from_grid, grid_exponents
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.dispatch import Dispatch, combine, dispatch, warm_up
from services.expert.stream import Inbox, Receiver, ShardStream
from services.expert.wire import PIECE_BYTES, WIRE_DTYPES, rows_as_numpy, sums_from_proto

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
StreamKey = tuple[str, str, str]  # shard id, incarnation, endpoint
FIRST_PAUSE_S = 0.01  # before homes are asked a second time; three times as long before each time after


class ExpertsUnavailable(RuntimeError):
    """No live home computed some of the picks in time; the message says which and why."""


@dataclass(frozen=True)
class CallPolicy:
    """Bounds of one call: seconds for all of it, tries for each of its picks, bytes of rows in one message.

    A shard that owes an answer and says nothing for `stall_s`, and `patience` times as long as its work should take, is
    passed over where the picks have another home.
    """

    timeout_s: float = 30.0
    stall_s: float = 0.5
    patience: float = 8.0
    max_tries: int = 6
    piece_bytes: int = PIECE_BYTES

    def __post_init__(self) -> None:
        assert 0 < self.stall_s <= self.timeout_s
        assert self.patience >= 0
        assert self.max_tries > 0
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
    num_stalled: int = 0
    queue_us: int = 0
    compute_us: int = 0
    refusals: dict[str, int] = field(default_factory=dict)  # by code


@dataclass(frozen=True)
class _Fleet:
    """A placement and the streams to its shards; replaced as a whole."""

    placement: Placement
    tables: Mapping[int, HomeTable]
    streams: Mapping[str, ShardStream]
    draining: frozenset[str]
    shares_cores: bool  # with a shard on this machine: then the caller's helpers sleep while the shards compute

    def down(self, table: HomeTable) -> set[str]:
        """The homes that cannot be asked."""
        streams = self.streams
        return {id for id in table.shard_ids if id not in streams or streams[id].is_down}

    def avoided(self, table: HomeTable) -> set[str]:
        """The homes that should not be asked if there are others."""
        now, streams = time.monotonic(), self.streams
        return {
            id
            for id in table.shard_ids
            if id in self.draining or id not in streams or streams[id].should_be_avoided(now)
        }


class RemoteExperts:
    """Implements `model.moe.Experts` over the shards of the last placement it was given; never asks Redis.

    Calls belong to one thread, several of which may be under way. `update` belongs to one thread, any one; calls under
    way go on, and what they have to send again follows the new placement.
    """

    def __init__(self, policy: CallPolicy | None = None) -> None:
        self.policy = policy or CallPolicy()
        self.traffic = Traffic()
        self._fleet: _Fleet | None = None
        self._streams: dict[StreamKey, ShardStream] = {}
        self._leaving: deque[tuple[float, ShardStream]] = deque()
        self._receiver = Receiver()
        self._ids = itertools.count(1)
        warm_up()

    @property
    def epoch(self) -> int:
        """The epoch of the placement in use; 0 before the first `update`."""
        return self._fleet.placement.epoch if self._fleet else 0

    @property
    def down(self) -> frozenset[str]:
        """The shards of the placement that cannot be reached now."""
        fleet = self._fleet
        return frozenset(id for t in fleet.tables.values() for id in fleet.down(t)) if fleet else frozenset()

    def update(self, placement: Placement, shards: Iterable[Shard]) -> None:
        """Uses this placement for the calls that start from now on; opens and closes streams to match.

        A placement older than the one in use (from a Redis that lost its data) is passed over, its shards are not.
        """
        if self._fleet and placement.epoch < self.epoch:
            log.warning("Placement epoch %d is older than %d and is passed over.", placement.epoch, self.epoch)
            placement = self._fleet.placement
        known = {shard.id: shard for shard in shards}
        wanted = {_stream_key(known[id]) for id in placement.shard_ids if id in known}
        for key in wanted - self._streams.keys():
            self._streams[key] = ShardStream(key[2], self._receiver)
        streams = {key[0]: self._streams[key] for key in wanted}
        draining = frozenset(id for id, shard in known.items() if shard.draining)
        shares_cores = any(endpoint.startswith("127.") for _, _, endpoint in wanted)
        self._fleet = _Fleet(placement, self._tables(placement), streams, draining, shares_cores)
        self._close_later(self._streams.keys() - wanted)

    def _tables(self, placement: Placement) -> Mapping[int, HomeTable]:
        known = self._fleet.placement.homes if self._fleet else None
        if self._fleet and (placement.homes is known or placement.homes == known):
            return self._fleet.tables
        return {layer: HomeTable(homes) for layer, homes in placement.homes.items()}

    def _close_later(self, keys: set[StreamKey]) -> None:
        """Calls that started before may still wait for the streams that are no longer wanted."""
        for key in keys:
            stream = self._streams.pop(key)
            self._leaving.append((time.monotonic() + self.policy.timeout_s, stream))
        now = time.monotonic()
        while self._leaving and self._leaving[0][0] <= now:
            self._leaving.popleft()[1].close()

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        """Sends the rows off and returns a function that waits for the weighted sums: fp32 (N, L).

        Both raise ExpertsUnavailable; ValueError on rows that are neither bf16 nor fp32.
        """
        assert self._fleet is not None, "update() must have given a placement before the first call"
        if self._fleet.shares_cores:
            TEAM.rest()
        try:
            call = _Call(self, self._fleet, layer, x_NL, topk_ids_NK, topk_weights_NK)
            call.send(np.arange(topk_ids_NK.numel()), frozenset(), 1)
        except BaseException:
            TEAM.resume()
            raise
        return call.wait

    def close(self) -> None:
        """Closes every stream; calls under way fail."""
        streams = [*self._streams.values(), *(stream for _, stream in self._leaving)]
        for stream in streams:
            stream.close()
        for stream in streams:
            stream.join()
        self._receiver.close()


def _stream_key(shard: Shard) -> StreamKey:
    return shard.id, shard.incarnation, shard.compute_endpoint or shard.endpoint


@dataclass(frozen=True, slots=True)
class _Part:
    """One request under way: which picks it carries, and to which rows its sums belong."""

    shard_id: str
    stream: ShardStream
    picks: Ints
    rows: Ints
    passed: frozenset[str]  # shards that were asked for these picks before
    num_tries: int
    sent_at: float


class _Call:
    """One layer's rows on their way through the shards and back."""

    def __init__(
        self, owner: RemoteExperts, fleet: _Fleet, layer: int, x_NL: Tensor, ids_NK: Tensor, weights_NK: Tensor
    ) -> None:
        self.owner, self.fleet, self.layer = owner, fleet, layer
        self.table = fleet.tables[layer]
        self.device, self.dtype = x_NL.device, x_NL.dtype
        self.x_NL = rows_as_numpy(x_NL)
        self.top_k = ids_NK.shape[1]
        self.expert_P = ids_NK.cpu().numpy().reshape(-1)
        self.weight_P = weights_NK.float().cpu().numpy().reshape(-1)
        self.grid_N = grid_exponents(x_NL, weights_NK, fleet.placement.gains[layer]).cpu().numpy()
        self.sums_NL = np.zeros(x_NL.shape, dtype=np.int64)
        self.inbox: Inbox = deque()
        self.parts: dict[int, _Part] = {}
        self.expires_at = time.monotonic() + owner.policy.timeout_s
        owner.traffic.num_calls += 1
        owner.traffic.num_rows += x_NL.shape[0]
        owner.traffic.num_picks += len(self.expert_P)

    def send(self, picks: Ints, passed: frozenset[str], num_tries: int) -> None:
        """Sends picks to homes that were not asked for them yet, or where there are none, to any."""
        if not len(picks):
            return
        try:
            self._send(picks, self.fleet.avoided(self.table) | passed, passed, num_tries)
        except NoLiveHome as none_left:
            is_stuck = np.isin(self.expert_P[picks], none_left.experts)
            self.send(picks[~is_stuck], passed, num_tries)
            self._send_to_any(picks[is_stuck], num_tries)

    def _send_to_any(self, picks: Ints, num_tries: int) -> None:
        for num in range(num_tries, self.owner.policy.max_tries + 1):
            if num > 1:
                time.sleep(FIRST_PAUSE_S * 3 ** (num - 2))
                self._follow_placement()
            try:
                return self._send(picks, self.fleet.down(self.table), frozenset(), num)
            except NoLiveHome as none_left:
                reason = str(none_left)
        raise ExpertsUnavailable(f"Layer {self.layer} cannot be computed: {reason}")

    def _follow_placement(self) -> None:
        assert self.owner._fleet is not None
        self.fleet = self.owner._fleet
        self.table = self.fleet.tables[self.layer]

    def _send(self, picks: Ints, excluded: set[str] | frozenset[str], passed: frozenset[str], num_tries: int) -> None:
        depths = {id: stream.queue_depth for id, stream in self.fleet.streams.items()}
        home_P = choose_homes(self.expert_P[picks], self.table, depths, excluded)
        whole = (self.x_NL, self.grid_N, self.expert_P, self.weight_P)
        parts = dispatch(*whole, picks, home_P, self.top_k, len(self.table.shard_ids))
        max_rows = max(1, self.owner.policy.piece_bytes // self.x_NL[0].nbytes)
        starts, ends = parts.first_row_S.tolist(), parts.first_row_S[1:].tolist()
        for shard, (start, end) in enumerate(zip(starts, ends, strict=False)):
            for first in range(start, end, max_rows):
                rows = slice(first, min(first + max_rows, end))
                own = parts.picks_of(shard, rows)
                self._send_piece(self.table.shard_ids[shard], parts, rows, own, passed, num_tries)

    def _send_piece(
        self, shard_id: str, parts: Dispatch, rows: slice, picks: slice, passed: frozenset[str], num_tries: int
    ) -> None:
        now, request_id = time.monotonic(), next(self.owner._ids)
        local_Q = parts.local_Q[picks]
        message = pb.ComputeRequest(
            id=request_id,
            layer=self.layer,
            epoch=self.fleet.placement.epoch,
            num_rows=rows.stop - rows.start,
            dtype=WIRE_DTYPES[self.dtype],
            rows=parts.x_ML[rows].tobytes(),
            grid=parts.grid_M[rows].tobytes(),
            pick_rows=(local_Q if local_Q[0] == 0 else local_Q - local_Q[0]).tobytes(),
            pick_experts=parts.expert_Q[picks].tobytes(),
            pick_weights=parts.weight_Q[picks].tobytes(),
            timeout_us=max(1, round((self.expires_at - now) * 1e6)),
        ).SerializeToString()
        traffic, stream = self.owner.traffic, self.fleet.streams[shard_id]
        traffic.num_sent += 1
        traffic.num_rows_sent += rows.stop - rows.start
        traffic.sent_bytes += len(message)
        own = (parts.pick_Q[picks], parts.row_M[rows])
        self.parts[request_id] = _Part(shard_id, stream, *own, passed, num_tries, now)
        stream.send(request_id, rows.stop - rows.start, message, self.inbox)

    def wait(self) -> Tensor:
        """The weighted sums, fp32 (N, L); raises ExpertsUnavailable."""
        try:
            while self.parts:
                self._take_one()
        finally:
            TEAM.resume()
            for request_id, part in self.parts.items():
                part.stream.forget(request_id)
        return from_grid(torch.from_numpy(self.sums_NL), torch.from_numpy(self.grid_N)).to(self.device)

    def _take_one(self) -> None:
        remaining = self.expires_at - time.monotonic()
        if remaining <= 0:
            waiting = sorted({part.shard_id for part in self.parts.values()})
            raise ExpertsUnavailable(
                f"Layer {self.layer} was not computed within timeout_s = {self.owner.policy.timeout_s}: "
                f"the shards {waiting} still owe an answer."
            )
        if not self.inbox and not self.owner._receiver.receive(min(remaining, self.owner.policy.stall_s / 2)):
            self._pass_over_stalled()
        if self.inbox:
            request_id, reply = self.inbox.popleft()
            part = self.parts.pop(request_id, None)
            if part is not None:  # else it was sent elsewhere meanwhile
                self._take(part, reply)

    def _take(self, part: _Part, reply: pb.ComputeReply | None) -> None:
        traffic = self.owner.traffic
        if reply is None:
            traffic.num_lost += 1
            self._retry(part, "the stream was lost")
            return
        traffic.num_received += 1
        traffic.received_bytes += reply.ByteSize()
        traffic.queue_us += reply.queue_us
        traffic.compute_us += reply.compute_us
        if reply.HasField("sums"):
            self._add(part, reply.sums)
        else:
            self._take_refusal(part, reply.refusal)

    def _add(self, part: _Part, sums: pb.Sums) -> None:
        try:
            combine(sums_from_proto(sums, len(part.rows), self.x_NL.shape[1]), part.rows, self.sums_NL)
        except ValueError as error:
            self._retry(part, str(error))

    def _take_refusal(self, part: _Part, refusal: pb.Refusal) -> None:
        refusals, code = self.owner.traffic.refusals, pb.Refusal.Code.Name(refusal.code)
        refusals[code] = refusals.get(code, 0) + 1
        if refusal.code == pb.Refusal.BAD_SHAPE:
            raise ExpertsUnavailable(f"Shard {part.shard_id} does not serve this model: {refusal.detail}")
        if refusal.code == pb.Refusal.OVERLOADED:  # it works, so this is no try that failed; the deadline is the bound
            time.sleep(FIRST_PAUSE_S)
            part = replace(part, num_tries=part.num_tries - 1)
        self._retry(part, refusal.detail)

    def _retry(self, part: _Part, reason: str) -> None:
        if part.num_tries >= self.owner.policy.max_tries:
            raise ExpertsUnavailable(
                f"Picks of layer {self.layer} were not computed in max_tries = {part.num_tries} tries; "
                f"shard {part.shard_id} last said: {reason}"
            )
        self._follow_placement()
        self.send(part.picks, part.passed | {part.shard_id}, part.num_tries + 1)

    def _pass_over_stalled(self) -> None:
        """Sends the picks of shards that say nothing to another home; without one there is nothing but to wait."""
        now = time.monotonic()
        stalled = [(id, part) for id, part in self.parts.items() if self._is_stalled(part, now)]
        for stream in {part.stream for _, part in stalled}:
            stream.rest(now)
        for request_id, part in stalled:
            passed = part.passed | {part.shard_id}
            try:
                self._send(part.picks, self.fleet.avoided(self.table) | passed, passed, part.num_tries + 1)
            except NoLiveHome:
                continue
            self.owner.traffic.num_stalled += 1
            del self.parts[request_id]
            part.stream.forget(request_id)

    def _is_stalled(self, part: _Part, now: float) -> bool:
        silent_s = now - max(part.sent_at, part.stream.heard_at)
        return silent_s > self.owner.policy.allowed_silence_s(part.stream.predicted_s)
