"""`RemoteExperts`: a layer's routed experts, computed by the shards that hold them.

What goes where, and what follows from what comes back, is decided by `cluster.dispatch.layer_call`; here are the messages, the
streams and the sums. All of it happens on the caller's thread.

Legend: N rows, L expert input dim, K picks a row, P = N·K picks; the picks of a row stand together.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.dispatch.call_policy import CallPolicy, Traffic
from cluster.dispatch.fleet_view import FleetView, ShardFleet
from cluster.dispatch.layer_call import LayerCall
from cluster.dispatch.layer_call import warm_up as warm_up_routing
from cluster.dispatch.shard_health import LinkState, ReplyTiming, ShardHealth
from cluster.dispatch.shard_request import RefusalCode, ShardRequest
from cluster.topology import Placement, Shard
from model.cpu.thread_pool import THREAD_POOL
from model.exact_sums import from_grid, grid_exponents
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.transport.checksum import REQUEST, checksum_of_reply, request_checksum
from services.expert.transport.dispatch_combine import combine, dispatch, warm_up
from services.expert.transport.shard_stream import Receiver, ShardStream
from services.expert.transport.wire import CORRUPT_REPLY, WIRE_DTYPES, rows_as_numpy, sums_from_proto

log = logging.getLogger(__name__)

Ints = NDArray[np.integer]
StreamKey = tuple[str, str, str]  # shard id, incarnation, endpoint


class ExpertsUnavailable(RuntimeError):
    """No live home computed some of the picks in time; the message says which and why."""


class RemoteExperts:
    """Implements `model.blocks.moe.Experts` over the shards of the last placement it was given; never asks Redis.

    Calls belong to one thread, several of which may be under way. `update` belongs to one thread, any one; calls under
    way go on, and what they have to send again follows the new placement. `expert_mib` is the size of one expert, by
    layer.
    """

    def __init__(self, policy: CallPolicy | None = None, expert_mib: Mapping[int, float] | None = None) -> None:
        self.policy = policy or CallPolicy()
        self._fleet = ShardFleet(self.policy, expert_mib)
        self._view: FleetView | None = None  # the newest, which the calling thread has yet to adopt
        self._streams: dict[StreamKey, ShardStream] = {}
        self._healths: dict[StreamKey, ShardHealth] = {}
        self._stream_of: dict[ShardHealth, ShardStream] = {}
        self._leaving: deque[tuple[float, ShardHealth, ShardStream]] = deque()
        self._receiver = Receiver()
        self._parts: dict[int, _Part] = {}  # by request id
        self._shares_cores = False  # with a shard on this machine: the caller's helpers sleep while the shards compute
        self._is_closed = False
        self._changes = itertools.count(1)
        self._last_change = 0
        warm_up()
        warm_up_routing()

    @property
    def traffic(self) -> Traffic:
        return self._fleet.traffic

    @property
    def circuits(self) -> dict[str, str]:
        """Of each shard of the placement: closed, open, or half-open."""
        return {id: circuit.value for id, circuit in self._fleet.circuits(time.monotonic()).items()}

    @property
    def epoch(self) -> int:
        """The epoch of the placement in use; 0 before the first `update`."""
        return self._view.placement.epoch if self._view else 0

    @property
    def down(self) -> frozenset[str]:
        """The shards of the placement that cannot be reached now."""
        view = self._view
        if view is None:
            return frozenset()
        return frozenset(
            id for id in view.shard_ids if (health := view.healths.get(id)) is None or health.link is LinkState.DOWN
        )

    def update(self, placement: Placement, shards: Iterable[Shard]) -> None:
        """Uses this placement for the calls that start from now on; opens and closes streams to match.

        A placement older than the one in use (from a Redis that lost its data) is passed over, its shards are not.
        """
        if self._view and placement.epoch < self.epoch:
            log.warning("Placement epoch %d is older than %d and is passed over.", placement.epoch, self.epoch)
            placement = self._view.placement
        known = {shard.id: shard for shard in shards}
        wanted = {id: _stream_key(known[id]) for id in placement.shard_ids if id in known}
        for key in wanted.values():
            if key not in self._streams:
                self._healths[key] = health = ShardHealth(key[0], self.policy, known[key[0]].cost_model)
                self._streams[key] = stream = ShardStream(key[2], self._receiver, partial(self._note_link, health))
                self._stream_of[health] = stream
        self._shares_cores = any(endpoint.startswith("127.") for _, _, endpoint in wanted.values())
        healths = {id: self._healths[key] for id, key in wanted.items()}
        paces = {id: known[id].cost_model for id in wanted}
        draining = [id for id, shard in known.items() if shard.draining]
        before, view = self._view, FleetView(placement, healths, paces, draining, self._view)
        self._view = view
        if before is None or not view.is_like(before):
            self._last_change = next(self._changes)
        self._close_later(self._streams.keys() - set(wanted.values()))
        self._receiver.wake()

    def _note_link(self, health: ShardHealth, link: LinkState) -> None:
        health.link = link
        self._fleet.is_changed = True
        self._last_change = next(self._changes)

    def _close_later(self, keys: set[StreamKey]) -> None:
        """Calls that started before may still wait for the streams that are no longer wanted."""
        for key in keys:
            leaving = (self._healths.pop(key), self._streams.pop(key))
            self._leaving.append((time.monotonic() + self.policy.timeout_s, *leaving))
        now = time.monotonic()
        while self._leaving and self._leaving[0][0] <= now:
            _, health, stream = self._leaving.popleft()
            del self._stream_of[health]
            stream.close()

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        """Sends the rows off and returns a function that waits for the weighted sums: fp32 (N, L).

        Both raise ExpertsUnavailable; ValueError on rows that are neither bf16 nor fp32.
        """
        assert self._view is not None, "update() must have given a placement before the first call"
        if self._shares_cores:
            THREAD_POOL.rest()
        try:
            return _ExpertCall(self, layer, x_NL, topk_ids_NK, topk_weights_NK).wait
        except BaseException:
            THREAD_POOL.resume()
            raise

    def close(self) -> None:
        """Closes every stream; calls under way fail."""
        self.give_up()
        streams = [*self._streams.values(), *(stream for _, _, stream in self._leaving)]
        for stream in streams:
            stream.close()
        for stream in streams:
            stream.join()
        self._receiver.close()

    def give_up(self) -> None:
        """Has calls under way, and all later ones, fail rather than wait for a home; may be called from any thread."""
        self._is_closed = True
        self._receiver.wake()

    # The calling thread

    def _adopt(self, now: float) -> None:
        view = self._view
        if view is not None and view is not self._fleet.view:
            self._fleet.adopt(view, now)

    def _post(self, ask: ShardRequest, part: _Part, message: bytes) -> None:
        self._parts[ask.id] = part
        stream = self._stream_of.get(ask.health)
        if stream is None:  # it has left since
            self._receiver.inbox.append((ask.id, None))
        else:
            stream.send(ask.id, message)

    def _reset_streams(self) -> None:
        for health in self._fleet.take_resets():
            if stream := self._stream_of.get(health):
                stream.reset()

    def _take(self, request_id: int, reply: pb.ComputeReply | None) -> None:
        now, part, fleet = time.monotonic(), self._parts.pop(request_id, None), self._fleet
        if reply is not None:
            traffic = fleet.traffic
            traffic.num_received += 1
            traffic.received_bytes += reply.ByteSize()
            traffic.queue_us += reply.queue_us
            traffic.compute_us += reply.compute_us
        if part is None:  # its call is over
            self._take_late(request_id, reply, now)
        elif reply is None:
            part.call.take_loss(request_id, now)
        elif reply.HasField("sums"):
            part.call.take_sums(part, reply, now)
        else:
            part.call.take_refusal(reply, now)

    def _take_late(self, request_id: int, reply: pb.ComputeReply | None, now: float) -> None:
        if reply is None:
            self._fleet.note_failed(request_id, now)
        elif checksum_of_reply(reply) != reply.checksum:
            self._fleet.traffic.num_corrupt += 1
            self._fleet.note_failed(request_id, now)
        else:
            timing = ReplyTiming(reply.queue_us, reply.compute_us, reply.queue_depth)
            self._fleet.note_reply(request_id, timing if reply.HasField("sums") else None, now)


def _stream_key(shard: Shard) -> StreamKey:
    return shard.id, shard.incarnation, shard.compute_endpoint or shard.endpoint


class _Part(NamedTuple):
    """One request under way, and to which rows its sums belong."""

    call: _ExpertCall
    rows: NDArray[np.int64]


class _ExpertCall:
    """One layer's rows on their way through the shards and back."""

    def __init__(self, owner: RemoteExperts, layer: int, x_NL: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> None:
        now = time.monotonic()
        owner._adopt(now)
        self.owner, self.fleet, self.layer = owner, owner._fleet, layer
        assert self.fleet.view is not None
        self.view = self.fleet.view
        self.placement = self.view.placement
        self.device, self.wire_dtype = x_NL.device, WIRE_DTYPES.get(x_NL.dtype)
        self.x_NL = rows_as_numpy(x_NL)
        self.top_k = ids_NK.shape[1]
        self.expert_P = ids_NK.cpu().numpy().reshape(-1)
        self.weight_P = weights_NK.float().cpu().numpy().reshape(-1)
        self.grid_N = grid_exponents(x_NL, weights_NK, self.placement.gains[layer]).cpu().numpy()
        self.sums_NL = np.zeros(x_NL.shape, dtype=np.int64)
        traffic = self.fleet.traffic
        traffic.num_calls += 1
        traffic.num_rows += x_NL.shape[0]
        traffic.num_picks += len(self.expert_P)
        max_rows = max(1, owner.policy.piece_bytes // (x_NL.shape[1] * x_NL.itemsize))
        self.routing = LayerCall(self.fleet, layer, self.expert_P, self.top_k, max_rows, now)
        self.held: dict[int, tuple[NDArray[np.int64], Ints]] = {}  # sums that do not count yet
        self.last_change = owner._last_change
        self.send(self.routing.start(now))
        if self.fleet.has_resets:
            owner._reset_streams()

    def send(self, asks: Sequence[ShardRequest]) -> None:
        if not asks:
            return
        traffic = self.fleet.traffic
        picks = [ask.picks for ask in asks]
        pick_Q = picks[0] if len(picks) == 1 else np.concatenate(picks)
        firsts = [0]
        for own in picks:
            firsts.append(firsts[-1] + len(own))
        whole = (self.x_NL, self.grid_N, self.expert_P, self.weight_P)
        parts = dispatch(*whole, pick_Q, np.array(firsts), self.top_k)
        first_rows = parts.first_row_M.tolist()
        assert self.fleet.view is not None
        epoch = self.fleet.view.placement.epoch
        for m, ask in enumerate(asks):
            rows, own_Q = slice(first_rows[m], first_rows[m + 1]), slice(firsts[m], firsts[m + 1])
            picked = (parts.local_Q[own_Q].tobytes(), parts.expert_Q[own_Q].tobytes(), parts.weight_Q[own_Q].tobytes())
            message = self._message(ask, epoch, parts.x_RL[rows].tobytes(), parts.grid_R[rows].tobytes(), picked)
            traffic.num_sent += 1
            traffic.num_rows_sent += ask.work.num_rows
            traffic.sent_bytes += len(message)
            self.owner._post(ask, _Part(self, parts.row_R[rows]), message)

    def _message(
        self, ask: ShardRequest, epoch: int, rows: bytes, grid: bytes, picked: tuple[bytes, bytes, bytes]
    ) -> bytes:
        timeout_us = max(1, int((self.routing.expires_at - ask.sent_at) * 1e6))
        num_rows = ask.work.num_rows
        head = REQUEST.pack(ask.id, self.layer, epoch, num_rows, self.wire_dtype, timeout_us)
        pick_rows, pick_experts, pick_weights = picked
        return pb.ComputeRequest(
            id=ask.id,
            layer=self.layer,
            epoch=epoch,
            num_rows=num_rows,
            dtype=self.wire_dtype,
            rows=rows,
            grid=grid,
            pick_rows=pick_rows,
            pick_experts=pick_experts,
            pick_weights=pick_weights,
            timeout_us=timeout_us,
            checksum=request_checksum(head, rows, grid, *picked),
        ).SerializeToString()

    def wait(self) -> Tensor:
        """The weighted sums, fp32 (N, L); raises ExpertsUnavailable."""
        routing, inbox = self.routing, self.owner._receiver.inbox
        try:
            while not routing.is_done:
                if inbox:
                    self.owner._take(*inbox.popleft())
                else:
                    self._wait_for_more()
        finally:
            THREAD_POOL.resume()
            for ask in routing.in_flight:
                self.owner._parts.pop(ask.id, None)
        if routing.failure is not None:
            raise ExpertsUnavailable(routing.failure)
        return from_grid(torch.from_numpy(self.sums_NL), torch.from_numpy(self.grid_N)).to(self.device)

    def _wait_for_more(self) -> None:
        """Reads what has come, before anything is called late."""
        owner, routing = self.owner, self.routing
        if self.fleet.to_learn:
            self.fleet.learn()
        owner._receiver.receive(max(0.0, routing.wake_at - time.monotonic()))
        if owner._receiver.inbox:
            return
        now = time.monotonic()
        if owner._last_change != self.last_change:
            self.last_change = owner._last_change
            owner._adopt(now)
            self.send(routing.on_change(now))
        elif now >= routing.wake_at:
            self.send(routing.on_tick(now))
            if self.fleet.has_resets:
                owner._reset_streams()
        if routing.waiting and owner._is_closed:
            routing.failure = f"Layer {self.layer} is not waited for: this backbone stops."

    def take_loss(self, request_id: int, now: float) -> None:
        self.send(self.routing.on_lost(request_id, now))

    def take_sums(self, part: _Part, reply: pb.ComputeReply, now: float) -> None:
        try:
            sums = sums_from_proto(reply, len(part.rows), self.x_NL.shape[1])
        except ValueError as error:
            self.send(self.routing.on_corrupt(reply.id, str(error), now))
            return
        timing = ReplyTiming(reply.queue_us, reply.compute_us, reply.queue_depth)
        counting = self.routing.on_reply(reply.id, timing, now)
        if len(counting) != 1:
            self.held[reply.id] = (part.rows, sums)
            for request_id in counting:
                rows, of_one = self.held.pop(request_id)
                combine(of_one, rows, self.sums_NL)
        else:
            combine(sums, part.rows, self.sums_NL)

    def take_refusal(self, reply: pb.ComputeReply, now: float) -> None:
        if checksum_of_reply(reply) != reply.checksum:
            self.send(self.routing.on_corrupt(reply.id, CORRUPT_REPLY, now))
            return
        name = pb.Refusal.Code.Name(reply.refusal.code) if reply.refusal.code in pb.Refusal.Code.values() else ""
        code = RefusalCode.__members__.get(name, RefusalCode.FAILED)
        self.send(self.routing.on_refusal(reply.id, code, reply.refusal.detail, now))
