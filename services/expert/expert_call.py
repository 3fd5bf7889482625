"""An `ExpertCall` sends the rows of one layer call to the shards and adds up the sums that come back.

`cluster.dispatch.layer_call` decides which picks go to which shard and how to react to each outcome. An `ExpertCall`
makes the messages and adds up the sums, all on the calling thread.

Legend: N rows, L expert input dim, K picks per row, P = N·K picks (the picks of a row stand together), Q picks that are
sent now, M messages, R rows of all messages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.dispatch.fleet_view import ShardFleet
from cluster.dispatch.layer_call import LayerCall
from cluster.dispatch.shard_health import ReplyTiming
from cluster.dispatch.shard_request import RefusalCode, ShardRequest
from model.cpu.thread_pool import THREAD_POOL
from model.exact_sums import from_grid, grid_exponents
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.in_flight import InFlightTable, RowIds
from services.expert.transport.checksum import checksum_of_reply
from services.expert.transport.dispatch_combine import combine, dispatch
from services.expert.transport.shard_connections import ShardConnections
from services.expert.transport.wire import CORRUPT_REPLY, WIRE_DTYPES, encode_request, rows_as_numpy, sums_from_proto


class ExpertsUnavailable(RuntimeError):
    """An `ExpertsUnavailable` error says which picks of a layer call were not computed, and why."""


class ExpertCall:
    """An `ExpertCall` makes the shards compute the routed experts of one layer for the rows of one layer call.

    The constructor sends the first requests, and `wait` returns the sums.
    """

    def __init__(
        self,
        fleet: ShardFleet,
        connections: ShardConnections,
        in_flight: InFlightTable,
        layer: int,
        x_NL: Tensor,
        topk_ids_NK: Tensor,
        topk_weights_NK: Tensor,
    ) -> None:
        now = time.monotonic()
        connections.adopt_newest(now)
        assert fleet.view is not None, "update() must have given a placement before the first call"
        self._fleet, self._connections, self._in_flight, self._layer = fleet, connections, in_flight, layer
        self._x_NL = rows_as_numpy(x_NL)
        self._device, self._wire_dtype = x_NL.device, WIRE_DTYPES[x_NL.dtype]
        self._top_k = topk_ids_NK.shape[1]
        self._expert_P = topk_ids_NK.cpu().numpy().reshape(-1)
        self._weight_P = topk_weights_NK.float().cpu().numpy().reshape(-1)
        self._grid_N = grid_exponents(x_NL, topk_weights_NK, fleet.view.placement.gains[layer]).cpu().numpy()
        self._sums_NL = np.zeros(x_NL.shape, dtype=np.int64)
        traffic = fleet.traffic
        traffic.num_calls += 1
        traffic.num_rows += x_NL.shape[0]
        traffic.num_picks += len(self._expert_P)
        max_rows = max(1, fleet.policy.piece_bytes // (x_NL.shape[1] * x_NL.itemsize))
        self._layer_call = LayerCall(fleet, layer, self._expert_P, self._top_k, max_rows, now)
        # Rows and sums of the requests whose attempt is not complete yet, by request id.
        self._held: dict[int, tuple[RowIds, NDArray[np.integer]]] = {}
        self._last_change = connections.last_change
        self._send(self._layer_call.start(now))
        if fleet.has_resets:
            connections.reset_streams()

    def wait(self) -> Tensor:
        """Return the weighted sums, fp32 (N, L); raise ExpertsUnavailable if some picks were not computed."""
        layer_call, in_flight = self._layer_call, self._in_flight
        try:
            while not layer_call.is_done:
                if not in_flight.deliver_next():
                    self._wait_for_outcomes()
        finally:
            THREAD_POOL.resume()
            in_flight.forget(layer_call.in_flight)
        if layer_call.failure is not None:
            raise ExpertsUnavailable(layer_call.failure)
        return from_grid(torch.from_numpy(self._sums_NL), torch.from_numpy(self._grid_N)).to(self._device)

    def _wait_for_outcomes(self) -> None:
        """Wait until an outcome arrives, the fleet changes, or `wake_at` is reached, and let the layer call react.

        Outcomes that have arrived are delivered before any request counts as late.
        """
        layer_call, connections = self._layer_call, self._connections
        if self._fleet.to_learn:
            self._fleet.learn()
        if self._in_flight.receive(max(0.0, layer_call.wake_at - time.monotonic())):
            return
        now = time.monotonic()
        if connections.last_change != self._last_change:
            self._last_change = connections.last_change
            connections.adopt_newest(now)
            self._send(layer_call.on_change(now))
        elif now >= layer_call.wake_at:
            self._send(layer_call.on_tick(now))
            if self._fleet.has_resets:
                connections.reset_streams()
        if connections.is_given_up:
            layer_call.stop_waiting()

    def _send(self, requests: Sequence[ShardRequest]) -> None:
        """Send each request in a separate message."""
        if not requests:
            return
        picks = [request.picks for request in requests]
        pick_Q = picks[0] if len(picks) == 1 else np.concatenate(picks)
        firsts = [0]
        for picks_of_one in picks:
            firsts.append(firsts[-1] + len(picks_of_one))
        call_arrays = (self._x_NL, self._grid_N, self._expert_P, self._weight_P)
        parts = dispatch(*call_arrays, pick_Q, np.array(firsts), self._top_k)
        first_rows = parts.first_row_M.tolist()
        assert self._fleet.view is not None
        epoch, expires_at = self._fleet.view.placement.epoch, self._layer_call.expires_at
        layer, wire_dtype, in_flight, take = self._layer, self._wire_dtype, self._in_flight, self._take
        for m, request in enumerate(requests):
            rows, own_Q = slice(first_rows[m], first_rows[m + 1]), slice(firsts[m], firsts[m + 1])
            picked = (parts.local_Q[own_Q].tobytes(), parts.expert_Q[own_Q].tobytes(), parts.weight_Q[own_Q].tobytes())
            timeout_us = max(1, int((expires_at - request.sent_at) * 1e6))
            numbers = (request.id, layer, epoch, request.work.num_rows, wire_dtype, timeout_us)
            message = encode_request(numbers, parts.x_RL[rows].tobytes(), parts.grid_R[rows].tobytes(), picked)
            in_flight.send(request, message, parts.row_R[rows], take)

    def _take(self, request_id: int, rows: RowIds, reply: pb.ComputeReply | None, now: float) -> None:
        """Handle the outcome of a request: `reply` is sums or a refusal, or None if the stream was lost."""
        if reply is None:
            self._send(self._layer_call.on_lost(request_id, now))
        elif reply.HasField("sums"):
            self._take_sums(rows, reply, now)
        else:
            self._take_refusal(reply, now)

    def _take_sums(self, rows: RowIds, reply: pb.ComputeReply, now: float) -> None:
        try:
            sums = sums_from_proto(reply, len(rows), self._x_NL.shape[1])
        except ValueError as error:
            self._send(self._layer_call.on_corrupt(reply.id, str(error), now))
            return
        timing = ReplyTiming(reply.queue_us, reply.compute_us, reply.queue_depth)
        counting = self._layer_call.on_reply(reply.id, timing, now)
        if len(counting) != 1:
            self._held[reply.id] = (rows, sums)
            for request_id in counting:
                held_rows, held_sums = self._held.pop(request_id)
                combine(held_sums, held_rows, self._sums_NL)
        else:
            combine(sums, rows, self._sums_NL)

    def _take_refusal(self, reply: pb.ComputeReply, now: float) -> None:
        if checksum_of_reply(reply) != reply.checksum:
            self._send(self._layer_call.on_corrupt(reply.id, CORRUPT_REPLY, now))
            return
        name = pb.Refusal.Code.Name(reply.refusal.code) if reply.refusal.code in pb.Refusal.Code.values() else ""
        code = RefusalCode.__members__.get(name, RefusalCode.FAILED)
        self._send(self._layer_call.on_refusal(reply.id, code, reply.refusal.detail, now))
