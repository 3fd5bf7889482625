"""`listening` runs a `Listener` in a test's event loop; `connect` opens a plain TCP connection to a port of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from services.gateway.generation import Generation
from services.gateway.health import Health
from services.gateway.listener import Listener, ListenerConfig
from services.gateway.ports.health_api import HealthApi
from services.gateway.rest import build_rest


@contextlib.asynccontextmanager
async def listening(
    generation: Generation, config: ListenerConfig, now: Health | None = None, **options: Any
) -> AsyncIterator[Listener]:
    """Serve `generation` on the ports of `config`; `options` are further arguments of `build_rest`."""

    async def health() -> Health:
        return now or Health(is_ready=True)

    listener = Listener(config, build_rest(generation, health, **options), generation, HealthApi(health))
    await listener.start()
    try:
        yield listener
    finally:
        await listener.stop()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(bounded())


async def until(is_true: Callable[[], bool]) -> None:
    """Wait until `is_true` returns True; `run` limits the wait."""
    while not is_true():
        await asyncio.sleep(0.01)


class PlainConnection(asyncio.Protocol):
    """A `PlainConnection` is a TCP connection on which a test may send bytes that no HTTP client would send."""

    def __init__(self) -> None:
        self.data, self.is_closed = b"", False
        self._news = asyncio.Event()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a transport of uvloop is no asyncio.Transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        self._news.set()

    def eof_received(self) -> None:
        self.is_closed = True
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.eof_received()

    def send(self, data: bytes) -> None:
        self.transport.write(data)

    async def until(self, done: Callable[[], bool], seconds: float = 10) -> None:
        """Wait until `done` returns True, and check it after everything that the server sends."""
        async with asyncio.timeout(seconds):
            while not done():
                await self._news.wait()
                self._news.clear()

    async def received(self, seconds: float = 10) -> bytes:
        """Wait until the server closes the connection, and return everything that the server has sent."""
        await self.until(lambda: self.is_closed, seconds)
        return self.data

    async def status(self) -> int:
        """Wait for the next response, remove it from `data`, and return its status."""
        await self.until(lambda: b"\r\n\r\n" in self.data)
        head = self.data.partition(b"\r\n\r\n")[0]
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields.get(b"content-length", b"0"))
        await self.until(lambda: len(self.data) >= len(head) + 4 + length)
        self.data = self.data[len(head) + 4 + length :]
        return int(head.split()[1])


@contextlib.asynccontextmanager
async def connect(port: int | None, receive_buffer: int | None = None) -> AsyncIterator[PlainConnection]:
    """Connect to `port`; `receive_buffer` is the size in bytes of the system's buffer for what the server sends."""
    loop, plain = asyncio.get_running_loop(), socket.socket()
    plain.setblocking(False)
    if receive_buffer is not None:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await loop.sock_connect(plain, ("127.0.0.1", port))
    _, connection = await loop.create_connection(PlainConnection, sock=plain)
    try:
        yield connection
    finally:
        connection.transport.abort()
