"""An HTTP handler needs two functions that Starlette lacks: to bound the size of bodies, and to notice a disconnect."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi.requests import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from services.gateway.errors import ApiError, ApiRefusal, invalid

# nginx's HTTP status for a request whose client closed the connection; no client is left to read the status
CLIENT_CLOSED_REQUEST = 499
# A client reads the refusal of a too large body only after the client has sent the whole body. The server therefore
# reads and drops up to DRAIN_FACTOR times the allowed size before it closes the connection.
DRAIN_FACTOR = 16
# line ends in JavaScript and Python, which some clients take for the end of a `data:` line
LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}

# window sizes for zlib, by Content-Encoding (RFC 9110, 8.4.1); 16 is added for the header of gzip
DECOMPRESSORS = {"identity": 0, "gzip": zlib.MAX_WBITS + 16, "x-gzip": zlib.MAX_WBITS + 16, "deflate": zlib.MAX_WBITS}

T = TypeVar("T")


class ClientGone(Exception):
    """A `ClientGone` is raised when a client closes the connection before the answer is complete."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of `request`, which may be at most `max_bytes` long.

    A body may be compressed with gzip or deflate; its length is counted as sent and as decompressed. Raises ApiError
    for a longer body or another encoding, and keeps at most `max_bytes` of the body in memory. Raises ClientGone if
    the client disconnects.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower() or "identity"
    if encoding not in DECOMPRESSORS:
        allowed = ", ".join(map(repr, DECOMPRESSORS))
        message = f"The body's Content-Encoding must be one of {allowed}, not {encoding!r:.100}."
        raise ApiError(ApiRefusal.MEDIA_TYPE, message)
    chunks, size = list[bytes](), 0
    if _is_announced_too_large(request, max_bytes):
        raise _too_large(max_bytes)
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= max_bytes:
                chunks.append(chunk)
            elif size > DRAIN_FACTOR * max_bytes:
                break
    except ClientDisconnect as error:
        raise ClientGone from error
    if size > max_bytes:
        raise _too_large(max_bytes)
    data = b"".join(chunks)
    return data if encoding == "identity" else _decompress(data, encoding, max_bytes)


def _decompress(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return `data` without its `encoding`. Raises ApiError if the result is longer than `max_bytes`, or broken."""
    decompressor = zlib.decompressobj(DECOMPRESSORS[encoding])
    try:
        result = decompressor.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise invalid(f"The body is not valid {encoding} data: {error}.") from error
    if len(result) > max_bytes:
        raise _too_large(max_bytes)
    if not decompressor.eof:
        raise invalid(f"The body's {encoding} data ends too early.")
    return result


def _is_announced_too_large(request: Request, max_bytes: int) -> bool:
    """Return True if the client waits for `100 Continue` to send a body that is too large (RFC 9110, 10.1.1)."""
    waits = request.headers.get("expect", "").lower() == "100-continue"
    length = request.headers.get("content-length", "")
    return waits and length.isdecimal() and int(length) > max_bytes


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(ApiRefusal.TOO_LARGE, f"The body must be at most {max_bytes} bytes long, but is longer.")


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and return its result. Cancel `work` and raise ClientGone if the client disconnects first."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """An `EventStream` sends server-sent events and closes the generator of events when the client disconnects.

    Starlette's `StreamingResponse` would notice a disconnect only when the next event is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], headers: Mapping[str, str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            with suppress(ClientGone):
                await run_while_connected(receive, self.stream_response(send))


def server_event(data: str, name: str = "") -> str:
    """Return one server-sent event with the JSON text `data`, and with the event's `name` if it has one."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data.translate(LINE_ENDS)}\n\n"
