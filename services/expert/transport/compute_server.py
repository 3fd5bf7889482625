"""A `ComputeServer` serves the `Compute` streams of a shard without grpcio: one thread reads, computes and answers."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from google.protobuf.message import DecodeError

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.options import MAX_MESSAGE_BYTES
from services.expert.transport.http2 import GrpcSocket, ServerStream, keep_alive
from services.expert.transport.http2_errors import ProtocolBroken, StreamEnded
from services.expert.transport.wire import COMPUTE_PATH
from services.expert.transport.worker import READ, WRITE, Worker

log = logging.getLogger(__name__)

BACKLOG = 128
LAST_REPLIES_S = 2.0  # time for all clients together to take the last replies when the server closes
MAX_UNSENT_BYTES = 8 << 20  # above this number of unsent reply bytes, no requests of a client are read


class ReplyTo(Protocol):
    """A `ReplyTo` is the stream to which the replies of some requests are sent; a reply of None ends the stream."""

    is_open: bool

    def reply(self, reply: pb.ComputeReply | None) -> None: ...


Accept = Callable[[pb.ComputeRequest, int, ReplyTo], None]  # arguments: request, size in bytes, reply stream


class ComputeServer:
    """A `ComputeServer` takes connections from clients and hands their requests to `accept`.

    The constructor starts to listen. Only the worker's thread may call the other methods.
    """

    def __init__(self, worker: Worker, accept: Accept, host: str) -> None:
        self._worker, self._accept, self._host = worker, accept, host
        self._listening = socket.create_server((host, 0), backlog=BACKLOG)
        self._listening.setblocking(False)
        self._streams: set[_ComputeServerStream] = set()
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)  # the spare file descriptor for `_hang_up_on_one`
        worker.watch(self._listening, self._on_connect)

    @property
    def endpoint(self) -> str:
        return f"{self._host}:{self._listening.getsockname()[1]}"

    def close(self) -> None:
        """Stop listening, and end every stream after the replies that were sent before."""
        self._worker.forget(self._listening)
        self._listening.close()
        if self._spare is not None:
            os.close(self._spare)
        stop_at = time.monotonic() + LAST_REPLIES_S
        for stream in list(self._streams):
            stream.finish(stop_at)

    def _on_connect(self, _: int) -> None:
        try:
            tcp_socket, _address = self._listening.accept()
            keep_alive(tcp_socket)
            grpc_socket = GrpcSocket(tcp_socket, ServerStream(COMPUTE_PATH, MAX_MESSAGE_BYTES))
        except OSError as error:
            log.warning("A client's connection could not be accepted: %s", error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._hang_up_on_one()
            return
        stream = _ComputeServerStream(grpc_socket, self._worker, self._accept, self._streams)
        self._streams.add(stream)
        self._worker.watch(tcp_socket, stream.on_ready)
        stream.flush()

    def _hang_up_on_one(self) -> None:
        """Accept one connection with the spare file descriptor and close the connection.

        A process without a free file descriptor cannot accept a connection. The connection would stay in the queue and
        wake the worker again and again.
        """
        with suppress(OSError):  # another thread may take the closed file descriptor first
            if self._spare is not None:
                os.close(self._spare)
                self._spare = None
                self._listening.accept()[0].close()
        with suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)


class _ComputeServerStream:
    """A `_ComputeServerStream` serves one client; a stream removes itself from `open_streams` when it is closed.

    Whatever a client sends, only the client's own connection is closed. Errors never reach the worker.
    """

    def __init__(
        self, grpc_socket: GrpcSocket, worker: Worker, accept: Accept, open_streams: set[_ComputeServerStream]
    ) -> None:
        self._socket, self._worker, self._accept, self._open_streams = grpc_socket, worker, accept, open_streams
        self.is_open = True
        self._num_in_flight = 0  # number of requests without a reply
        self._watched = READ

    def on_ready(self, events: int) -> None:
        try:
            if events & READ:
                self._read()
            if self.is_open and (self._watched != READ or self._socket.has_unsent):
                self.flush()
        except Exception:
            self._close_after_own_error()

    def _read(self) -> None:
        try:
            for message in self._socket.receive():
                self._num_in_flight += 1
                self._accept(pb.ComputeRequest.FromString(message), len(message), self)
            if self._socket.stream.failure is not None:
                raise self._socket.stream.failure
            if self._socket.stream.is_ended and not self._num_in_flight:
                self.reply(None)
        except (OSError, DecodeError) as error:
            is_plain_end = isinstance(error, StreamEnded) and not isinstance(error, ProtocolBroken)
            if not is_plain_end or self._num_in_flight:
                log.warning("A client's stream broke with %d requests in flight: %s", self._num_in_flight, error)
            self.close()

    def reply(self, reply: pb.ComputeReply | None) -> None:
        """Send a reply, or end the stream if `reply` is None.

        The stream also ends after its last reply if the client has ended its side.
        """
        if not self.is_open:
            return
        try:
            if reply is None:
                self._end()
            else:
                self._num_in_flight -= 1
                self._socket.stream.send(reply.SerializeToString())
                if self._socket.stream.is_ended and not self._num_in_flight:
                    self._end()
            self.flush()
        except Exception:
            self._close_after_own_error()

    def _end(self) -> None:
        stream = self._socket.stream
        assert isinstance(stream, ServerStream)
        stream.end()

    def flush(self) -> None:
        """Write as many bytes as the socket takes now, and watch the socket for the events that are needed next."""
        try:
            self._socket.flush()
        except OSError as error:
            log.warning("A client went away with %d requests in flight: %s", self._num_in_flight, error)
            self.close()
            return
        if self._watched == READ and not self._socket.has_unsent and not self._socket.stream.num_unsent:
            return
        num_unsent = self._socket.stream.num_unsent
        # Replies that wait for wider windows do not stop the reading: the client widens its windows on this stream.
        if num_unsent > MAX_MESSAGE_BYTES:
            log.warning("A client is disconnected, because it has not taken %d bytes of replies.", num_unsent)
            self.close()
            return
        may_read = READ if num_unsent <= MAX_UNSENT_BYTES else 0
        events = may_read | (WRITE if self._socket.has_unsent else 0)
        if (events or READ) != self._watched:
            self._watched = events or READ
            self._worker.watch_for(self._socket.tcp_socket, self._watched)

    def finish(self, stop_at: float) -> None:
        """End the stream, wait until the client has taken the last replies or `stop_at` has come, and close."""
        self.reply(None)
        poll = select.poll()
        poll.register(self._socket.tcp_socket, READ)
        with suppress(OSError):  # of a client that is gone, or that breaks the protocol
            while self.is_open and self._socket.stream.num_unsent and (left_s := stop_at - time.monotonic()) > 0:
                poll.modify(self._socket.tcp_socket, READ | (WRITE if self._socket.has_unsent else 0))
                poll.poll(1000 * left_s)
                self._socket.receive()  # wider windows; the worker computes no further requests
                self._socket.flush()
        self.close()

    def _close_after_own_error(self) -> None:
        log.exception("A client's connection is closed, because serving it failed.")
        self.close()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._open_streams.discard(self)
            self._worker.forget(self._socket.tcp_socket)
            self._socket.close()
