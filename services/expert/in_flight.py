"""The `InFlightTable` of a client sends the requests of all calls and knows which call takes which reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.dispatch.fleet_view import ShardFleet
from cluster.dispatch.shard_health import ReplyTiming
from cluster.dispatch.shard_request import ShardRequest
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.transport.checksum import checksum_of_reply
from services.expert.transport.shard_connections import ShardConnections
from services.expert.transport.shard_stream import Receiver

RowIds = NDArray[np.int64]
TakeOutcome = Callable[[int, RowIds, pb.ComputeReply | None, float], None]


class InFlightRequest(NamedTuple):
    """An `InFlightRequest` says to which rows of a call the sums of a request belong, and who takes the outcome.

    `take` gets the request id, the rows, the reply and the time. The reply is None if the stream was lost.
    """

    rows: RowIds
    take: TakeOutcome


class InFlightTable:
    """An `InFlightTable` sends the requests of all calls and hands each outcome to the right call.

    The table belongs to the calling thread. While the thread waits for one call, outcomes are handed to all calls of
    the thread.
    """

    def __init__(self, fleet: ShardFleet, connections: ShardConnections, receiver: Receiver) -> None:
        self._fleet, self._connections, self._receiver = fleet, connections, receiver
        self._requests: dict[int, InFlightRequest] = {}  # requests in flight by request id

    def send(self, request: ShardRequest, message: bytes, rows: RowIds, take: TakeOutcome) -> None:
        """Send a request; its outcome is handed to `take` together with `rows`."""
        traffic = self._fleet.traffic
        traffic.num_sent += 1
        traffic.num_rows_sent += request.work.num_rows
        traffic.sent_bytes += len(message)
        self._requests[request.id] = InFlightRequest(rows, take)
        stream = self._connections.stream_of.get(request.health)
        if stream is None:  # the stream was closed after the request had been routed
            self._receiver.inbox.append((request.id, None))
        else:
            stream.send(request.id, message)

    def deliver_next(self) -> bool:
        """Hand the next received outcome to its call; return False if there is no such outcome."""
        if not self._receiver.inbox:
            return False
        request_id, reply = self._receiver.inbox.popleft()
        now, request = time.monotonic(), self._requests.pop(request_id, None)
        if reply is not None:
            traffic = self._fleet.traffic
            traffic.num_received += 1
            traffic.received_bytes += reply.ByteSize()
            traffic.queue_us += reply.queue_us
            traffic.compute_us += reply.compute_us
        if request is None:
            self._note_late(request_id, reply, now)
        else:
            request.take(request_id, request.rows, reply, now)
        return True

    def receive(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for outcomes; return True if there is an outcome to deliver."""
        self._receiver.receive(timeout_s)
        return bool(self._receiver.inbox)

    def forget(self, requests: Iterable[ShardRequest]) -> None:
        """Stop handing the outcomes of `requests` to their call; the outcomes still count for the shards' health."""
        for request in requests:
            self._requests.pop(request.id, None)

    def _note_late(self, request_id: int, reply: pb.ComputeReply | None, now: float) -> None:
        """Update the health of a shard with the outcome of a request whose call is over."""
        if reply is None:
            self._fleet.note_failed(request_id, now)
        elif checksum_of_reply(reply) != reply.checksum:
            self._fleet.traffic.num_corrupt += 1
            self._fleet.note_failed(request_id, now)
        else:
            timing = ReplyTiming(reply.queue_us, reply.compute_us, reply.queue_depth)
            self._fleet.note_reply(request_id, timing if reply.HasField("sums") else None, now)
