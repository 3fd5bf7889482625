"""The middlewares in this file act on all requests to the REST API: HEAD, CORS and unexpected errors.

Each middleware is a class with the signature of ASGI, as in Starlette.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import Request, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADMIN_PATH = "/admin"
# Response headers that web pages of other origins may read; a browser hides all headers that are not listed.
EXPOSED_HEADERS = ("X-Request-Id", "X-Expertmesh-Cache", "Retry-After")


class HeadMiddleware:
    """A `HeadMiddleware` answers HEAD as GET, but without the body (RFC 9110, section 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)


class ApiCorsMiddleware(CORSMiddleware):
    """An `ApiCorsMiddleware` lets web pages of the allowed origins call the REST API.

    The operator's API is left out. A web page has no business there, even if an operator has the page open.
    """

    def __init__(self, app: ASGIApp, allowed_origins: list[str]) -> None:
        super().__init__(
            app,
            allow_origins=allowed_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_admin = f"{scope.get('path', '')}/".startswith(f"{ADMIN_PATH}/")
        await (self.app(scope, receive, send) if is_admin else super().__call__(scope, receive, send))


class UnexpectedErrorMiddleware:
    """An `UnexpectedErrorMiddleware` answers a request whose handler raised an unexpected exception with `respond`.

    Starlette's own handler for such exceptions runs outside all middlewares, so its response would have neither a
    request id nor the headers of CORS.
    """

    def __init__(self, app: ASGIApp, respond: Callable[[Request, Exception], Response]) -> None:
        self._app, self._respond = app, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watched_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            await self._respond(Request(scope), error)(scope, receive, send)
