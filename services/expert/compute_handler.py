"""`ComputeHandler` takes a shard's compute requests, gives the requests to the worker, and sends the replies."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from cluster.cost_fit import CostFit, RowsPerCall
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.transport.checksum import checksum_of_reply
from services.expert.transport.compute_server import ReplyTo
from services.expert.transport.wire import Refused
from services.expert.transport.worker import Worker
from services.expert.weights.host import ExpertHost, NeedsPromotion, PendingRequest
from services.expert.weights.promotion import PROMOTE_TIMEOUT_S, PromotionQueue

log = logging.getLogger(__name__)

COST_SAMPLES = 256  # maximum number of requests for one update of the cost model
SAMPLE_EVERY = 4  # one request in four is a sample for the cost model
CostSample = tuple[int, int, bytes, int]  # layer, number of rows, expert ids of the picks (int32), µs of computing


@dataclass
class Counters:
    """`Counters` count what a shard has done since its start; `pb.Counters` uses the same names for the fields."""

    num_requests: int = 0
    num_refusals: int = 0
    num_rows: int = 0
    num_picks: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    queue_us: int = 0
    compute_us: int = 0

    def to_proto(self, num_promotions: int, promotion_us: int) -> pb.Counters:
        """Return the counters as a message, together with the number of promotions and the µs that promotions took."""
        return pb.Counters(**vars(self), num_promotions=num_promotions, promotion_us=promotion_us)


class ComputeHandler:
    """A `ComputeHandler` answers each compute request of one shard once, with sums or with a refusal.

    Any thread may call `accept`, which gives the request to the worker's thread. The worker limits how many requests
    may wait. A request that needs standbys waits in the `PromotionQueue`, and then returns to the worker.
    """

    def __init__(self, host: ExpertHost, worker: Worker, promotion_queue: PromotionQueue) -> None:
        self.host, self.worker, self.promotion_queue = host, worker, promotion_queue
        self.counters = Counters()
        self.cost_fit = CostFit()
        self.rows_per_call = RowsPerCall()
        self.num_failed_in_a_row = 0  # consecutive requests that raised an unexpected error
        self.is_refusing = False  # whether new requests are refused, because the shard drains
        self.last_request_at = -math.inf  # the value of time.monotonic() at the last request
        self._seen = (0, 0)  # the counts of requests and rows at the last update of `rows_per_call`
        self._samples: deque[CostSample] = deque(maxlen=COST_SAMPLES)
        self._counting = threading.Lock()  # guards the counts, which change on the event loop and the worker

    def accept(self, request: pb.ComputeRequest, num_bytes: int, stream: ReplyTo) -> None:
        """Give `request` to the worker, which replies on `stream`, or refuse the request at once.

        `num_bytes` is the size of the received message.
        """
        arrived_at = self.last_request_at = time.monotonic()
        with self._counting:
            self.counters.num_requests += 1
            self.counters.received_bytes += num_bytes
        if self.is_refusing:
            self._refuse(request, stream, Refused(pb.Refusal.DRAINING, "This shard is draining."))
        elif self.worker.is_full:
            detail = f"{self.worker.depth} requests wait here already; the bound max_queue is {self.worker.max_depth}."
            self._refuse(request, stream, Refused(pb.Refusal.OVERLOADED, detail))
        else:
            self.worker.submit(lambda: self._serve(request, stream, arrived_at))

    async def idle(self) -> None:
        """Wait until every request accepted so far has its reply."""
        await self.worker.idle()  # a request without a reply after this line is parked for a promotion
        await self.promotion_queue.idle()

    def update_cost_model(self) -> None:
        """Update the cost model and the mean number of rows per call with the requests since the last update."""
        seen = (self.counters.num_requests, self.counters.num_rows)
        self.rows_per_call.observe(*(now - before for now, before in zip(seen, self._seen, strict=True)))
        self._seen = seen
        samples = [self._samples.popleft() for _ in range(len(self._samples))]
        mib = {layer: shape.nbytes(self.host.dtype) / 2**20 for layer, shape in self.host.shapes.items()}
        columns = [
            (len(np.unique(np.frombuffer(experts, "<i4"))), num_rows, mib[layer], took_us)
            for layer, num_rows, experts, took_us in samples
        ]
        num_experts, num_rows, sizes, took_us = np.array(columns, dtype=np.float64).reshape(-1, 4).T
        self.cost_fit.observe(num_experts, num_rows, sizes, took_us)

    # On the worker's thread ------------------------------------------------------------------------------------------

    def _serve(
        self, request: pb.ComputeRequest, stream: ReplyTo, arrived_at: float, pending: PendingRequest | None = None
    ) -> None:
        """Compute a request and reply, or park the request if it needs standbys.

        `pending` is the state of a request that was parked before, and None for a new request.
        """
        if not stream.is_open:
            return
        started_at = time.monotonic()
        try:
            reply = self._compute(request, started_at - arrived_at, pending)
        except NeedsPromotion as needs:
            self._park(needs.pending, request, stream, arrived_at)
            return
        reply.queue_us = round((started_at - arrived_at) * 1e6)
        reply.compute_us = round((time.monotonic() - started_at) * 1e6)
        reply.queue_depth = self.worker.depth - 1
        self._count(request, _with_checksum(reply))
        stream.reply(reply)

    def _compute(self, request: pb.ComputeRequest, waited_s: float, pending: PendingRequest | None) -> pb.ComputeReply:
        try:
            if 0 < request.timeout_us < waited_s * 1e6:
                raise Refused(pb.Refusal.DEADLINE, f"The request waited {waited_s:.3f} s, longer than its timeout_us.")
            sums = self.host.compute(request) if pending is None else pending.advance(self.host.on_device)
            self.num_failed_in_a_row = 0
            return pb.ComputeReply(id=request.id, sums=sums)
        except Refused as refused:
            return self._refusal(request, refused)
        except NeedsPromotion:
            raise
        except Exception as error:
            log.exception("A request for layer %d failed.", request.layer)
            self.num_failed_in_a_row += 1
            return self._refusal(request, Refused(pb.Refusal.FAILED, f"Computing failed with {error!r}."))

    def _park(self, pending: PendingRequest, request: pb.ComputeRequest, stream: ReplyTo, arrived_at: float) -> None:
        left_s = request.timeout_us / 1e6 if request.timeout_us else PROMOTE_TIMEOUT_S
        self.promotion_queue.park(
            pending,
            min(PROMOTE_TIMEOUT_S, left_s) - (time.monotonic() - arrived_at),
            lambda: self._serve(request, stream, arrived_at, pending),
            lambda refused: self._refuse(request, stream, refused),
        )

    def _count(self, request: pb.ComputeRequest, reply: pb.ComputeReply) -> None:
        counters = self.counters
        if not counters.num_requests % SAMPLE_EVERY and reply.HasField("sums"):
            self._samples.append((request.layer, request.num_rows, request.pick_experts, reply.compute_us))
        counters.num_rows += request.num_rows
        counters.num_picks += len(request.pick_rows) // 4
        counters.sent_bytes += reply.ByteSize()
        counters.queue_us += reply.queue_us
        counters.compute_us += reply.compute_us

    # Refusals --------------------------------------------------------------------------------------------------------

    def _refuse(self, request: pb.ComputeRequest, stream: ReplyTo, refused: Refused) -> None:
        stream.reply(_with_checksum(self._refusal(request, refused)))

    def _refusal(self, request: pb.ComputeRequest, refused: Refused) -> pb.ComputeReply:
        with self._counting:
            self.counters.num_refusals += 1
        refusal = pb.Refusal(
            code=refused.code, detail=refused.detail, epoch=self.host.epoch, missing=list(refused.missing)
        )
        return pb.ComputeReply(id=request.id, refusal=refusal, queue_depth=self.worker.depth)


def _with_checksum(reply: pb.ComputeReply) -> pb.ComputeReply:
    """Set the checksum of `reply`, whose other fields must be complete, and return `reply`."""
    reply.checksum = checksum_of_reply(reply)
    return reply
