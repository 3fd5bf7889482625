"""A `GrpcStream` speaks gRPC over one TCP connection without grpcio; it knows the HTTP/2 frames that one stream needs.

A message costs grpcio 150 to 300 µs of a core on either side, in threads that wake one another. A MoE layer of one
token needs two messages of a few hundred bytes, and there is a layer every millisecond. The same message costs 20 µs if
the thread that has the message writes it to the socket. The other side may be any gRPC client or server; a test shows
this with the client and the server of grpcio.

Sources:

- RFC 9113 (HTTP/2);
- gRPC over HTTP/2 (grpc/doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import socket
import struct
from abc import ABC, abstractmethod
from collections import deque
from urllib.parse import quote, unquote

import grpc

from services.expert.transport.header_blocks import (
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    HeaderReader,
    Headers,
    encode_headers,
)
from services.expert.transport.http2_errors import (
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    NO_ERROR,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    STREAM_CLOSED,
    ProtocolBroken,
    StreamEnded,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 3, 4, 6, 7, 8
ACK = 1  # the flag of a SETTINGS or PING frame
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 3, 4, 5
DEFAULT_WINDOW, DEFAULT_FRAME, MAX_WINDOW = 65_535, 16_384, 2**31 - 1
OUR_MAX_FRAME = 1 << 20
MIN_MAX_FRAME, MAX_MAX_FRAME = 1 << 14, (1 << 24) - 1  # allowed values of the setting MAX_FRAME_SIZE
RENEW_WINDOW_AT = 1 << 30  # bytes received after which the windows of the other side are widened again
# An idle frame brings less than MIN_DATA bytes of a message. Clients send about one idle frame per megabyte of data. A
# peer that sends more of them in a row, until a message is complete, would keep the thread busy with frames.
MAX_IDLE_FRAMES, MIN_DATA = 10_000, 64
HEADER = struct.Struct(">HBBBI")  # header of a frame: length in 16 + 8 bits, type, flags, stream
KEEPALIVE_S, KEEPALIVE_PROBES = 10, 3  # a host that is gone is noticed after 40 s without traffic
USER_TIMEOUT_MS = 30_000  # milliseconds for the kernel of the other side to acknowledge written bytes
SETTING = struct.Struct(">HI")  # name and value of a setting
PREFIX = struct.Struct(">BI")  # prefix of a gRPC message: whether the message is compressed, and its length
PREFIX_LEN = PREFIX.size
WHOLE = struct.Struct(">HBBBIBI")  # HEADER and PREFIX of a frame with one whole message

FRAME_LENGTHS = {RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}  # payload bytes of frames that have a fixed length
FRAMES_OF_STREAMS, FRAMES_OF_CONNECTIONS = (DATA, HEADERS, RST_STREAM, CONTINUATION), (SETTINGS, PING, GOAWAY)
FRAMES_OF_OPENED_STREAMS = DATA, RST_STREAM, WINDOW_UPDATE

POST, SUCCESS = (":method", "POST"), (":status", "200")
GRPC = ("content-type", "application/grpc")
STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED.value[0]


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    length = len(payload)
    return HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id) + payload


def _settings(*pairs: tuple[int, int]) -> bytes:
    return _frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*pair) for pair in pairs))


def _grow_window(stream_id: int, num_bytes: int) -> bytes:
    return _frame(WINDOW_UPDATE, 0, stream_id, num_bytes.to_bytes(4, "big"))


OPENING = _settings((INITIAL_WINDOW_SIZE, MAX_WINDOW), (MAX_FRAME_SIZE, OUR_MAX_FRAME)) + _grow_window(
    0, MAX_WINDOW - DEFAULT_WINDOW
)


class GrpcStream(ABC):
    """A `GrpcStream` is one end of a gRPC stream, without the socket.

    The class turns the bytes given to `receive` into messages, and collects the bytes to be written in `unsent`.
    """

    def __init__(self, max_message: int) -> None:
        self.max_message = max_message
        self.unsent = bytearray()
        self.is_greeted = False  # the other side has sent its settings
        self.failure: StreamEnded | None = None  # why no further messages can come
        self.is_ended = False  # the other side will send no more messages
        self._stream_id = 0  # the stream in use, or 0
        self._newest_stream_id = 0  # the newest stream that was opened on the connection
        self._headers = HeaderReader()
        self._buffer = bytearray()  # the part of a frame that has come so far
        self._buffer_needs = HEADER.size  # bytes that `_buffer` must have before a frame can be read
        self._message = bytearray()  # the part of a message that has come so far
        self._message_needs = PREFIX_LEN  # bytes that `_message` must have before a message can be read
        self._num_idle_frames = 0  # idle frames since the last message
        self._held_back: deque[memoryview] = deque()  # messages that the windows of the other side have no room for
        self._num_held_back = 0  # bytes of all messages in `_held_back`
        self._connection_window = self._stream_window = self._initial_window = DEFAULT_WINDOW
        self._max_frame = DEFAULT_FRAME
        self._num_taken = self._num_taken_of_ours = 0  # bytes received since the windows were last widened

    @property
    def num_unsent(self) -> int:
        """Return the number of bytes that wait for the socket or for the windows of the other side."""
        return len(self.unsent) + self._num_held_back

    def send(self, message: bytes) -> None:
        size = len(message) + PREFIX_LEN
        if self._held_back or size > min(self._max_frame, self._connection_window, self._stream_window):
            self._held_back.append(memoryview(PREFIX.pack(0, len(message)) + message))
            self._num_held_back += size
            self._release()
        else:
            self.unsent += WHOLE.pack(size >> 8, size & 0xFF, DATA, 0, self._stream_id, 0, len(message)) + message
            self._connection_window -= size
            self._stream_window -= size

    def receive(self, data: bytes) -> list[bytes]:
        """Return the messages that `data` completes; raise StreamEnded if there are none and none can come any more.

        If messages come right before the end, they are returned, `failure` is set, and the next call raises the error.
        If the other side broke a rule, `unsent` then ends with a GOAWAY frame that says which rule.
        """
        if self.failure is not None:
            raise self.failure
        if (message := self._only_message(data)) is not None:
            return [message]
        messages = list[bytes]()
        try:
            self._read_frames(data, messages)
        except StreamEnded as error:
            if isinstance(error, ProtocolBroken):
                last_stream, sentence = self._newest_stream_id.to_bytes(4, "big"), str(error).encode()
                self.unsent += _frame(GOAWAY, 0, 0, last_stream + error.code.to_bytes(4, "big") + sentence)
            self.failure = error
            if not messages:
                raise
        return messages

    def _read_frames(self, data: bytes, messages: list[bytes]) -> None:
        if self._buffer:  # the buffer is copied once per frame, so bytes that trickle in stay cheap
            self._buffer += data
            if len(self._buffer) < self._buffer_needs:
                return
            data = bytes(self._buffer)
        start = 0
        self._buffer_needs = HEADER.size
        while len(data) - start >= HEADER.size:
            high, low, kind, flags, stream_id = HEADER.unpack_from(data, start)
            length = high << 8 | low
            self._check_frame(kind, flags, stream_id & MAX_WINDOW, length)
            end = start + HEADER.size + length
            if end > len(data):
                self._buffer_needs = end - start
                break
            self._take(kind, flags, stream_id & MAX_WINDOW, data[start + HEADER.size : end], messages)
            start = end
        self._buffer = bytearray(data[start:])

    def _check_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Raise ProtocolBroken if a frame with this header may not be sent, whatever the frame's payload is."""
        limit = OUR_MAX_FRAME if kind == DATA else DEFAULT_FRAME
        if length > limit:
            raise ProtocolBroken(
                FRAME_SIZE_ERROR, f"a frame of type {kind} and {length} bytes came, but at most {limit} are allowed"
            )
        expected = 0 if kind == SETTINGS and flags & ACK else FRAME_LENGTHS.get(kind, length)
        if length != expected:
            raise ProtocolBroken(
                FRAME_SIZE_ERROR, f"a frame of type {kind} and {length} bytes came, but this type has {expected}"
            )
        if kind in FRAMES_OF_STREAMS and not stream_id:
            raise ProtocolBroken(PROTOCOL_ERROR, f"a frame of type {kind} came outside of any stream")
        if kind in FRAMES_OF_CONNECTIONS and stream_id:
            raise ProtocolBroken(
                PROTOCOL_ERROR, f"a frame of type {kind} came on stream {stream_id}, but belongs to no stream"
            )
        if kind in FRAMES_OF_OPENED_STREAMS and stream_id > self._newest_stream_id:
            raise ProtocolBroken(
                PROTOCOL_ERROR, f"a frame of type {kind} came on stream {stream_id}, which nobody has opened"
            )
        self._headers.check_order(kind, stream_id)

    def _only_message(self, data: bytes) -> bytes | None:
        """Return the message if `data` is one whole frame with one whole message, else None.

        Most received data is of this kind, so this fast path saves time.
        """
        if self._buffer or self._message or self.is_ended or self._headers.open_stream_id or len(data) < WHOLE.size:
            return None
        high, low, kind, flags, stream_id, compressed, length = WHOLE.unpack_from(data)
        size = high << 8 | low
        if kind != DATA or flags or stream_id != self._stream_id or compressed or size != length + PREFIX_LEN:
            return None
        if len(data) != HEADER.size + size or size > OUR_MAX_FRAME or length > self.max_message or not stream_id:
            return None
        self._num_idle_frames = 0
        self._make_room(size, is_ours=True)
        return data[WHOLE.size :]

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes, messages: list[bytes]) -> None:
        if kind != DATA or len(payload) < MIN_DATA:
            self._count_idle_frame()
        is_ours = stream_id == self._stream_id
        if kind == DATA:
            self._make_room(len(payload), is_ours)
            if is_ours:
                self._take_data(flags, payload, messages)
        elif kind in (HEADERS, CONTINUATION):
            if headers := self._headers.read(kind, flags, stream_id, payload):
                self._take_headers(headers)
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
        elif kind == PING and not flags & ACK:
            self.unsent += _frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE:
            self._widen(stream_id, int.from_bytes(payload, "big") & MAX_WINDOW)
        elif kind == RST_STREAM and is_ours:
            raise StreamEnded(f"the other side reset the stream (code {int.from_bytes(payload, 'big')})")
        elif kind == GOAWAY and (code := int.from_bytes(payload[4:8], "big")) != NO_ERROR:
            raise StreamEnded(f"the other side is going away (code {code}): {payload[8:108].decode(errors='replace')}")

    def _count_idle_frame(self) -> None:
        """Count a frame that brings little or nothing; raise ProtocolBroken if there were too many in a row."""
        self._num_idle_frames += 1
        if self._num_idle_frames > MAX_IDLE_FRAMES:
            raise ProtocolBroken(ENHANCE_YOUR_CALM, f"{MAX_IDLE_FRAMES} frames came without a message between them")

    @abstractmethod
    def _take_headers(self, headers: Headers) -> None:
        """Handle a complete header block of any stream; raise StreamEnded if no further messages can come."""

    def _make_room(self, num_bytes: int, is_ours: bool) -> None:
        """Count received bytes, and widen the windows of the other side when they have become narrow.

        The data of a refused stream (`is_ours` is False) counts for the window of the connection, but not for the
        window of the stream.
        """
        self._num_taken += num_bytes
        self._num_taken_of_ours += num_bytes if is_ours else 0
        if self._num_taken >= RENEW_WINDOW_AT:
            self.unsent += _grow_window(0, self._num_taken)
            if self._num_taken_of_ours:  # an increment of 0 is an error in HTTP/2
                self.unsent += _grow_window(self._stream_id, self._num_taken_of_ours)
            self._num_taken = self._num_taken_of_ours = 0

    def _take_data(self, flags: int, payload: bytes, messages: list[bytes]) -> None:
        if self.is_ended:
            raise ProtocolBroken(STREAM_CLOSED, "data came after the end of the stream")
        if flags & PADDED:
            if not payload or payload[0] >= len(payload):
                raise ProtocolBroken(
                    PROTOCOL_ERROR, f"a frame of {len(payload)} bytes is padded with more than it holds"
                )
            payload = payload[1 : len(payload) - payload[0]]
        self.is_ended = bool(flags & END_STREAM)
        if self._message:
            self._message += payload
            if len(self._message) < self._message_needs:
                return
            payload = bytes(self._message)
        start, self._message_needs = 0, PREFIX_LEN
        while len(payload) - start >= PREFIX_LEN:
            length = int.from_bytes(payload[start + 1 : start + PREFIX_LEN], "big")
            if payload[start] or length > self.max_message:
                raise ProtocolBroken(
                    PROTOCOL_ERROR, f"a message is compressed, or its {length} bytes are over {self.max_message}"
                )
            end = start + PREFIX_LEN + length
            if end > len(payload):
                self._message_needs = end - start
                break
            messages.append(payload[start + PREFIX_LEN : end])
            self._num_idle_frames = 0
            start = end
        self._message = bytearray(payload[start:])

    def _take_settings(self, payload: bytes) -> None:
        if len(payload) % SETTING.size:
            raise ProtocolBroken(
                FRAME_SIZE_ERROR, f"settings of {len(payload)} bytes came, but each has {SETTING.size}"
            )
        for name, value in SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise ProtocolBroken(FLOW_CONTROL_ERROR, f"an initial window of {value} bytes is over {MAX_WINDOW}")
                self._stream_window += value - self._initial_window
                self._initial_window = value
            elif name == MAX_FRAME_SIZE:
                if not MIN_MAX_FRAME <= value <= MAX_MAX_FRAME:
                    bounds = f"outside of {MIN_MAX_FRAME} to {MAX_MAX_FRAME}"
                    raise ProtocolBroken(PROTOCOL_ERROR, f"a maximum frame of {value} bytes is {bounds}")
                self._max_frame = value
        self.is_greeted = True
        self.unsent += _frame(SETTINGS, ACK, 0)
        self._release()

    def _widen(self, stream_id: int, num_bytes: int) -> None:
        if not num_bytes:
            raise ProtocolBroken(PROTOCOL_ERROR, f"a window of stream {stream_id} was widened by 0 bytes")
        if stream_id == 0:
            self._connection_window += num_bytes
        elif stream_id == self._stream_id:
            self._stream_window += num_bytes
        if max(self._connection_window, self._stream_window) > MAX_WINDOW:
            raise ProtocolBroken(FLOW_CONTROL_ERROR, f"a window was widened to more than {MAX_WINDOW} bytes")
        self._release()

    def _release(self) -> None:
        """Move held-back messages to `unsent` in frames, as far as the other side's windows have room."""
        while self._held_back:
            data = self._held_back[0]
            size = min(len(data), self._max_frame, self._connection_window, self._stream_window)
            if size <= 0:
                return
            self.unsent += _frame(DATA, 0, self._stream_id, bytes(data[:size]))
            self._connection_window -= size
            self._stream_window -= size
            self._num_held_back -= size
            if size == len(data):
                self._held_back.popleft()
            else:
                self._held_back[0] = data[size:]


class ClientStream(GrpcStream):
    """A `ClientStream` is the client's end of a stream; it opens the stream of the rpc `path`."""

    def __init__(self, path: str, authority: str, max_message: int) -> None:
        super().__init__(max_message)
        self._stream_id = self._newest_stream_id = 1
        names = (":scheme", "http"), (":path", path), (":authority", authority), GRPC, ("te", "trailers")
        self.unsent += PREFACE + OPENING + _frame(HEADERS, END_HEADERS, 1, encode_headers(POST, *names))

    def _take_headers(self, headers: Headers) -> None:
        if headers.stream_id != self._stream_id:
            raise ProtocolBroken(PROTOCOL_ERROR, f"headers came on stream {headers.stream_id}, which nobody has opened")
        status = headers.fields.get(":status", "200")
        if status != "200":
            raise StreamEnded(f"the other side answered with HTTP status {status}")
        if headers.ends_stream:  # headers that end the stream are the trailers
            raise StreamEnded(f"the other side ended the stream{_status_text(headers.fields)}")


def _status_text(trailers: dict[str, str]) -> str:
    """Return the gRPC status of `trailers` in words, or an empty text if there is none."""
    status = trailers.get("grpc-status", "")
    if not status.isdecimal():
        return ""
    message = unquote(trailers.get("grpc-message", ""))[:200]
    return f" with status {STATUS_NAMES.get(int(status), status)}" + (f": {message}" if message else "")


class ServerStream(GrpcStream):
    """A `ServerStream` is the server's end of a connection; it serves one stream of the rpc `path` at a time.

    A stream of another rpc is answered with UNIMPLEMENTED. While a stream is open, further streams are refused.
    """

    def __init__(self, path: str, max_message: int) -> None:
        super().__init__(max_message)
        self._path = path
        self._preface = b""
        self._is_ending = self._has_told_end = False
        self.unsent += _settings((MAX_CONCURRENT_STREAMS, 1)) + OPENING

    def receive(self, data: bytes) -> list[bytes]:
        if len(self._preface) < len(PREFACE):
            missing = len(PREFACE) - len(self._preface)
            self._preface, data = self._preface + data[:missing], data[missing:]
            if not PREFACE.startswith(self._preface):
                raise StreamEnded("the other side does not speak HTTP/2 without TLS")
        return super().receive(data)

    def end(self) -> None:
        """Tell the client, once and after the last reply, that nothing more will come and that the rpc succeeded."""
        self._is_ending = True
        self._release()

    def _release(self) -> None:
        super()._release()
        if self._is_ending and not self._held_back and not self._has_told_end:
            self._has_told_end = True
            trailers = encode_headers(("grpc-status", "0"))
            self.unsent += _frame(HEADERS, END_HEADERS | END_STREAM, self._stream_id, trailers)
            self.unsent += _frame(GOAWAY, 0, 0, self._stream_id.to_bytes(4, "big") + bytes(4))

    def _take_headers(self, headers: Headers) -> None:
        stream_id, fields, ends_stream = headers
        if not stream_id % 2:
            raise ProtocolBroken(PROTOCOL_ERROR, f"a client opened stream {stream_id}, but its streams have odd ids")
        if stream_id == self._stream_id:
            self._take_trailers(ends_stream)
        elif stream_id <= self._newest_stream_id:
            raise ProtocolBroken(STREAM_CLOSED, f"headers came on stream {stream_id}, which has ended")
        else:
            self._newest_stream_id = stream_id
            if self._stream_id or self._is_ending:
                self.unsent += _frame(RST_STREAM, 0, stream_id, REFUSED_STREAM.to_bytes(4, "big"))
            elif refusal := self._refusal(fields):
                self.unsent += _frame(HEADERS, END_HEADERS | END_STREAM, stream_id, encode_headers(*refusal))
                if not ends_stream:  # tells the client not to send the rest of its requests
                    self.unsent += _frame(RST_STREAM, 0, stream_id, NO_ERROR.to_bytes(4, "big"))
            else:
                self._stream_id, self.is_ended = stream_id, ends_stream
                self.unsent += _frame(HEADERS, END_HEADERS, stream_id, encode_headers(SUCCESS, GRPC))

    def _take_trailers(self, ends_stream: bool) -> None:
        if self.is_ended:
            raise ProtocolBroken(STREAM_CLOSED, "headers came after the end of the stream")
        if not ends_stream:
            raise ProtocolBroken(PROTOCOL_ERROR, "headers came in the middle of the stream")
        self.is_ended = True

    def _refusal(self, fields: dict[str, str]) -> tuple[tuple[str, str], ...]:
        """Return the headers that refuse a new stream with these headers, or an empty tuple."""
        if fields.get(":method") != "POST" or not fields.get("content-type", "").startswith(GRPC[1]):
            return ((":status", "415"),)
        detail, path, encoding = "", fields.get(":path", ""), fields.get("grpc-encoding", "identity")
        if path != self._path:
            detail = f"The rpc {path[:200]} is not served here; {self._path} is."
        elif encoding != "identity":
            detail = f"The message encoding {encoding[:50]} is not supported; identity is."
        if not detail:
            return ()
        message = ("grpc-message", quote(detail, safe=" /;,.-"))
        return SUCCESS, GRPC, ("grpc-accept-encoding", "identity"), ("grpc-status", str(UNIMPLEMENTED)), message


class GrpcSocket:
    """A `GrpcSocket` combines a stream with its TCP socket; no method of the class waits."""

    RECEIVE_BYTES = 1 << 18

    def __init__(self, tcp_socket: socket.socket, stream: GrpcStream) -> None:
        tcp_socket.setblocking(False)
        tcp_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.tcp_socket, self.stream = tcp_socket, stream

    @property
    def has_unsent(self) -> bool:
        """Return True if the socket must become writable before `flush` can write the rest."""
        return bool(self.stream.unsent)

    def send(self, message: bytes) -> None:
        """Write as many bytes as the socket takes now, and leave the rest to `flush`.

        Raise OSError if the other side is gone.
        """
        self.stream.send(message)
        unsent = self.stream.unsent
        if not unsent:
            return
        try:
            num_sent = self.tcp_socket.send(unsent)
        except BlockingIOError:
            return
        if num_sent == len(unsent):
            unsent.clear()
        else:
            del unsent[:num_sent]
            self.flush()

    def flush(self) -> None:
        """Write as many of the unsent bytes as the socket takes now; raise OSError if the other side is gone."""
        unsent = self.stream.unsent
        try:  # `suppress` would take longer, and this runs for every message
            while unsent:
                del unsent[: self.tcp_socket.send(unsent)]
        except BlockingIOError:
            pass

    def receive(self) -> list[bytes]:
        """Return the messages that have come; raise StreamEnded or OSError if no further messages can come.

        If messages are returned and no further messages can come, `stream.failure` is set.
        """
        try:
            data = self.tcp_socket.recv(self.RECEIVE_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise StreamEnded("the other side closed the connection")
        try:
            return self.stream.receive(data)
        finally:
            if self.stream.unsent:  # acknowledgements, and messages that wider windows have room for
                self.flush()

    def close(self) -> None:
        self.tcp_socket.close()


def keep_alive(tcp_socket: socket.socket) -> None:
    """Make the kernel notice when the other host is gone; the caller has to notice a process that hangs."""
    tcp_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
    ):
        if hasattr(socket, name):  # Linux has all of these options
            tcp_socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
