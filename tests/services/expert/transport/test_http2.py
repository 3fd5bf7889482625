"""These tests exchange HTTP/2 frames with grpcio in both directions, and check how bad bytes are refused."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import grpc
import numpy as np
import pytest
import torch

from cluster.topology import Placement, Shard
from model.family import ModelFamily
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from services.expert.client import CallPolicy, RemoteExperts
from services.expert.transport import http2
from services.expert.transport.header_blocks import encode_headers
from services.expert.transport.http2 import PREFACE, ClientStream, GrpcSocket, GrpcStream, ServerStream
from services.expert.transport.http2_errors import StreamEnded
from services.expert.transport.wire import COMPUTE_PATH
from tests.services.expert.checkpoint import LATENT
from tests.services.expert.requests import make_request
from tests.services.expert.shard_process import ShardProcess
from tests.services.expert.test_client import everywhere, fill, make_rows

MAX = 1 << 20


@pytest.fixture(scope="module")
def shard(model_dir: Path) -> Iterator[Shard]:
    with ShardProcess(model_dir, 1) as process:
        fill(process.shards, everywhere([process.shards[0].id]))
        yield process.shards[0]


def exchange(client: GrpcStream, server: GrpcStream, piece: int = 1 << 20) -> tuple[list[bytes], list[bytes]]:
    """Move bytes between `client` and `server`, at most `piece` bytes at a time, until both have sent everything.

    Return the pair (messages that the client received, messages that the server received).
    """
    at_client, at_server = list[bytes](), list[bytes]()
    while client.unsent or server.unsent:
        for sender, receiver, messages in ((client, server, at_server), (server, client, at_client)):
            data = bytes(sender.unsent[:piece])
            del sender.unsent[:piece]
            messages += receiver.receive(data)
    return at_client, at_server


def pair() -> tuple[ClientStream, ServerStream]:
    return ClientStream(COMPUTE_PATH, "host:1", MAX), ServerStream(COMPUTE_PATH, MAX)


# Our client and our server against grpcio -----------------------------------------------------------------------------


def test_grpcios_client_is_answered_at_the_compute_endpoint(shard: Shard) -> None:
    requests = [make_request(id=n) for n in range(1, 50)] + [make_request((77,), id=50)]
    with grpc.insecure_channel(shard.compute_endpoint) as channel:
        replies = list(expert_pb2_grpc.ExpertStub(channel).Compute(iter(requests)))  # type: ignore[no-untyped-call]
    assert sorted(reply.id for reply in replies) == list(range(1, 51))
    assert {reply.WhichOneof("outcome") for reply in replies if reply.id < 50} == {"sums"}
    [refused] = [reply for reply in replies if reply.id == 50]
    assert refused.refusal.code == pb.Refusal.BAD_SHAPE


def test_grpcios_server_answers_our_client(shard: Shard, family: ModelFamily) -> None:
    """Send a message of many frames. The message is larger than the flow-control windows of grpcio's server."""
    local = family.load_local_experts(torch.float32)
    # On a busy machine, a reply may come seconds late. With the default limits, the client would then open the shard's
    # circuit and send a probe, or send the rows again. Here no reply counts as late, so every call is one message.
    patient = CallPolicy(timeout_s=60.0, stall_s=60.0, hedge_floor_s=60.0, piece_bytes=8 << 20)
    remote = RemoteExperts(patient)
    remote.update(Placement(1, everywhere([shard.id]), local.gains), [replace(shard, compute_endpoint="")])
    for num_rows in (1, 3, 5000):
        rows = make_rows(num_rows)
        assert torch.equal(remote(1, *rows)(), local(1, *rows)())
    assert remote.traffic.num_sent == 3
    remote.close()


@pytest.mark.parametrize("num_rows", [1600, 16_000])
def test_grpcios_client_with_narrow_windows_gets_every_reply_before_the_end(shard: Shard, num_rows: int) -> None:
    """The client ends its side first, so the server ends the stream while replies still wait for the windows."""
    options = [("grpc.http2.lookahead_bytes", 65_535), ("grpc.http2.bdp_probe", 0)]
    options += [("grpc.max_receive_message_length", -1)]
    requests = [many_rows(n, num_rows) for n in range(1, 5)]
    with grpc.insecure_channel(shard.compute_endpoint, options) as channel:
        replies = list(expert_pb2_grpc.ExpertStub(channel).Compute(iter(requests)))  # type: ignore[no-untyped-call]
    assert [(reply.id, len(reply.sums.data)) for reply in replies] == [(n, 8 * LATENT * num_rows) for n in range(1, 5)]


def many_rows(request_id: int, num_rows: int) -> pb.ComputeRequest:
    """Return a request whose sums need 8 bytes each, because its grid is fine."""
    return make_request(
        id=request_id,
        num_rows=num_rows,
        rows=np.ones((num_rows, LATENT), "<f4").tobytes(),
        grid=np.full(num_rows, -40, "<i2").tobytes(),
        pick_rows=np.arange(num_rows, dtype="<i4").tobytes(),
        pick_experts=np.zeros(num_rows, "<i4").tobytes(),
        pick_weights=np.ones(num_rows, "<f4").tobytes(),
    )


def test_another_rpc_is_not_implemented_and_the_connection_stays_usable(shard: Shard) -> None:
    with grpc.insecure_channel(shard.compute_endpoint) as channel:
        call = channel.stream_stream("/expertmesh.expert.v1.Expert/Status")
        with pytest.raises(grpc.RpcError) as raised:
            list(call(iter([b"x"])))
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
        sentence = f"The rpc /expertmesh.expert.v1.Expert/Status is not served here; {COMPUTE_PATH} is."
        assert raised.value.details() == sentence
        replies = list(expert_pb2_grpc.ExpertStub(channel).Compute(iter([make_request(id=1)])))  # type: ignore[no-untyped-call]
    assert [reply.id for reply in replies] == [1]


def test_compressed_requests_are_not_implemented(shard: Shard) -> None:
    with (
        grpc.insecure_channel(shard.compute_endpoint, compression=grpc.Compression.Gzip) as channel,
        pytest.raises(grpc.RpcError) as raised,
    ):
        list(expert_pb2_grpc.ExpertStub(channel).Compute(iter([make_request(id=1)])))  # type: ignore[no-untyped-call]
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert raised.value.details() == "The message encoding gzip is not supported; identity is."


def receive_for_ever(client: GrpcSocket) -> NoReturn:
    while True:
        client.receive()


def test_our_client_tells_the_status_of_grpcios_server() -> None:
    """The server has no service, so it answers with UNIMPLEMENTED."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = GrpcSocket(socket.create_connection(("127.0.0.1", port)), ClientStream(COMPUTE_PATH, "localhost", MAX))
    client.flush()
    with pytest.raises(StreamEnded, match="ended the stream with status UNIMPLEMENTED: Method not found!"):
        receive_for_ever(client)
    client.close()
    server.stop(None)


# Our client and our server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 4096, 1 << 20])
def test_messages_arrive_whole_and_in_order_however_they_are_cut(piece: int) -> None:
    client, server = pair()
    sent = [b"", b"a", b"b" * 5000, b"c" * 40_000]
    for message in sent:
        client.send(message)
    assert exchange(client, server, piece) == ([], sent)
    for message in sent:
        server.send(message)
    assert exchange(client, server, piece) == (sent, [])


def test_what_a_window_has_no_room_for_waits() -> None:
    client, _ = pair()
    client.send(bytes(100_000))
    assert client.num_unsent - len(client.unsent) == 100_000 + 5 - 65_535
    server = ServerStream(COMPUTE_PATH, MAX)  # the server's first frames enlarge the client's window
    assert exchange(client, server) == ([], [bytes(100_000)])
    assert client.num_unsent == 0


def test_the_end_is_told_after_the_last_reply() -> None:
    client, server = pair()
    server.receive(bytes(client.unsent))  # the client's frames enlarge the windows of the server only up to here
    server.receive(frame(4, 0, b"\0\4\0\0\0\0"))  # the window of the stream is narrower by what it was wider before
    server.send(b"r" * 1000)
    server.end()
    before = bytes(server.unsent)
    assert client.receive(before) == []
    server.unsent.clear()
    server.receive(frame(8, 1, (2000).to_bytes(4, "big")))
    data, end = bytes(server.unsent)[: 9 + 1005], bytes(server.unsent)[9 + 1005 :]
    assert client.receive(data) == [b"r" * 1000]
    with pytest.raises(StreamEnded, match="the other side ended the stream with status OK"):
        client.receive(end)


def test_a_reply_right_before_the_end_arrives() -> None:
    client, server = pair()
    server.receive(bytes(client.unsent))
    server.send(b"last")
    server.end()
    assert client.receive(bytes(server.unsent)) == [b"last"]
    assert "status OK" in str(client.failure)
    with pytest.raises(StreamEnded, match="status OK"):
        client.receive(b"")


def test_our_client_tells_which_http_status_came() -> None:
    client, _ = pair()
    with pytest.raises(StreamEnded, match="the other side answered with HTTP status 503"):
        client.receive(frame(1, 1, encode_headers((":status", "503")), flags=4))


@pytest.mark.parametrize(("method", "content_type"), [("GET", "application/grpc"), ("POST", "text/html")])
def test_what_is_no_grpc_request_is_an_unsupported_media_type(method: str, content_type: str) -> None:
    server = ServerStream(COMPUTE_PATH, MAX)
    server.unsent.clear()
    fields = (":method", method), (":scheme", "http"), (":path", COMPUTE_PATH), ("content-type", content_type)
    server.receive(PREFACE + frame(1, 1, encode_headers(*fields), flags=5))
    assert server.unsent == frame(1, 1, encode_headers((":status", "415")), flags=5)


def frame(kind: int, stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, stream_id) + payload


def header_block(path: str = COMPUTE_PATH, **more: str) -> bytes:
    fields = {":method": "POST", ":scheme": "http", ":path": path, "content-type": "application/grpc"}
    return encode_headers(*(fields | {name.replace("_", "-"): value for name, value in more.items()}).items())


BLOCK = header_block()
OPENED = PREFACE + frame(1, 1, BLOCK, flags=4)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "does not speak HTTP/2"),
        (OPENED + frame(0, 1, b"\1\0\0\0\1x"), "a message is compressed"),
        (OPENED + frame(0, 1, b"\0" + (MAX + 1).to_bytes(4, "big")), "1048577 bytes are over 1048576"),
        (PREFACE + struct.pack(">HBBBI", 0xFFFF, 255, 0, 0, 1), "a frame of type 0 and 16777215 bytes came"),
        (OPENED + frame(3, 1, (8).to_bytes(4, "big")), r"reset the stream \(code 8\)"),
        (PREFACE + frame(7, 0, bytes(4) + (11).to_bytes(4, "big") + b"too_many_pings"), "too_many_pings"),
        (PREFACE + frame(4, 0, b"12345"), "settings of 5 bytes came, but each has 6"),
        (OPENED + frame(0, 1, b"", flags=8), "a frame of 0 bytes is padded with more than it holds"),
        (OPENED + frame(0, 1, b"\3ab", flags=8), "a frame of 3 bytes is padded with more than it holds"),
        (PREFACE + frame(0, 0, b"x"), "a frame of type 0 came outside of any stream"),
        (PREFACE + frame(4, 1, b""), "a frame of type 4 came on stream 1, but belongs to no stream"),
        (OPENED + frame(3, 1, bytes(1790)), "a frame of type 3 and 1790 bytes came, but this type has 4"),
        (PREFACE + frame(4, 0, bytes(6), flags=1), "a frame of type 4 and 6 bytes came, but this type has 0"),
        (OPENED + frame(1, 3, bytes(16_385)), "a frame of type 1 and 16385 bytes came, but at most 16384 are allowed"),
        (PREFACE + frame(4, 0, b"\0\5" + b"\xff" * 4), "a maximum frame of 4294967295 bytes is outside of 16384 to"),
        (PREFACE + frame(4, 0, b"\0\5\0\0\x3f\xff"), "a maximum frame of 16383 bytes is outside of 16384 to 16777215"),
        (PREFACE + frame(4, 0, b"\0\4\x80\0\0\0"), "an initial window of 2147483648 bytes is over 2147483647"),
        (PREFACE + frame(8, 0, (2**31 - 1).to_bytes(4, "big")), "a window was widened to more than 2147483647 bytes"),
        (OPENED + frame(8, 1, bytes(4)), "a window of stream 1 was widened by 0 bytes"),
        (PREFACE + frame(1, 2, BLOCK, flags=4), "a client opened stream 2, but its streams have odd ids"),
        (OPENED + frame(0, 1, b"", flags=1) + frame(0, 1, b"x"), "data came after the end of the stream"),
        (PREFACE + 10_001 * frame(99, 7, b""), "10000 frames came without a message between them"),
        (OPENED + frame(0, 1, b"\0\0\1\0\0") + 10_001 * frame(0, 1, b"x"), "10000 frames came without a message"),
        (PREFACE + frame(0, 1, b"x"), "a frame of type 0 came on stream 1, which nobody has opened"),
        (OPENED + frame(8, 3, b"\0\0\0\1"), "a frame of type 8 came on stream 3, which nobody has opened"),
        (OPENED + frame(9, 1, b""), "a frame of type 9 came where no CONTINUATION was expected"),
        (
            PREFACE + frame(1, 1, b"") + frame(6, 0, bytes(8)),
            "type 6 came where a CONTINUATION of stream 1 was",
        ),
        (PREFACE + frame(1, 1, b"") + frame(9, 3, b""), "type 9 came where a CONTINUATION of stream 1 was"),
        (PREFACE + frame(1, 1, b"") + 3 * frame(9, 1, bytes(16_384)), "a header block has more than 32768 bytes"),
        (PREFACE + frame(1, 1, b"\xff\xff\xff\xff\xff", flags=4), "a header block cannot be decoded"),
        (PREFACE + frame(1, 1, b"\7abc", flags=4 | 8), "a HEADERS frame of 4 bytes is shorter than its padding"),
        (OPENED + frame(1, 1, BLOCK, flags=4), "headers came in the middle of the stream"),
        (OPENED + 2 * frame(1, 1, BLOCK, flags=5), "headers came after the end of the stream"),
        (OPENED + 2 * frame(1, 3, BLOCK, flags=4), "headers came on stream 3, which has ended"),
    ],
)
def test_what_may_not_be_is_told_in_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(StreamEnded, match=sentence):
        ServerStream(COMPUTE_PATH, MAX).receive(data)


def test_who_breaks_a_rule_is_told_the_rule_before_the_connection_is_closed() -> None:
    server = ServerStream(COMPUTE_PATH, MAX)
    server.unsent.clear()
    with pytest.raises(StreamEnded):
        server.receive(OPENED + frame(6, 0, b"123"))
    sentence = b"a frame of type 6 and 3 bytes came, but this type has 8"
    assert server.unsent.endswith(frame(7, 0, (1).to_bytes(4, "big") + (6).to_bytes(4, "big") + sentence))


def test_the_widest_windows_and_longest_frames_that_are_allowed_are_used() -> None:
    server = ServerStream(COMPUTE_PATH, 1 << 26)
    server.receive(OPENED)
    message = bytes(20 << 20)
    server.send(message)
    server.unsent.clear()
    server.receive(frame(4, 0, b"\0\4\x7f\xff\xff\xff" + b"\0\5\0\xff\xff\xff"))
    server.unsent.clear()
    server.receive(frame(8, 0, (2**31 - 1 - 65_535).to_bytes(4, "big")))
    sizes = [(1 << 24) - 1, len(message) + 5 - 65_535 - (1 << 24) + 1]
    assert server.unsent[:3] == sizes[0].to_bytes(3, "big")
    assert len(server.unsent) == sum(sizes) + 2 * 9
    assert server.num_unsent == len(server.unsent)


def test_the_end_of_a_stream_is_told_once() -> None:
    server = ServerStream(COMPUTE_PATH, MAX)
    server.receive(OPENED)
    server.end()
    told = bytes(server.unsent)
    server.end()
    assert server.unsent == told


def test_pings_are_answered_and_padding_is_no_part_of_a_message() -> None:
    server = ServerStream(COMPUTE_PATH, MAX)
    server.unsent.clear()
    server.receive(PREFACE + frame(6, 0, b"12345678"))
    assert server.unsent == frame(6, 0, b"12345678", flags=1)
    server.receive(frame(1, 1, BLOCK, flags=4))
    padded = b"\3" + b"\0\0\0\0\2hi" + bytes(3)
    assert server.receive(frame(0, 1, padded, flags=8)) == [b"hi"]


def test_a_second_stream_of_a_connection_is_refused() -> None:
    server = ServerStream(COMPUTE_PATH, MAX)
    server.receive(OPENED)
    server.unsent.clear()
    server.receive(frame(1, 3, BLOCK, flags=4))
    assert server.unsent == frame(3, 3, (7).to_bytes(4, "big"))


def test_frames_of_a_refused_stream_are_no_part_of_ours() -> None:
    server = ServerStream(COMPUTE_PATH, MAX)
    server.receive(OPENED + frame(0, 1, b"\0\0\0\0\4ab"))
    server.receive(frame(1, 3, BLOCK, flags=4 | 1))
    server.receive(frame(0, 3, b"\0\0\0\0\1x", flags=1))
    server.receive(frame(8, 3, (2**31 - 1).to_bytes(4, "big")))
    server.receive(frame(3, 3, (8).to_bytes(4, "big")))
    assert not server.is_ended
    assert server.receive(frame(0, 1, b"cd")) == [b"abcd"]
    server.send(bytes(70_000))
    assert server.num_unsent - len(server.unsent) == 70_000 + 5 - 65_535


def test_data_of_a_refused_stream_counts_for_the_connections_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "RENEW_WINDOW_AT", 1000)
    server = ServerStream(COMPUTE_PATH, MAX)
    server.receive(OPENED + frame(0, 1, b"\0\0\0\2\0" + bytes(395)) + frame(1, 3, BLOCK, flags=4))
    server.unsent.clear()
    server.receive(frame(0, 3, bytes(600)))
    assert server.unsent == frame(8, 0, (1000).to_bytes(4, "big")) + frame(8, 1, (400).to_bytes(4, "big"))
