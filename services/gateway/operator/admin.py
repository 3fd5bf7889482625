"""The admin API lets operators who have the admin key read the fleet's state and give orders, as JSON.

If the server has no key, the API refuses all requests, even from clients on the same machine. Without this rule, a
proxy, a port-forward or a web page that posts to 127.0.0.1 could act as an operator.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from cluster.control.operator_orders import MAX_SHARDS
from services.gateway.connection import read_body
from services.gateway.errors import ApiError, ApiRefusal, invalid
from services.gateway.operator.operations import Operations
from services.gateway.ports.openapi import ADMIN_KEY, takes
from services.gateway.request_body import BaseBody, parse_body

MAX_BODY_BYTES = 64 << 10  # maximum size of a body in bytes; far more than any order needs
MAX_LISTED = 1000  # maximum number of experts or decisions in one response
SECURITY: dict[str, Any] = {"security": [{ADMIN_KEY: []}]}  # for OpenAPI
OperatorName = Annotated[str, Field(max_length=128)]


class OrderBody(BaseBody):
    """An `OrderBody` is the body of an operator order without arguments.

    `by` names the operator; if `by` is empty, the client's address is used.
    """

    by: OperatorName = ""


class DrainBody(OrderBody):
    """A `DrainBody` is the body of an order to drain a shard.

    If `undo` is True, the order is lifted instead, and the shard may hold experts again.
    """

    undo: bool = False


class ScaleBody(OrderBody):
    """A `ScaleBody` is the body of an order that fixes a pool's number of shards.

    If `shards` is null, the order is lifted instead, and the load decides the number of shards again.
    """

    shards: Annotated[int, Field(ge=1, le=MAX_SHARDS)] | None


class TraceBody(BaseBody):
    """A `TraceBody` is the body of a request that makes every backbone start or stop recording the router's choices.

    A recording ends after `max_bytes` bytes or `max_seconds` seconds.
    """

    action: Literal["start", "stop"]
    max_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 64 << 20
    max_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0


def add_admin(app: FastAPI, key: str | None, operations: Operations | None) -> None:
    """Add the routes under /admin to `app`.

    `key` is the admin key, or None if the server has no admin key. `operations` is None if the experts are local. In
    that case every route refuses requests, because there are no shards.
    """
    admin = Admin(key, operations)
    for path, handler in (
        ("/plan", admin.plan),
        ("/load", admin.load),
        ("/decisions", admin.decisions),
        ("/placement", admin.placement),
    ):
        app.add_api_route(f"/admin{path}", admin.guarded(handler), name=handler.__name__, openapi_extra=SECURITY)
    for path, handler, body in (
        ("/rebalance", admin.rebalance, takes(OrderBody, is_required=False)),
        ("/pools/{pool}/scale", admin.scale, takes(ScaleBody)),
        ("/shards/{shard_id}/drain", admin.drain, takes(DrainBody, is_required=False)),
        ("/traces", admin.traces, takes(TraceBody)),
    ):
        described: dict[str, Any] = {"name": handler.__name__, "openapi_extra": body["openapi_extra"] | SECURITY}
        app.add_api_route(f"/admin{path}", admin.guarded(handler), methods=["POST"], **described)


AdminHandler = Callable[[Operations, Request], Awaitable[dict[str, Any]]]


class Admin:
    """An `Admin` checks the operator's key and translates HTTP requests to calls of `Operations`."""

    def __init__(self, key: str | None, operations: Operations | None) -> None:
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()
        self._operations = operations

    def guarded(self, handler: AdminHandler) -> Callable[[Request], Awaitable[Response]]:
        """Return a route that calls `handler` for requests with the admin key and refuses all other requests."""

        async def route(request: Request) -> Response:
            self._check_key(request.headers.get("authorization", ""))
            if self._operations is None:
                raise ApiError(
                    ApiRefusal.NOT_FOUND, "The experts are in the backbone: there are no shards to administer."
                )
            return JSONResponse(await handler(self._operations, request))

        return route

    def _check_key(self, authorization: str) -> None:
        if self._digest is None:
            remedy = "set EXPERTMESH_ADMIN_KEY, or admin_key in the application's arguments, where the server starts"
            raise ApiError(
                ApiRefusal.FORBIDDEN, f"The admin API is closed because the server has no admin key; {remedy}."
            )
        scheme, _, key = authorization.partition(" ")
        # All digests have the same length, so the duration of the comparison reveals neither the key nor its length.
        is_right = hmac.compare_digest(hashlib.sha256(key.strip().encode()).digest(), self._digest)
        if scheme.lower() != "bearer" or not is_right:
            sentence = "The admin API needs the header `Authorization: Bearer KEY` with the server's admin key."
            raise ApiError(ApiRefusal.UNAUTHENTICATED, sentence)

    async def plan(self, operations: Operations, _: Request) -> dict[str, Any]:
        return await operations.plan()

    async def load(self, operations: Operations, request: Request) -> dict[str, Any]:
        return await operations.load(_number(request, "top") if "top" in request.query_params else None)

    async def decisions(self, operations: Operations, request: Request) -> dict[str, Any]:
        return await operations.decisions(_number(request, "count", 20))

    async def placement(self, operations: Operations, _: Request) -> dict[str, Any]:
        return await operations.placement()

    async def rebalance(self, operations: Operations, request: Request) -> dict[str, Any]:
        body = parse_body(OrderBody, await _body(request))
        return await operations.rebalance(_operator_name(body, request))

    async def scale(self, operations: Operations, request: Request) -> dict[str, Any]:
        body, pool = parse_body(ScaleBody, await _body(request)), request.path_params["pool"]
        if body.shards is None:
            return await operations.lift_scale(pool)
        return await operations.scale(pool, body.shards, _operator_name(body, request))

    async def drain(self, operations: Operations, request: Request) -> dict[str, Any]:
        body, shard_id = parse_body(DrainBody, await _body(request)), request.path_params["shard_id"]
        if body.undo:
            return await operations.lift_drain(shard_id)
        return await operations.drain(shard_id, _operator_name(body, request))

    async def traces(self, operations: Operations, request: Request) -> dict[str, Any]:
        body = parse_body(TraceBody, await _body(request))
        bounds = {"max_bytes": body.max_bytes, "max_seconds": body.max_seconds}
        return await operations.trace(bounds if body.action == "start" else None)


async def _body(request: Request) -> bytes:
    """Return the bytes of the request's body, or an empty JSON object if the request has no body."""
    return await read_body(request, MAX_BODY_BYTES) or b"{}"


def _operator_name(body: OrderBody, request: Request) -> str:
    return body.by or (request.client.host if request.client else "unknown")


def _number(request: Request, name: str, default: int = 0) -> int:
    """Return the query parameter `name` as a number, or `default` if the parameter is missing.

    Raises ApiError if the parameter is not a whole number from 1 to MAX_LISTED.
    """
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:6]) <= MAX_LISTED):
        raise invalid(f"{name} must be a whole number from 1 to {MAX_LISTED}, not {text!r:.40}.", name)
    return int(text)
