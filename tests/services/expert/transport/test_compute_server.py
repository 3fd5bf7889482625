"""These tests connect bad clients to the compute server: clients that do not read, break rules or are too many."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from cluster.topology import Shard
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.options import MAX_MESSAGE_BYTES
from services.expert.transport.http2 import PREFACE, ClientStream, GrpcSocket
from services.expert.transport.wire import COMPUTE_PATH
from tests.services.expert.checkpoint import LATENT
from tests.services.expert.requests import make_request
from tests.services.expert.shard_process import ShardProcess
from tests.services.expert.test_client import everywhere, fill, num_requests
from tests.services.expert.transport.test_http2 import OPENED

SHORT_SETTINGS = PREFACE + b"\0\0\5\4\0" + bytes(4) + b"12345"
EMPTY_PADDED = OPENED + b"\0\0\0\0\10\0\0\0\1"
NUM_REQUESTS, NUM_ROWS = 120, 2000  # the replies to all requests have 60 MB in total


@pytest.fixture
def process(model_dir: Path) -> Iterator[ShardProcess]:
    with ShardProcess(model_dir, 1, max_queue=NUM_REQUESTS) as process:
        fill(process.shards, everywhere([process.shards[0].id]))
        yield process


@pytest.fixture
def shard(process: ShardProcess) -> Shard:
    return process.shards[0]


@pytest.fixture
def client(shard: Shard) -> Iterator[GrpcSocket]:
    host, port = shard.compute_endpoint.split(":")
    client = GrpcSocket(
        socket.create_connection((host, int(port))), ClientStream(COMPUTE_PATH, host, MAX_MESSAGE_BYTES)
    )
    client.flush()
    while not client.stream.is_greeted:  # wait until the server has sent its HTTP/2 settings
        assert client.receive() == []
    yield client
    client.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def request_of_many_rows(request_id: int) -> bytes:
    rows = np.arange(NUM_ROWS, dtype="<i4")
    return make_request(
        id=request_id,
        num_rows=NUM_ROWS,
        rows=np.ones((NUM_ROWS, LATENT), "<f4").tobytes(),
        grid=np.full(NUM_ROWS, -40, "<i2").tobytes(),  # with this fine grid, sums do not fit into 4 bytes
        pick_rows=rows.tobytes(),
        pick_experts=np.zeros(NUM_ROWS, "<i4").tobytes(),
        pick_weights=np.ones(NUM_ROWS, "<f4").tobytes(),
    ).SerializeToString()


def test_a_client_that_does_not_read_is_not_read_from(shard: Shard, client: GrpcSocket) -> None:
    for n in range(1, NUM_REQUESTS + 1):
        client.send(request_of_many_rows(n))
    seen, last_change = -1, time.monotonic()
    while time.monotonic() - last_change < 2.0:
        client.flush()
        if (now := num_requests(shard)) != seen:
            seen, last_change = now, time.monotonic()
        time.sleep(0.05)
    assert 0 < seen < NUM_REQUESTS
    ids: list[int] = []
    while len(ids) < NUM_REQUESTS:
        client.flush()
        ids += [pb.ComputeReply.FromString(message).id for message in client.receive()]
    assert ids == list(range(1, NUM_REQUESTS + 1))


def test_what_is_no_grpc_is_hung_up_on_and_hurts_nobody(shard: Shard, client: GrpcSocket) -> None:
    host, port = shard.compute_endpoint.split(":")
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", bytes(100), SHORT_SETTINGS, EMPTY_PADDED):
        with socket.create_connection((host, int(port)), timeout=5) as stranger:
            stranger.sendall(nonsense)
            with suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
    client.send(make_request(id=7).SerializeToString())
    replies: list[bytes] = []
    while not replies:
        replies = client.receive()
    assert pb.ComputeReply.FromString(replies[0]).id == 7


def connect(shard: Shard) -> tuple[socket.socket, bytes]:
    """Connect; return the connection and the first byte from the server.

    The byte is empty if the server closes the connection.
    """
    host, port = shard.compute_endpoint.split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    try:
        return connection, connection.recv(1)
    except ConnectionResetError:
        return connection, b""


def answers(client: GrpcSocket, request_id: int) -> bool:
    client.send(make_request(id=request_id).SerializeToString())
    replies: list[bytes] = []
    while not replies:
        replies = client.receive()
    return pb.ComputeReply.FromString(replies[0]).id == request_id


def test_without_file_descriptors_open_streams_are_served_and_new_ones_hung_up_on(
    process: ShardProcess, shard: Shard, client: GrpcSocket, stack: ExitStack
) -> None:
    pid = process.process.pid
    assert answers(client, 1)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    lowest_free = next(n for n in count() if not Path(f"/proc/{pid}/fd/{n}").exists())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, before[1]))  # the shard can open no more files
    num_refused = 0
    for _ in range(100):  # the shard may accept the first connections, because it closes other files meanwhile
        connection, greeting = connect(shard)
        stack.callback(connection.close)
        num_refused = 0 if greeting else num_refused + 1
        if num_refused == 20:
            break
    assert num_refused == 20
    assert answers(client, 2)
    used_s = cpu_seconds(pid)
    time.sleep(1.0)
    assert cpu_seconds(pid) - used_s < 0.5, "connections that cannot be accepted must not keep the worker busy"
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    connection, greeting = connect(shard)
    connection.close()
    assert greeting
    assert answers(client, 3)


def cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
