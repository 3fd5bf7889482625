"""Every request has an id, which the client may choose and which appears in logs and in the response."""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import invalid

MAX_REQUEST_ID_LEN = 128  # maximum number of characters of a request id, because ids go into logs and headers


def check_request_id(request_id: str, param: str) -> None:
    """Raise ApiError if `request_id` is longer than MAX_REQUEST_ID_LEN or is not printable ASCII.

    `param` is the name of the client's parameter, for the error message.
    """
    if len(request_id) > MAX_REQUEST_ID_LEN or not (request_id.isascii() and request_id.isprintable()):
        raise invalid(f"{param} must be at most {MAX_REQUEST_ID_LEN} printable ASCII characters long.", param)


class RequestIdMiddleware:
    """A `RequestIdMiddleware` gives every HTTP request an id: its `X-Request-Id` header, or a random id.

    The id is stored in `request.state.id` and sent back in the response's `X-Request-Id` header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id[:MAX_REQUEST_ID_LEN]
            await send(message)

        await self._app(scope, receive, send_with_id)
