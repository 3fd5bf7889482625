"""The port on which a shard takes `Compute` streams without grpcio: read, computed and answered by one thread."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from google.protobuf.message import DecodeError

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.options import MAX_MESSAGE_BYTES
from services.expert.transport.http2 import GrpcSocket, ServerStream, StreamEnded, keep_alive
from services.expert.transport.worker import READ, WRITE, Worker

log = logging.getLogger(__name__)

BACKLOG = 128
MAX_UNSENT_BYTES = 8 << 20  # replies that a client has not taken; it is not read from until it has


class ReplyTo(Protocol):
    """A stream that replies go to; None ends it."""

    is_open: bool

    def reply(self, reply: pb.ComputeReply | None) -> None: ...


Accept = Callable[[pb.ComputeRequest, int, ReplyTo], None]  # a request, its size in bytes, where its reply goes


class ComputeServer:
    """Listens from the start; belongs to the worker's thread, apart from the constructor."""

    def __init__(self, worker: Worker, accept: Accept, host: str) -> None:
        self._worker, self._accept, self._host = worker, accept, host
        self._listening = socket.create_server((host, 0), backlog=BACKLOG)
        self._listening.setblocking(False)
        self._streams: set[_ComputeServerStream] = set()
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)
        worker.watch(self._listening, self._on_connect)

    @property
    def endpoint(self) -> str:
        return f"{self._host}:{self._listening.getsockname()[1]}"

    def close(self) -> None:
        """Ends every stream with the replies that are written by then."""
        self._worker.forget(self._listening)
        self._listening.close()
        if self._spare is not None:
            os.close(self._spare)
        for stream in list(self._streams):
            stream.reply(None)
            stream.close()

    def _on_connect(self, _: int) -> None:
        try:
            connection, _address = self._listening.accept()
            keep_alive(connection)
        except OSError as error:
            log.warning("A connection could not be taken: %s", error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._hang_up_on_one()
            return
        stream = _ComputeServerStream(GrpcSocket(connection, ServerStream(MAX_MESSAGE_BYTES)), self)
        self._streams.add(stream)
        self._worker.watch(connection, stream.on_ready)
        stream.flush()

    def _hang_up_on_one(self) -> None:
        """Without a file descriptor for it, a connection would wait, and wake the worker again and again."""
        with suppress(OSError):  # another thread may take the spare one
            if self._spare is not None:
                os.close(self._spare)
                self._spare = None
                self._listening.accept()[0].close()
        with suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)


class _ComputeServerStream:
    def __init__(self, link: GrpcSocket, front: ComputeServer) -> None:
        self._link, self._front = link, front
        self.is_open = True
        self._num_owed = 0
        self._watched = READ

    def on_ready(self, events: int) -> None:
        if events & READ:
            self._read()
        if self.is_open and (self._watched != READ or self._link.has_unsent):
            self.flush()

    def _read(self) -> None:
        try:
            for message in self._link.receive():
                self._num_owed += 1
                self._front._accept(pb.ComputeRequest.FromString(message), len(message), self)
            if self._link.stream.is_ended and not self._num_owed:
                self.reply(None)
        except (OSError, DecodeError) as error:
            if not isinstance(error, StreamEnded) or self._num_owed:
                log.warning("A stream broke with %d replies owed: %s", self._num_owed, error)
            self.close()

    def reply(self, reply: pb.ComputeReply | None) -> None:
        if not self.is_open:
            return
        if reply is None:
            self._end()
        else:
            self._num_owed -= 1
            self._link.stream.send(reply.SerializeToString())
            if self._link.stream.is_ended and not self._num_owed:
                self._end()
        self.flush()

    def _end(self) -> None:
        stream = self._link.stream
        assert isinstance(stream, ServerStream)
        stream.end()

    def flush(self) -> None:
        """Writes what can be written, and watches for what to do next."""
        try:
            self._link.flush()
        except OSError as error:
            log.warning("A client went away with %d replies owed: %s", self._num_owed, error)
            self.close()
            return
        if self._watched == READ and not self._link.has_unsent and not self._link.stream.num_unsent:
            return
        num_unsent = self._link.stream.num_unsent
        if num_unsent > MAX_MESSAGE_BYTES:  # it was read from for its windows' sake, but that has an end
            log.warning("A client has not taken %d bytes of replies, and is hung up on.", num_unsent)
            self.close()
            return
        may_read = READ if num_unsent <= MAX_UNSENT_BYTES else 0
        events = may_read | (WRITE if self._link.has_unsent else 0)
        if (events or READ) != self._watched:
            self._watched = events or READ
            self._front._worker.watch_for(self._link.connection, self._watched)

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._front._streams.discard(self)
            self._front._worker.forget(self._link.connection)
            self._link.close()
