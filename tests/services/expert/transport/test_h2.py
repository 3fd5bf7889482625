"""These tests exchange frames with h2, an HTTP/2 of another author, which checks every frame that it receives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes, Settings

from services.expert.transport.http2 import ClientStream, GrpcStream, ServerStream
from services.expert.transport.http2_errors import StreamEnded as EndOfStream
from services.expert.transport.wire import COMPUTE_PATH

MAX = 1 << 20
MESSAGES = [b"", b"a", b"b" * 300, b"c" * 5000, b"d" * 70_000]
FIELDS = [(":method", "POST"), (":scheme", "http"), (":path", COMPUTE_PATH), (":authority", "h")]
FIELDS += [("content-type", "application/grpc+proto"), ("te", "trailers")]


def prefixed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def h2_connection(is_client: bool, window: int = 65_535) -> H2Connection:
    connection = H2Connection(H2Configuration(client_side=is_client, header_encoding="utf-8"))
    values = {SettingCodes.INITIAL_WINDOW_SIZE: window}
    connection.local_settings = Settings(client=is_client, initial_values=values)
    connection.initiate_connection()
    return connection


class Exchange:
    """An `Exchange` moves bytes between `ours` and `theirs` until both are silent, `piece` bytes at a time."""

    def __init__(self, ours: GrpcStream, theirs: H2Connection, piece: int = MAX) -> None:
        self.ours, self.theirs, self.piece = ours, theirs, piece
        self.messages, self.events, self.data = list[bytes](), list[Event](), bytearray()

    def run(self) -> None:
        while (from_them := self.theirs.data_to_send()) or self.ours.unsent:
            for start in range(0, len(from_them), self.piece):
                self.messages += self.ours.receive(from_them[start : start + self.piece])
            from_us = bytes(self.ours.unsent)
            self.ours.unsent.clear()
            for start in range(0, len(from_us), self.piece):
                self._give(from_us[start : start + self.piece])

    def _give(self, data: bytes) -> None:
        for event in self.theirs.receive_data(data):
            self.events.append(event)
            if isinstance(event, DataReceived):
                self.data += event.data
                if event.flow_controlled_length:
                    self.theirs.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    def send(self, data: bytes, padding: int | None = None) -> None:
        """Let the other side send `data` on stream 1, in frames as large as the windows and frame sizes allow."""
        while data:
            overhead = 0 if padding is None else padding + 1
            size = min(self.theirs.local_flow_control_window(1), self.theirs.max_outbound_frame_size) - overhead
            assert size > 0
            self.theirs.send_data(1, data[:size], pad_length=padding)
            data = data[size:]
            self.run()


@pytest.mark.parametrize("piece", [1, 10, MAX])
@pytest.mark.parametrize("window", [1, 1000, 65_535, 2**31 - 1])
def test_a_client_of_h2_gets_every_reply_and_then_the_end(window: int, piece: int) -> None:
    server, client = ServerStream(COMPUTE_PATH, MAX), h2_connection(True, window)
    exchange = Exchange(server, client, piece)
    client.send_headers(1, FIELDS)
    exchange.run()
    exchange.send(b"".join(map(prefixed, MESSAGES)))
    client.end_stream(1)
    messages = MESSAGES[: 3 if window == 1 else None]
    for message in messages:
        server.send(message)
    server.end()
    exchange.run()
    assert exchange.messages == MESSAGES
    assert exchange.data == b"".join(map(prefixed, messages))
    kinds = [type(event) for event in exchange.events]
    assert kinds.index(ResponseReceived) < kinds.index(TrailersReceived) < kinds.index(StreamEnded)
    [trailers] = [event for event in exchange.events if isinstance(event, TrailersReceived)]
    assert trailers.headers == [("grpc-status", "0")]


@pytest.mark.parametrize("piece", [1, 10, MAX])
@pytest.mark.parametrize("padding", [None, 0, 255])
def test_padding_is_no_part_of_a_message(padding: int | None, piece: int) -> None:
    server, client = ServerStream(COMPUTE_PATH, MAX), h2_connection(True)
    exchange = Exchange(server, client, piece)
    client.send_headers(1, FIELDS, priority_weight=16)
    exchange.run()
    exchange.send(b"".join(map(prefixed, MESSAGES)), padding)
    assert exchange.messages == MESSAGES


@pytest.mark.parametrize("piece", [1, MAX])
def test_a_header_block_may_come_in_several_frames(piece: int) -> None:
    server, client = ServerStream(COMPUTE_PATH, MAX), h2_connection(True)
    exchange = Exchange(server, client, piece)
    client.send_headers(1, [*FIELDS, ("x-long", "~" * 20_000)])  # more than a frame of 16,384 bytes holds
    exchange.run()
    exchange.send(prefixed(b"hello"))
    assert exchange.messages == [b"hello"]
    assert any(isinstance(event, ResponseReceived) for event in exchange.events)


def test_streams_of_other_rpcs_are_answered_one_after_the_other() -> None:
    """The headers of later streams refer to the dynamic table, which the server therefore has to keep."""
    server, client = ServerStream(COMPUTE_PATH, MAX), h2_connection(True)
    exchange = Exchange(server, client)
    others = [(name, "/other.Service/Rpc" if name == ":path" else value) for name, value in FIELDS]
    for stream_id in (1, 3, 5):
        client.send_headers(stream_id, others, end_stream=stream_id == 5)
        exchange.run()
    answers = [event for event in exchange.events if isinstance(event, ResponseReceived)]
    assert [dict(answer.headers)["grpc-status"] for answer in answers] == ["12"] * 3
    assert [event.stream_id for event in exchange.events if isinstance(event, StreamReset)] == [1, 3]
    client.send_headers(7, FIELDS)
    client.send_data(7, prefixed(b"hello"))
    exchange.run()
    assert exchange.messages == [b"hello"]


@pytest.mark.parametrize("piece", [1, 10, MAX])
@pytest.mark.parametrize("window", [1, 1000, 65_535])
def test_a_server_of_h2_gets_every_request_of_our_client(window: int, piece: int) -> None:
    client, server = ClientStream(COMPUTE_PATH, "h", MAX), h2_connection(False, window)
    exchange = Exchange(client, server, piece)
    exchange.run()
    messages = MESSAGES[: 3 if window == 1 else None]
    for message in messages:
        client.send(message)
    exchange.run()
    assert exchange.data == b"".join(map(prefixed, messages))
    server.send_headers(1, [(":status", "200"), ("content-type", "application/grpc")])
    exchange.send(b"".join(map(prefixed, MESSAGES)))
    assert exchange.messages == MESSAGES
    server.send_headers(1, [("grpc-status", "14"), ("grpc-message", "going%20away")], end_stream=True)
    with pytest.raises(EndOfStream, match="ended the stream with status UNAVAILABLE: going away"):
        exchange.run()


@pytest.mark.parametrize("is_client", [True, False])
def test_a_connection_ends_with_the_reason_that_h2_understands(is_client: bool) -> None:
    make: Callable[[], GrpcStream]
    make = (lambda: ClientStream(COMPUTE_PATH, "h", MAX)) if is_client else (lambda: ServerStream(COMPUTE_PATH, MAX))
    ours, theirs = make(), h2_connection(not is_client)
    exchange = Exchange(ours, theirs)
    exchange.run()
    with pytest.raises(EndOfStream, match="a frame of type 6 and 3 bytes came"):
        ours.receive(b"\0\0\3\6\0\0\0\0\0abc")
    [event] = theirs.receive_data(bytes(ours.unsent))
    assert (event.error_code, event.additional_data[:17]) == (6, b"a frame of type 6")  # type: ignore[attr-defined]
