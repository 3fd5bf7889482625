"""A `ShardStream` is the client's end of the stream to one shard; a broken stream is opened again.

The inbox gets the pair (request id, reply) for each reply, and (request id, None) for each request whose stream was
lost. The calling thread reads the streams itself, because handing a reply over from a second thread would cost two more
context switches.
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
LAST_REPLIES_S = 1.0  # seconds to read the replies that a shard wrote before its connection broke
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
READ, WRITE = select.POLLIN, select.POLLOUT
HAS_EPOLL = hasattr(select, "epoll")

Inbox = deque[tuple[int, pb.ComputeReply | None]]


class ProtocolError(ConnectionError):
    """A `ProtocolError` says that a shard breaks the protocol, so that nothing on its stream can be trusted."""


@dataclass(eq=False, slots=True)
class _Connection:
    """A `_Connection` is one connection to a shard with the ids of the requests in flight on it."""

    socket: GrpcSocket
    in_flight: set[int] = field(default_factory=set)
    watched: int = READ
    is_lost: threading.Event = field(default_factory=threading.Event)


class Receiver:
    """A `Receiver` reads the replies of several streams into one inbox.

    `receive` belongs to the calling thread; any thread may call `wake`. The receiver polls without the `selectors`
    module, which takes longer than the system call itself.
    """

    def __init__(self) -> None:
        self.inbox: Inbox = deque()
        self._poll: Any = select.epoll() if HAS_EPOLL else select.poll()
        self._connections: dict[int, tuple[ShardStream, _Connection]] = {}  # by file descriptor of the socket
        self._waking, self._woken = socket.socketpair()
        for end in (self._waking, self._woken):
            end.setblocking(False)
        self._poll.register(self._woken, READ)

    def receive(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for replies or for `wake`, and put the replies into the inbox.

        Return False if no socket became ready in this time.
        """
        ready = self._poll.poll(timeout_s if HAS_EPOLL else 1000 * timeout_s)
        for file, events in ready:
            if watched := self._connections.get(file):
                stream, connection = watched
                stream.on_ready(connection, events)
            else:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
        return bool(ready)

    def wake(self) -> None:
        """Make a waiting `receive` return at once."""
        with suppress(OSError):  # the socket is full, which wakes `receive` as well, or closed
            self._waking.send(b"\0")

    def add(self, stream: ShardStream, connection: _Connection) -> None:
        file = connection.socket.tcp_socket.fileno()
        self._connections[file] = stream, connection
        self._poll.register(file, READ)

    def watch(self, connection: _Connection) -> None:
        """Watch a connection for reading; while the connection has unsent bytes, watch it for writing, too."""
        events = READ | (WRITE if connection.socket.has_unsent else 0)
        if connection.watched != events:
            connection.watched = events
            self._poll.modify(connection.socket.tcp_socket.fileno(), events)

    def remove(self, connection: _Connection) -> None:
        file = connection.socket.tcp_socket.fileno()
        del self._connections[file]
        self._poll.unregister(file)

    def close(self) -> None:
        if HAS_EPOLL:
            self._poll.close()
        self._waking.close()
        self._woken.close()


class ShardStream:
    """A `ShardStream` sends requests to one shard and reads the replies.

    `send`, `reset` and `on_ready` belong to the calling thread; any thread may call the other methods. Each stream has
    a separate thread, which connects and notices broken connections from which no call reads. `on_link` gets the state
    of the link whenever the state may have changed, on the calling thread or on the stream's thread.
    """

    def __init__(self, endpoint: str, receiver: Receiver, on_link: Callable[[LinkState], None]) -> None:
        self.endpoint = endpoint
        self.is_down = False  # stays False until the first attempt to connect has failed
        self._receiver, self._on_link = receiver, on_link
        self._connection: _Connection | None = None
        self._changing = threading.Lock()
        self._is_settled, self._is_closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_open, name=f"shard {endpoint}", daemon=True)
        self._thread.start()

    @property
    def is_settled(self) -> bool:
        """Return True once an attempt to connect has succeeded or failed."""
        return self._is_settled.is_set()

    def send(self, request_id: int, message: bytes) -> None:
        """Send a request without ever waiting; bytes that the socket does not take now are sent later."""
        with self._changing:  # otherwise the stream's thread might see no request in flight and close the connection
            if (connection := self._connection) is not None:
                connection.in_flight.add(request_id)
        if connection is None:
            self._receiver.inbox.append((request_id, None))
            return
        try:
            connection.socket.send(message)
            if connection.socket.has_unsent:
                self._receiver.watch(connection)
        except OSError as error:
            self._lose(connection, str(error))

    def reset(self) -> None:
        """Break the connection, so that the stream connects again; the requests in flight are lost."""
        if connection := self._connection:
            self._lose(connection, "the shard does not answer")

    def on_ready(self, connection: _Connection, events: int) -> None:
        """Read replies from a connection, and write the bytes that the socket did not take before."""
        try:
            messages = connection.socket.receive() if events & ~WRITE else []
            for message in messages:
                self._deliver(connection, pb.ComputeReply.FromString(message))
            if connection.socket.stream.failure is not None:
                raise connection.socket.stream.failure
            if events & WRITE:
                connection.socket.flush()
            self._receiver.watch(connection)
        except (OSError, ValueError, DecodeError) as error:
            self._lose(connection, str(error))
        except Exception:  # no reply may end the thread of the engine
            log.exception("A reply of shard %s could not be read.", self.endpoint)
            self._lose(connection, "a reply could not be read")

    def close(self) -> None:
        """Give up the requests in flight; the connection is closed soon after."""
        self._is_closed.set()
        if connection := self._connection:
            self._lose(connection, "the stream was closed")

    def join(self) -> None:
        """Wait, after `close`, until the stream's thread has ended."""
        self._thread.join(CLOSE_TIMEOUT_S)

    def _deliver(self, connection: _Connection, reply: pb.ComputeReply) -> None:
        try:
            connection.in_flight.remove(reply.id)
        except KeyError:
            raise ProtocolError(f"the shard answered request {reply.id}, which is not in flight") from None
        self._receiver.inbox.append((reply.id, reply))

    def _lose(self, connection: _Connection, reason: str) -> None:
        with self._changing:
            if self._connection is not connection:
                return
            self._connection, self.is_down = None, True
        if not self._is_closed.is_set():
            log.warning("The stream to shard %s is down: %s.", self.endpoint, reason)
        self._receiver.remove(connection)
        connection.is_lost.set()
        with suppress(OSError):  # the stream's thread waits for the connection to break
            connection.socket.tcp_socket.shutdown(socket.SHUT_RDWR)
        self._on_link(LinkState.DOWN)
        self._receiver.inbox.extend((request_id, None) for request_id in sorted(connection.in_flight))
        self._receiver.wake()

    # Methods of the stream's thread

    def _keep_open(self) -> None:
        delay = MIN_RECONNECT_S
        while not self._is_closed.is_set():
            connection = self._connect()
            if connection is not None:
                self._use(connection)
            delay = min(2 * delay, MAX_RECONNECT_S) if connection is None else MIN_RECONNECT_S
            self._is_closed.wait(delay)

    def _use(self, connection: _Connection) -> None:
        """Send and receive over `connection` until it is lost, and then close the connection."""
        self._receiver.add(self, connection)
        if self.is_down:
            log.warning("The stream to shard %s is up again.", self.endpoint)
        with self._changing:
            self._connection, self.is_down = connection, False
        self._is_settled.set()
        self._on_link(LinkState.UP)
        self._receiver.wake()
        if self._is_closed.is_set():
            self._lose(connection, "the stream was closed")
        self._wait_until_broken(connection)
        # The calling thread may have lost the connection first, and may still need its file descriptor.
        connection.is_lost.wait(CLOSE_TIMEOUT_S)
        connection.socket.close()

    def _wait_until_broken(self, connection: _Connection) -> None:
        poll = select.poll()
        poll.register(connection.socket.tcp_socket, HUNG_UP)
        while not connection.is_lost.is_set() and not poll.poll(1000 * MAX_RECONNECT_S):
            pass
        with self._changing:
            has_in_flight = bool(connection.in_flight)
        if has_in_flight:  # the calling thread may still have to read the shard's last replies
            connection.is_lost.wait(LAST_REPLIES_S)
        self._lose(connection, "the shard closed the connection")

    def _connect(self) -> _Connection | None:
        host, _, port = self.endpoint.rpartition(":")
        try:
            tcp_socket = socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S)
        except (OSError, ValueError, OverflowError) as error:  # a malformed endpoint raises the last two
            self._note_no_connection(str(error))
            return None
        try:
            return _Connection(self._greet(tcp_socket))
        except Exception as error:  # nothing that a shard sends may end the stream's thread, which connects again
            tcp_socket.close()
            self._note_no_connection(str(error) or "the shard does not answer")
            return None

    def _note_no_connection(self, reason: str) -> None:
        if not self.is_down:
            log.warning("The stream to shard %s is down: %s.", self.endpoint, reason)
        self.is_down = True
        self._is_settled.set()
        self._on_link(LinkState.DOWN)
        self._receiver.wake()

    def _greet(self, tcp_socket: socket.socket) -> GrpcSocket:
        """Open the gRPC stream and wait for the shard's settings; raise OSError if the settings do not come in time.

        The wait is needed because the kernel of a hung process still accepts connections.
        """
        keep_alive(tcp_socket)
        grpc_socket = GrpcSocket(tcp_socket, ClientStream(COMPUTE_PATH, self.endpoint, MAX_MESSAGE_BYTES))
        poll = select.poll()
        poll.register(tcp_socket, select.POLLIN)
        stop_at = time.monotonic() + CONNECT_TIMEOUT_S
        grpc_socket.flush()
        while not grpc_socket.stream.is_greeted:
            left_s = stop_at - time.monotonic()  # a shard may send other frames for ever instead of its settings
            if left_s <= 0 or not poll.poll(1000 * left_s):
                raise TimeoutError(f"no settings within {CONNECT_TIMEOUT_S} s")
            if grpc_socket.receive():
                raise ProtocolError("the shard answered before any request")
        return grpc_socket
