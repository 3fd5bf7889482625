"""These tests send hostile bytes to a shard and to a client; other connections, and the threads, must not suffer."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
import torch

from cluster.topology import Shard
from model.blocks.expert_bank import LocalExperts
from model.family import ModelFamily
from services.expert.client import CallPolicy, RemoteExperts
from services.expert.transport import shard_stream
from services.expert.transport.http2 import PREFACE
from tests.services.expert.shard_process import ShardProcess
from tests.services.expert.test_client import PATIENT, ask_many, connect, everywhere, fill, placement_on
from tests.services.expert.transport.test_compute_server import request_of_many_rows
from tests.services.expert.transport.test_http2 import BLOCK, OPENED, frame

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
LENGTHS = (*range(10), 16, 100, 1790, 16_384, 16_385, 70_000)
SHUT_WINDOW = frame(SETTINGS, 0, b"\0\4\0\0\0\0")  # the client lets the shard send no data
MESSAGE = b"\0" + (60 << 20).to_bytes(4, "big")  # the prefix of a message of 60 MB
HUGE_FRAME_LIMIT = frame(SETTINGS, 0, b"\0\5" + b"\xff" * 4)


def request_bytes(request_id: int) -> bytes:
    message = request_of_many_rows(request_id)
    return frame(DATA, 1, b"\0" + len(message).to_bytes(4, "big") + message)


BROKEN = {  # the shard must hang up on a client that sends any of these bytes
    "RST_STREAM of 1790 bytes": OPENED + frame(RST_STREAM, 1, b"\xff" * 1790),
    "RST_STREAM of 16 KB": OPENED + frame(RST_STREAM, 1, b"\xff" * 16_384),
    "frames of 2**32 - 1 bytes": OPENED + SHUT_WINDOW + HUGE_FRAME_LIMIT + request_bytes(1),
    "frames of 0 bytes": OPENED + frame(SETTINGS, 0, b"\0\5" + bytes(4)),
    "a window of 2**32 - 1 bytes": OPENED + frame(SETTINGS, 0, b"\0\4" + b"\xff" * 4),
    "a window that overflows": OPENED + 3 * frame(WINDOW_UPDATE, 0, b"\x7f" + b"\xff" * 3),
    "a window wider by 0": OPENED + frame(WINDOW_UPDATE, 1, bytes(4)),
    "a PING of 9 bytes": OPENED + frame(PING, 0, bytes(9)),
    "settings of a stream": OPENED + frame(SETTINGS, 1, b""),
    "a SETTINGS frame of 1 MB": OPENED + frame(SETTINGS, 0, bytes(6 * 170_000)),
    "a header block of 1 MB": PREFACE + frame(HEADERS, 1, b"\x82" * (1 << 20), flags=4),
    "stream 2": PREFACE + frame(HEADERS, 2, BLOCK, flags=4),
    "data after the end": OPENED + frame(PING, 0, bytes(8)) + frame(DATA, 1, b"\0\0", flags=1) + request_bytes(1),
    "many PINGs": OPENED + 100_000 * frame(PING, 0, bytes(8)),
    "many SETTINGS": OPENED + 100_000 * frame(SETTINGS, 0, b""),
    "many streams": OPENED
    + b"".join(
        frame(HEADERS, stream_id, BLOCK, flags=4) + frame(RST_STREAM, stream_id, bytes(4))
        for stream_id in range(3, 100_003, 2)
    ),
    "many CONTINUATIONs": PREFACE + frame(HEADERS, 1, b"") + 100_000 * frame(CONTINUATION, 1, b"\x82" * 100),
    "many empty DATA frames": OPENED + 100_000 * frame(DATA, 1, b""),
    "a message in tiny frames": OPENED + frame(DATA, 1, MESSAGE) + 100_000 * frame(DATA, 1, b"x"),
    "many widened windows": OPENED + SHUT_WINDOW + request_bytes(1) + 100_000 * frame(WINDOW_UPDATE, 1, b"\0\0\0\1"),
}
FAITHLESS = {  # what breaks no rule, or is never finished
    "a frame that is cut off": OPENED + frame(DATA, 1, bytes(1000))[:500],
    "unknown frames": OPENED + b"".join(frame(kind, 1, bytes(kind)) for kind in range(10, 256)),
    "a request that is no request": OPENED + frame(DATA, 1, b"\0\0\0\0\4\xff\xff\xff\xff"),
}


def random_bytes(chooser: random.Random) -> bytes:
    """Return the start of a connection with up to 20 frames of random types, lengths, flags and streams."""
    data = bytearray(chooser.choice((PREFACE, OPENED, OPENED + SHUT_WINDOW + request_bytes(1))))
    for _ in range(chooser.randrange(20)):
        kind = chooser.choice((*range(11), chooser.randrange(256)))
        length = chooser.choice((*LENGTHS, 4, 8, 6, 12))
        payload = chooser.choice((bytes(length), b"\xff" * length, chooser.randbytes(length)))
        flags = chooser.choice((0, 1, 4, 5, 8, 255))
        stream_id = chooser.choice((0, 1, 1, 1, 2, 3, 2**31 - 1, 2**32 - 1))
        data += frame(kind, stream_id, payload, flags)
    return bytes(data[: len(data) - chooser.choice((0, 0, 0, 1, 5, 50))])


@pytest.fixture(scope="module")
def process(model_dir: Path) -> Iterator[ShardProcess]:
    with ShardProcess(model_dir, 1) as process:
        fill(process.shards, everywhere([process.shards[0].id]))
        yield process


@pytest.fixture(scope="module")
def shard(process: ShardProcess) -> Shard:
    return process.shards[0]


@pytest.fixture(scope="module")
def local(family: ModelFamily) -> LocalExperts:
    return family.load_local_experts(torch.float32)


@pytest.fixture
def calm(shard: Shard, local: LocalExperts) -> Iterator[RemoteExperts]:
    """Yield a well-behaved client, and check at the end that its connection and its calls never failed."""
    remote = RemoteExperts(PATIENT)
    remote.update(placement_on(local, everywhere([shard.id])), [shard])
    connect(remote)
    yield remote
    ask_many(remote, local, 20)
    assert (remote.traffic.num_lost, remote.traffic.num_heals, remote.traffic.num_corrupt) == (0, 0, 0)
    remote.close()


def hostile_connection(shard: Shard) -> socket.socket:
    host, port = shard.compute_endpoint.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def send_and_leave(shard: Shard, data: bytes) -> None:
    """Send `data`, and wait until the shard has read everything or has hung up."""
    with hostile_connection(shard) as hostile, suppress(ConnectionError):
        _send(hostile, data)
        with suppress(OSError):
            hostile.shutdown(socket.SHUT_WR)
        while hostile.recv(1 << 16):
            pass


@pytest.mark.parametrize("name", BROKEN)
def test_a_shard_hangs_up_on_who_breaks_a_rule_and_on_nobody_else(
    name: str, shard: Shard, local: LocalExperts, calm: RemoteExperts
) -> None:
    with hostile_connection(shard) as hostile:
        sending = threading.Thread(target=_send, args=(hostile, BROKEN[name]))
        sending.start()
        ask_many(calm, local, 5)
        with suppress(ConnectionError):
            while hostile.recv(1 << 16):  # raises a timeout error if the shard does not hang up
                pass
        sending.join()


def _send(hostile: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        hostile.sendall(data)


@pytest.mark.parametrize("name", FAITHLESS)
def test_what_breaks_no_rule_hurts_nobody_either(
    name: str, shard: Shard, local: LocalExperts, calm: RemoteExperts
) -> None:
    sending = threading.Thread(target=send_and_leave, args=(shard, FAITHLESS[name]))
    sending.start()
    ask_many(calm, local, 5)
    sending.join()


def test_a_hostile_client_is_told_which_rule_it_broke(shard: Shard) -> None:
    with hostile_connection(shard) as hostile:
        hostile.sendall(OPENED + frame(RST_STREAM, 1, bytes(5)))
        received = b""
        while data := hostile.recv(1 << 16):
            received += data
    sentence = b"a frame of type 3 and 5 bytes came, but this type has 4"
    assert received.endswith(frame(GOAWAY, 0, (1).to_bytes(4, "big") + (6).to_bytes(4, "big") + sentence))


@pytest.mark.parametrize("seed", range(5))
def test_random_frames_hurt_no_other_client(
    seed: int, shard: Shard, process: ShardProcess, local: LocalExperts, calm: RemoteExperts
) -> None:
    chooser = random.Random(seed)
    all_bytes = [random_bytes(chooser) for _ in range(60)]

    def attack() -> None:
        for data in all_bytes:
            send_and_leave(shard, data)

    attacking = threading.Thread(target=attack)
    attacking.start()
    while attacking.is_alive():
        ask_many(calm, local, 5)
    assert process.process.is_alive()


class HostileShard:
    """A `HostileShard` answers each connection with the next of `answers`, and then breaks the connection."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers
        self.num_answered = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                with client, suppress(OSError):
                    client.settimeout(0.3)
                    client.sendall(self._answers[self.num_answered % len(self._answers)])
                    while client.recv(1 << 16):  # until the client hangs up, or is silent for 0.3 s
                        pass
                self.num_answered += 1


def test_a_client_survives_what_a_hostile_shard_answers(
    shard: Shard, local: LocalExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_stream, "MAX_RECONNECT_S", 0.05)
    greeting, chooser = frame(SETTINGS, 0, b""), random.Random(0)
    answers = [data.removeprefix(PREFACE) for data in (*BROKEN.values(), *FAITHLESS.values())]
    answers += [random_bytes(chooser).removeprefix(PREFACE) for _ in range(20)]
    answers = [frame(PING, 0, bytes(8)) * 9_000, *answers, *(greeting + answer for answer in answers)]
    remote = RemoteExperts(CallPolicy(timeout_s=20.0, stall_s=0.1))
    with HostileShard(answers) as hostile:
        shards = [replace(shard, id="hostile", compute_endpoint=hostile.endpoint), shard]
        remote.update(placement_on(local, everywhere([one.id for one in shards])), shards)
        stop_at = time.monotonic() + 240
        while hostile.num_answered < len(answers):
            assert time.monotonic() < stop_at, f"the client connected only {hostile.num_answered} times"
            ask_many(remote, local, 1)
            time.sleep(0.005)
        remote.close()
