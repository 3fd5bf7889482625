"""A `BoundedHttpProtocol` is one HTTP connection to the REST port, with limits on its memory and on its duration.

uvicorn itself bounds neither the headers nor the time in which a request arrives, and keeps every connection whose
client sends part of a request or does not read its response. The classes in this file add these bounds to uvicorn's
protocol for httptools. `GatewayLimits` holds the numbers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from enum import Enum
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.gateway.errors import ApiError, ApiRefusal, invalid
from services.gateway.limits import GatewayLimits

# Bytes that each header counts in addition to its name and its value, as in HTTP/2 (RFC 9113, section 10.5.1), so that
# a client cannot send thousands of headers that are nearly empty.
HEADER_OVERHEAD = 32
MAX_PIPELINED = 16  # maximum number of requests of one connection that wait for the answer to an earlier request
RETRY_AFTER_S = 1  # seconds after which a client that found no free connection may try again
# Seconds for which the server still reads, and drops, what a refused client sends. If the server closed the connection
# at once, the client's system would drop the refusal that it had received but not yet read.
LINGER_S = 1.0


class _Phase(Enum):
    """A `_Phase` says what the server waits for at one connection."""

    IDLE = "the first byte of the next request"
    HEADERS = "the rest of the headers"
    BODY = "the rest of the body"
    ANSWER = "the answer to the request"


class OpenConnections:
    """An `OpenConnections` keeps the connections of one REST port, in the order in which they are closed to make room.

    `on_refusal` is called with the reason whenever a connection is refused or closed because of a limit.
    """

    def __init__(
        self, limits: GatewayLimits, on_refusal: Callable[[ApiRefusal], None], keep_alive_s: float = 5.0
    ) -> None:
        self.limits, self.on_refusal, self.keep_alive_s = limits, on_refusal, keep_alive_s
        self.accepted: set[BoundedHttpProtocol] = set()  # all connections that were not refused
        # The accepted connections whose clients must send the next bytes; the connection on which the server has
        # waited longest comes first. A dict serves as an ordered set.
        self.waiting: dict[BoundedHttpProtocol, None] = {}


class BoundedHttpProtocol(HttpToolsProtocol):
    """A `BoundedHttpProtocol` is uvicorn's protocol of one connection, with bounds on bytes, times and connections.

    If there are too many connections, the connection that has waited longest for bytes from its client is closed. A
    connection whose request is being answered is never closed to make room.
    """

    def __init__(self, open_connections: OpenConnections, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._open, self._limits = open_connections, open_connections.limits
        self.timeout_keep_alive = open_connections.keep_alive_s  # type: ignore[assignment]  # a time for `call_later`
        self._phase, self._is_refused, self._is_muted = _Phase.IDLE, False, False
        self._phase_s = self._limits.header_s  # seconds that the present phase may last
        self._deadline: asyncio.TimerHandle | None = None  # deadline for the bytes that the server waits for
        self._write_deadline: asyncio.TimerHandle | None = None  # deadline for the client to read the response
        self._header_bytes = 0  # bytes of the complete headers of the present request
        self._unparsed_bytes = 0  # bytes received since the parser last reported a part of a request
        self._answering: RequestResponseCycle | None = None  # the request whose handler was started last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._open.accepted.add(self)
        self._enter(_Phase.IDLE, self._limits.header_s)
        self._arm()
        if len(self.connections) > 2 * self._limits.connections:  # refused connections linger, and are limited, too
            self._abort()
        elif len(self._open.accepted) > self._limits.connections:
            next(iter(self._open.waiting)).make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._leave()
        self._unset_write_deadline()
        if self._answering is not None:  # uvicorn notifies only the last of several pipelined requests
            _disconnect(self._answering)

    def make_room(self) -> None:
        """Close the connection. A client that has sent a part of a request, or just connected, gets a 503."""
        if self._phase is _Phase.IDLE and self.cycle is not None:
            self._abort()
        else:
            sentence = f"The server has {self._limits.connections} open connections and accepts no more; retry later."
            self._refuse(ApiError(ApiRefusal.UNAVAILABLE, sentence, retry_after=RETRY_AFTER_S))

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        before = self._unparsed_bytes = self._unparsed_bytes + len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._unparsed_bytes == before and before > self._limits.header_bytes:
            self._refuse(self._too_large())
        # The timer is set only here, because most requests arrive whole and go through all phases in one call.
        if self._deadline is None and self._phase is not _Phase.ANSWER and not self._is_refused:
            self._arm()

    def on_message_begin(self) -> None:
        if self._is_muted:
            return
        super().on_message_begin()
        self._header_bytes = self._unparsed_bytes = 0
        self._enter(_Phase.HEADERS, self._limits.header_s)

    def on_url(self, url: bytes) -> None:
        if not self._is_muted:
            self._count(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_muted:
            self._count(len(name) + len(value) + HEADER_OVERHEAD)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_muted:
            return
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise ValueError(f"a connection may pipeline at most {MAX_PIPELINED} requests")
        self._unparsed_bytes = 0
        self._enter(_Phase.BODY, self._limits.body_s)

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():  # the body has not been read yet, see `_ignore_upgrade`
            return
        super().on_message_complete()
        self._unparsed_bytes = 0
        if self.cycle.response_complete:
            self._enter(_Phase.IDLE, self.timeout_keep_alive)
        else:
            self._enter(_Phase.ANSWER, 0)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._set_write_deadline()
        elif not self._is_answering and self._phase is _Phase.ANSWER:
            # Until the next byte arrives, uvicorn's own timer runs, see timeout_keep_alive_handler.
            self._enter(_Phase.IDLE, self._limits.header_s)
        elif not self._is_answering:
            self._open.waiting.setdefault(self)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._set_write_deadline()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_write_deadline()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unset_write_deadline()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            is_large = self._header_bytes > self._limits.header_bytes
            self._refuse(self._too_large() if is_large else invalid("The request is not valid HTTP/1.1."))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Go on with the bytes `rest` after the headers of a request that asks for HTTP/2 or WebSocket.

        The server may ignore such a wish (RFC 9110, section 7.8), and HTTP clients of Java send it with every request.
        But the parser would treat all later bytes as another protocol. So a new parser reads `rest`. The new parser
        first gets headers that say only how the body is sent, and the events of these headers are dropped.
        """
        framing = (b"content-length", b"transfer-encoding")
        lines = [name + b": " + value for name, value in self.headers if name in framing]
        self.parser = httptools.HttpRequestParser(self)
        self._is_muted = True
        self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *(lines or [b"content-length: 0"]), b"", b""]))
        self._is_muted = False
        self._parse(rest)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _is_answering(self) -> bool:
        return self._answering is not None and not self._answering.response_complete

    @property
    def _answers_an_earlier_request(self) -> bool:
        """Return True if the client sends a request while an earlier request is being answered."""
        is_later = self._phase is _Phase.HEADERS or self.cycle is not self._answering
        return self._is_answering and is_later

    def _count(self, num_bytes: int) -> None:
        """Count bytes of headers. Raise ValueError if there are too many, which makes the parser stop."""
        self._header_bytes += num_bytes
        if self._header_bytes > self._limits.header_bytes:
            raise ValueError("the headers are too large")

    def _too_large(self) -> ApiError:
        sentence = f"The headers must be at most {self._limits.header_bytes} bytes long, but are longer."
        return ApiError(ApiRefusal.HEADERS_TOO_LARGE, sentence)

    def _enter(self, phase: _Phase, seconds: float) -> None:
        """Begin `phase`, which may last `seconds`; the caller or `data_received` sets the timer."""
        self._phase, self._phase_s = phase, seconds
        self._disarm()
        if phase is not _Phase.BODY:
            self._open.waiting.pop(self, None)  # the server begins to wait now, so the connection becomes the youngest
        if phase is not _Phase.ANSWER and not self._answers_an_earlier_request:
            self._open.waiting.setdefault(self)

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self._phase_s, self._time_out)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _time_out(self) -> None:
        self._deadline = None
        if self._answers_an_earlier_request:
            self.pipeline.clear()
            if self._answering is not None:
                self._answering.keep_alive = False
            return
        if self._phase is _Phase.IDLE:
            self._abort()
            return
        part = "headers" if self._phase is _Phase.HEADERS else "body"
        seconds = self._limits.header_s if part == "headers" else self._limits.body_s
        sentence = f"The {part} of the request must arrive within {seconds:g} s, but did not."
        self._refuse(ApiError(ApiRefusal.TIMEOUT, sentence))

    def _refuse(self, error: ApiError) -> None:
        """Send `error` unless a response has begun, and close the connection. A second refusal has no effect."""
        if self._is_refused:
            return
        self._open.on_refusal(error.refusal)
        self._is_refused = True
        self._leave()
        self._unset_keepalive_if_required()
        has_begun = self._is_answering and self._answering is not None and self._answering.response_started
        for cycle in (self._answering, self.cycle):
            if cycle is not None:
                _disconnect(cycle)
        self.pipeline.clear()
        if has_begun or self.transport.is_closing():
            self._abort()
            return
        self.flow.resume_reading()
        self.transport.write(_response(error))
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.abort)

    def _abort(self) -> None:
        self._leave()
        self.transport.abort()

    def _leave(self) -> None:
        """Stop counting the connection, so that another connection can take its place."""
        self._disarm()
        self._open.accepted.discard(self)
        self._open.waiting.pop(self, None)

    def _set_write_deadline(self) -> None:
        self._unset_write_deadline()
        self._write_deadline = self.loop.call_later(self._limits.write_s, self._stop_writing)

    def _unset_write_deadline(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _stop_writing(self) -> None:
        self._open.on_refusal(ApiRefusal.TIMEOUT)
        self._abort()


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Tell the handler of the request of `cycle` that the client is gone."""
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()


def _response(error: ApiError) -> bytes:
    body = json.dumps(error.to_json()).encode()
    status = error.refusal.status
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"{name}: {value}" for name, value in {**headers, **error.headers}.items()]
    return "\r\n".join([f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *lines, "", ""]).encode() + body
