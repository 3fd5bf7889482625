"""`proxy_to` runs a TCP proxy in front of a shard; the proxy damages the data that the shard sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

# A `Damage` gets a piece of data, and the number of bytes that the connection carried before the piece. The `Damage`
# returns the data that the proxy sends instead of the piece, or None if the proxy must close the connection.
Damage = Callable[[bytes, int], bytes | None]


def flip_at(place: int) -> Damage:
    """Return a `Damage` that flips one bit in byte number `place` of the data that a connection carries."""

    def flip(data: bytes, before: int) -> bytes:
        at = place - before
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if 0 <= at < len(data) else data

    return flip


def cut_at(place: int) -> Damage:
    """Return a `Damage` that lets at most `place` bytes pass and then closes the connection."""
    return lambda data, before: None if before + len(data) > place else data


@asynccontextmanager
async def proxy_to(endpoint: str, damage: Damage) -> AsyncIterator[str]:
    host, _, port = endpoint.partition(":")
    tasks: set[asyncio.Task[None]] = set()

    async def pump(
        source: asyncio.StreamReader, target: asyncio.StreamWriter, damage: Damage = lambda data, _: data
    ) -> None:
        before = 0
        try:
            while data := await source.read(1 << 14):
                damaged = damage(data, before)
                if damaged is None:
                    break
                before += len(data)
                target.write(damaged)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_shard, to_shard = await asyncio.open_connection(host, int(port))
        for pumping in (pump(reader, to_shard), pump(from_shard, writer, damage)):
            tasks.add(asyncio.create_task(pumping))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
