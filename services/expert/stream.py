"""The client's end of one shard's stream, which is opened again whenever it breaks.

Replies go into the inbox given with the request, as (request id, reply), or (request id, None) if the stream was lost.
The thread that asks also reads: a reply that a second thread would have to hand over costs two switches more.
"""

from __future__ import annotations

import logging
import select
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.options import MAX_MESSAGE_BYTES
from services.expert.http2 import ClientStream, GrpcSocket, keep_alive
from services.expert.wire import COMPUTE_PATH

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0
MIN_RECONNECT_S, MAX_RECONNECT_S = 0.05, 1.0
MAX_REST_S = 30.0
CLOSE_TIMEOUT_S = 5.0
LAST_WORDS_S = 1.0  # for the asking thread to read what a shard wrote before its connection broke
PACE_KEPT = 0.9  # of what earlier replies said about a shard's pace, with each new one
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

Inbox = deque[tuple[int, pb.ComputeReply | None]]


@dataclass(slots=True)
class _Owed:
    """A request that the shard has not answered; `inbox` is None where nobody waits for it any more."""

    num_rows: int
    inbox: Inbox | None


@dataclass(eq=False, slots=True)
class _Link:
    """One connection to a shard, and what is owed on it."""

    socket: GrpcSocket
    pending: dict[int, _Owed] = field(default_factory=dict)
    is_lost: threading.Event = field(default_factory=threading.Event)


class Receiver:
    """Reads the replies of several streams; `receive` belongs to one thread, the one that asks."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def receive(self, timeout_s: float) -> bool:
        """Puts what has come into the inboxes; waits for something at most that long. Whether there was something."""
        ready = self._selector.select(timeout_s)
        for key, events in ready:
            stream, link = key.data
            stream.on_ready(link, events)
        return bool(ready)

    def add(self, stream: ShardStream, link: _Link) -> None:
        self._selector.register(link.socket.connection, READ, (stream, link))

    def watch(self, stream: ShardStream, link: _Link) -> None:
        events = READ | (WRITE if link.socket.has_unsent else 0)
        if self._selector.get_key(link.socket.connection).events != events:
            self._selector.modify(link.socket.connection, events, (stream, link))

    def remove(self, link: _Link) -> None:
        self._selector.unregister(link.socket.connection)

    def close(self) -> None:
        self._selector.close()


class ShardStream:
    """`send`, `forget` and `on_ready` belong to the thread that asks; the rest may be asked from any.

    A thread of its own connects, and learns of a broken connection that nobody reads from.
    """

    def __init__(self, endpoint: str, receiver: Receiver) -> None:
        self.endpoint = endpoint
        self.queue_depth = 0  # as of the last reply
        self.is_down = False  # hopeful until the first attempt to connect has failed
        self.heard_at = 0.0
        self._receiver = receiver
        self._rests_until = 0.0
        self._num_rests = 0
        self._num_rows_owed = 0
        self._paced_rows = self._paced_us = 0.0  # recent replies, each counting by its rows
        self._queue_us = 0  # as of the last reply
        self._link: _Link | None = None
        self._changing = threading.Lock()
        self._is_settled, self._is_closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_open, name=f"shard {endpoint}", daemon=True)
        self._thread.start()

    @property
    def predicted_s(self) -> float:
        """How long the shard should take for the rows it owes, going by what its replies said; 0 before the first."""
        us_per_row = self._paced_us / self._paced_rows if self._paced_rows else 0.0
        return (self._queue_us + us_per_row * self._num_rows_owed) / 1e6

    @property
    def is_settled(self) -> bool:
        """Whether an attempt to connect has succeeded or failed."""
        return self._is_settled.is_set()

    def should_be_avoided(self, now: float) -> bool:
        """Not asked where there is another home: to wait for the first connection would hold up the whole call."""
        return self.is_down or now < self._rests_until or not self.is_settled

    def rest(self, now: float) -> None:
        """Passes the shard over for a while because it owes answers: 1 s, doubled each time until it answers."""
        self._rests_until = now + min(MAX_REST_S, 2.0**self._num_rests)
        self._num_rests += 1

    def send(self, request_id: int, num_rows: int, message: bytes, inbox: Inbox) -> None:
        """Waits for the first attempt to connect, no longer than that takes."""
        if not self.is_settled:
            self._is_settled.wait(2 * CONNECT_TIMEOUT_S)
        link = self._owe(request_id, _Owed(num_rows, inbox))
        if link is None:
            inbox.append((request_id, None))
            return
        try:
            link.socket.send(message)
            if link.socket.has_unsent:
                self._receiver.watch(self, link)
        except (OSError, KeyError) as error:
            self._lose(link, str(error))

    def _owe(self, request_id: int, owed: _Owed) -> _Link | None:
        with self._changing:  # or the other thread might find nothing owed, and close
            if self._link is not None:
                self._link.pending[request_id] = owed
                self._num_rows_owed += owed.num_rows
            return self._link

    def forget(self, request_id: int) -> None:
        """Drops the reply to a request that nobody waits for any more; the shard computes it all the same."""
        link = self._link  # read once: the other thread may lose it meanwhile
        if link is not None and (owed := link.pending.get(request_id)):
            owed.inbox = None

    def on_ready(self, link: _Link, events: int) -> None:
        try:
            messages = link.socket.receive() if events & READ else []
            for message in messages:
                self._deliver(link, pb.ComputeReply.FromString(message), len(message))
            if events & WRITE:
                link.socket.flush()
            self._receiver.watch(self, link)
        except (OSError, KeyError, DecodeError) as error:
            self._lose(link, str(error))

    def close(self) -> None:
        """What is owed is lost; the connection is closed soon after."""
        self._is_closed.set()
        if link := self._link:
            self._lose(link, "it was closed")

    def join(self) -> None:
        """Waits after `close` until nothing is left of it."""
        self._thread.join(CLOSE_TIMEOUT_S)

    def _deliver(self, link: _Link, reply: pb.ComputeReply, num_bytes: int) -> None:
        self.heard_at = time.monotonic()
        self.queue_depth = reply.queue_depth
        self._rests_until, self._num_rests = 0.0, 0
        owed = link.pending.pop(reply.id, None)
        if owed is None:
            return
        with self._changing:
            if link is self._link:  # else it was lost meanwhile, and what it owed with it
                self._num_rows_owed -= owed.num_rows
        if reply.HasField("sums"):
            self._note_pace(reply, owed.num_rows)
        if owed.inbox is not None:
            owed.inbox.append((reply.id, reply))

    def _note_pace(self, reply: pb.ComputeReply, num_rows: int) -> None:
        self._queue_us = reply.queue_us
        self._paced_rows = PACE_KEPT * self._paced_rows + num_rows
        self._paced_us = PACE_KEPT * self._paced_us + reply.compute_us

    def _lose(self, link: _Link, reason: str) -> None:
        with self._changing:
            if self._link is not link:
                return
            self._link, self.is_down = None, True
            self._num_rows_owed = 0
        if not self._is_closed.is_set():
            log.warning("The stream to shard %s is down: %s.", self.endpoint, reason)
        self._receiver.remove(link)
        link.is_lost.set()
        with suppress(OSError):  # the other thread waits for it
            link.socket.connection.shutdown(socket.SHUT_RDWR)
        for request_id, owed in list(link.pending.items()):
            if owed.inbox is not None:
                owed.inbox.append((request_id, None))

    # The other thread: from here on

    def _keep_open(self) -> None:
        delay = MIN_RECONNECT_S
        while not self._is_closed.is_set():
            link = self._connect()
            if link is not None:
                self._use(link)
            delay = min(2 * delay, MAX_RECONNECT_S) if link is None else MIN_RECONNECT_S
            self._is_closed.wait(delay)

    def _use(self, link: _Link) -> None:
        """Until it is lost."""
        self._receiver.add(self, link)
        if self.is_down:
            log.warning("The stream to shard %s is up again.", self.endpoint)
        with self._changing:
            self._link, self.is_down = link, False
        self._is_settled.set()
        if self._is_closed.is_set():
            self._lose(link, "it was closed")
        self._wait_until_broken(link)
        link.socket.close()

    def _wait_until_broken(self, link: _Link) -> None:
        poll = select.poll()
        poll.register(link.socket.connection, HUNG_UP)
        while not link.is_lost.is_set() and not poll.poll(1000 * MAX_RECONNECT_S):
            pass
        with self._changing:
            is_owed = bool(link.pending)
        if is_owed:  # its last replies may still wait to be read
            link.is_lost.wait(LAST_WORDS_S)
        self._lose(link, "the shard hung up")

    def _connect(self) -> _Link | None:
        host, _, port = self.endpoint.rpartition(":")
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S)
        except OSError as error:
            self._note_no_connection(str(error))
            return None
        try:
            return _Link(self._greet(connection))
        except OSError as error:
            connection.close()
            self._note_no_connection(str(error) or "it says nothing")
            return None

    def _note_no_connection(self, reason: str) -> None:
        if not self.is_down:
            log.warning("The stream to shard %s is down: %s.", self.endpoint, reason)
        self.is_down = True
        self._is_settled.set()

    def _greet(self, connection: socket.socket) -> GrpcSocket:
        """Opens the stream; raises OSError where the other side does not answer in time. A hung process takes
        connections, too."""
        keep_alive(connection)
        link = GrpcSocket(connection, ClientStream(COMPUTE_PATH, self.endpoint, MAX_MESSAGE_BYTES))
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        stop_at = time.monotonic() + CONNECT_TIMEOUT_S
        link.flush()
        while not link.stream.is_greeted:
            if not poll.poll(max(0.0, 1000 * (stop_at - time.monotonic()))):
                raise TimeoutError(f"no answer within {CONNECT_TIMEOUT_S} s")
            link.receive()
        return link
