"""`post` sends one streamed request over a new connection, and reads the reply with little CPU time.

The client and the measured server share two CPU cores. While tokens arrive, the client only stores bytes and arrival
times. It parses the bytes when the reply is complete. The client needs a fifth of the CPU time that httpx needs: see
`benchmarks.load_overhead`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Event:
    """An `Event` holds the data of one server-sent event, and the arrival time of the event's last byte.

    The time is a value of `time.perf_counter`.
    """

    data: bytes
    came_at: float


@dataclass(frozen=True)
class StreamedReply:
    """A `StreamedReply` is a complete HTTP reply with the arrival time of each part of its body.

    At the time `times[i]` of `time.perf_counter`, the first `ends[i]` bytes of `body` had arrived.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    ends: tuple[int, ...]
    times: tuple[float, ...]

    def events(self) -> Iterator[Event]:
        """Yield the server-sent events of `body`, without comments. `body` must be a text/event-stream."""
        start = 0
        while (end := self.body.find(b"\n\n", start)) >= 0:
            end += 2
            event = self.body[start:end].strip()
            if event.startswith(b"data: "):
                yield Event(event[6:], self.times[bisect_left(self.ends, end)])
            start = end


class _Exchange(asyncio.Protocol):
    """An `_Exchange` sends one request and keeps every piece of the reply until the server closes the connection."""

    def __init__(self, request: bytes) -> None:
        self.request, self.pieces = request, list[tuple[float, bytes]]()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None) if exc is None else self.closed.set_exception(exc)


async def post(url: str, body: Mapping[str, Any], timeout_s: float) -> StreamedReply:
    """Post `body` as JSON and return the complete reply.

    Raises OSError if the connection fails or ends too early, and TimeoutError after `timeout_s` seconds.
    """
    where, content = urlsplit(url), json.dumps(body).encode()
    head = f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        address = where.hostname or "", where.port or 80
        transport, exchange = await loop.create_connection(lambda: _Exchange(request), *address)
        try:
            await exchange.closed
        finally:
            transport.close()
    return parse(exchange.pieces)


def parse(pieces: list[tuple[float, bytes]]) -> StreamedReply:
    """Parse the bytes in `pieces` as an HTTP/1.1 reply, whose body may be chunked, and return the reply.

    Each piece is a pair (arrival time, bytes). Raises ConnectionError if the reply is not complete.
    """
    raw = b"".join(data for _, data in pieces)
    raw_ends = list(itertools.accumulate(len(data) for _, data in pieces))
    head, found, _ = raw.partition(b"\r\n\r\n")
    if not found:
        raise ConnectionResetError("the connection ended before the head of the reply was complete")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = _BodyReader()
    at = len(head) + 4
    if headers.get("transfer-encoding", "").lower() != "chunked":
        body.add(raw[at:], pieces[bisect_left(raw_ends, len(raw))][0])
    else:
        while size := _chunk_size(raw, at):
            start = raw.index(b"\r\n", at) + 2
            if start + size > len(raw):
                raise ConnectionResetError("the connection ended in the middle of the reply")
            body.add(raw[start : start + size], pieces[bisect_left(raw_ends, start + size)][0])
            at = start + size + 2
    return StreamedReply(
        int(status_line.split()[1]), headers, b"".join(body.parts), tuple(body.ends), tuple(body.times)
    )


@dataclass
class _BodyReader:
    """A `_BodyReader` collects the parts of a body, and for each part the arrival time of the part's last byte."""

    parts: list[bytes] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, part: bytes, came_at: float) -> None:
        self.parts.append(part)
        self.ends.append(len(part) + (self.ends[-1] if self.ends else 0))
        self.times.append(came_at)


def _chunk_size(raw: bytes, at: int) -> int:
    end = raw.find(b"\r\n", at)
    if end < 0:
        raise ConnectionResetError("the connection ended in the middle of the reply")
    return int(raw[at:end].partition(b";")[0], 16)
