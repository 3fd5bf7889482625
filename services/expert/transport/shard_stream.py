"""The client's end of one shard's stream, which is opened again whenever it breaks.

Replies go into the inbox as (request id, reply), or (request id, None) if the stream was lost. The thread that asks
also reads: a reply that a second thread would have to hand over costs two switches more.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from cluster.dispatch.shard_health import LinkState
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.options import MAX_MESSAGE_BYTES
from services.expert.transport.http2 import ClientStream, GrpcSocket, keep_alive
from services.expert.transport.wire import COMPUTE_PATH

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0
MIN_RECONNECT_S, MAX_RECONNECT_S = 0.05, 1.0
CLOSE_TIMEOUT_S = 5.0
LAST_WORDS_S = 1.0  # for the asking thread to read what a shard wrote before its connection broke
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
READ, WRITE = select.POLLIN, select.POLLOUT
HAS_EPOLL = hasattr(select, "epoll")

Inbox = deque[tuple[int, pb.ComputeReply | None]]


class ProtocolError(ConnectionError):
    """A shard does what no shard does: what comes over its stream cannot be trusted."""


@dataclass(eq=False, slots=True)
class _Connection:
    """One connection to a shard, and what is owed on it."""

    socket: GrpcSocket
    pending: set[int] = field(default_factory=set)
    watched: int = READ
    is_lost: threading.Event = field(default_factory=threading.Event)


class Receiver:
    """Reads the replies of several streams; `receive` belongs to one thread, the one that asks, `wake` to any.

    Not by way of `selectors`, which takes longer than the system call.
    """

    def __init__(self) -> None:
        self.inbox: Inbox = deque()
        self._poll: Any = select.epoll() if HAS_EPOLL else select.poll()
        self._links: dict[int, tuple[ShardStream, _Connection]] = {}  # by file descriptor
        self._waking, self._woken = socket.socketpair()
        for end in (self._waking, self._woken):
            end.setblocking(False)
        self._poll.register(self._woken, READ)

    def receive(self, timeout_s: float) -> bool:
        """Puts what has come into the inbox; waits for something at most that long. Whether there was something."""
        ready = self._poll.poll(timeout_s if HAS_EPOLL else 1000 * timeout_s)
        for file, events in ready:
            if watched := self._links.get(file):
                stream, link = watched
                stream.on_ready(link, events)
            else:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
        return bool(ready)

    def wake(self) -> None:
        """Has a `receive` that waits return."""
        with suppress(OSError):  # it has enough to wake up for already, or is closed
            self._waking.send(b"\0")

    def add(self, stream: ShardStream, link: _Connection) -> None:
        file = link.socket.connection.fileno()
        self._links[file] = stream, link
        self._poll.register(file, READ)

    def watch(self, link: _Connection) -> None:
        events = READ | (WRITE if link.socket.has_unsent else 0)
        if link.watched != events:
            link.watched = events
            self._poll.modify(link.socket.connection.fileno(), events)

    def remove(self, link: _Connection) -> None:
        file = link.socket.connection.fileno()
        del self._links[file]
        self._poll.unregister(file)

    def close(self) -> None:
        if HAS_EPOLL:
            self._poll.close()
        self._waking.close()
        self._woken.close()


class ShardStream:
    """`send`, `reset` and `on_ready` belong to the thread that asks; the rest may be asked from any.

    A thread of its own connects, and learns of a broken connection that nobody reads from. `on_link` hears of the
    link's state whenever it may have changed, on whatever thread.
    """

    def __init__(self, endpoint: str, receiver: Receiver, on_link: Callable[[LinkState], None]) -> None:
        self.endpoint = endpoint
        self.is_down = False  # hopeful until the first attempt to connect has failed
        self._receiver, self._on_link = receiver, on_link
        self._link: _Connection | None = None
        self._changing = threading.Lock()
        self._is_settled, self._is_closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_open, name=f"shard {endpoint}", daemon=True)
        self._thread.start()

    @property
    def is_settled(self) -> bool:
        """Whether an attempt to connect has succeeded or failed."""
        return self._is_settled.is_set()

    def send(self, request_id: int, message: bytes) -> None:
        """Never waits."""
        with self._changing:  # or the other thread might find nothing owed, and close
            if (link := self._link) is not None:
                link.pending.add(request_id)
        if link is None:
            self._receiver.inbox.append((request_id, None))
            return
        try:
            link.socket.send(message)
            if link.socket.has_unsent:
                self._receiver.watch(link)
        except (OSError, ValueError) as error:
            self._lose(link, str(error))

    def reset(self) -> None:
        """Breaks the connection, to be opened anew: nothing more is hoped for from what is owed on it."""
        if link := self._link:
            self._lose(link, "it does not answer")

    def on_ready(self, link: _Connection, events: int) -> None:
        try:
            messages = link.socket.receive() if events & ~WRITE else []
            for message in messages:
                self._deliver(link, pb.ComputeReply.FromString(message))
            if events & WRITE:
                link.socket.flush()
            self._receiver.watch(link)
        except (OSError, ValueError, DecodeError) as error:
            self._lose(link, str(error))

    def close(self) -> None:
        """What is owed is lost; the connection is closed soon after."""
        self._is_closed.set()
        if link := self._link:
            self._lose(link, "it was closed")

    def join(self) -> None:
        """Waits after `close` until nothing is left of it."""
        self._thread.join(CLOSE_TIMEOUT_S)

    def _deliver(self, link: _Connection, reply: pb.ComputeReply) -> None:
        try:
            link.pending.remove(reply.id)
        except KeyError:
            raise ProtocolError(f"it answers {reply.id}, which is not what it was asked") from None
        self._receiver.inbox.append((reply.id, reply))

    def _lose(self, link: _Connection, reason: str) -> None:
        with self._changing:
            if self._link is not link:
                return
            self._link, self.is_down = None, True
        if not self._is_closed.is_set():
            log.warning("The stream to shard %s is down: %s.", self.endpoint, reason)
        self._receiver.remove(link)
        link.is_lost.set()
        with suppress(OSError):  # the other thread waits for it
            link.socket.connection.shutdown(socket.SHUT_RDWR)
        self._on_link(LinkState.DOWN)
        self._receiver.inbox.extend((request_id, None) for request_id in sorted(link.pending))
        self._receiver.wake()

    # The other thread: from here on

    def _keep_open(self) -> None:
        delay = MIN_RECONNECT_S
        while not self._is_closed.is_set():
            link = self._connect()
            if link is not None:
                self._use(link)
            delay = min(2 * delay, MAX_RECONNECT_S) if link is None else MIN_RECONNECT_S
            self._is_closed.wait(delay)

    def _use(self, link: _Connection) -> None:
        """Until it is lost."""
        self._receiver.add(self, link)
        if self.is_down:
            log.warning("The stream to shard %s is up again.", self.endpoint)
        with self._changing:
            self._link, self.is_down = link, False
        self._is_settled.set()
        self._on_link(LinkState.UP)
        self._receiver.wake()
        if self._is_closed.is_set():
            self._lose(link, "it was closed")
        self._wait_until_broken(link)
        link.is_lost.wait(CLOSE_TIMEOUT_S)  # the other thread may have lost it first, and still need its number
        link.socket.close()

    def _wait_until_broken(self, link: _Connection) -> None:
        poll = select.poll()
        poll.register(link.socket.connection, HUNG_UP)
        while not link.is_lost.is_set() and not poll.poll(1000 * MAX_RECONNECT_S):
            pass
        with self._changing:
            is_owed = bool(link.pending)
        if is_owed:  # its last replies may still wait to be read
            link.is_lost.wait(LAST_WORDS_S)
        self._lose(link, "the shard hung up")

    def _connect(self) -> _Connection | None:
        host, _, port = self.endpoint.rpartition(":")
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S)
        except OSError as error:
            self._note_no_connection(str(error))
            return None
        try:
            return _Connection(self._greet(connection))
        except OSError as error:
            connection.close()
            self._note_no_connection(str(error) or "it says nothing")
            return None

    def _note_no_connection(self, reason: str) -> None:
        if not self.is_down:
            log.warning("The stream to shard %s is down: %s.", self.endpoint, reason)
        self.is_down = True
        self._is_settled.set()
        self._on_link(LinkState.DOWN)
        self._receiver.wake()

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
