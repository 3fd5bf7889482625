"""The REST API is one FastAPI application: `build_rest` joins the routes of all APIs and their error handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from services.gateway.anthropic.refusals import is_of_messages, refusal_response
from services.gateway.anthropic.routes import MessagesRoutes
from services.gateway.connection import CLIENT_CLOSED_REQUEST, ClientGone
from services.gateway.errors import ApiError, ApiRefusal, unexpected
from services.gateway.generation import Generation
from services.gateway.health import Health
from services.gateway.openai.routes import OpenAIRoutes
from services.gateway.request_id import RequestIdMiddleware
from services.gateway.responses.routes import ResponsesRoutes

HealthCheck = Callable[[], Awaitable[Health]]
MoreMetrics = Callable[[], Awaitable[bytes]]


def build_rest(
    generation: Generation,
    health: HealthCheck,
    more_metrics: MoreMetrics | None = None,
) -> FastAPI:
    """Return the FastAPI application with all routes for clients.

    `/metrics` shows the request metrics and the result of `more_metrics`, for example the metrics of the engines. The
    result of `more_metrics` must be in Prometheus' text format.
    """
    app = FastAPI(title="Expertmesh", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(RequestIdMiddleware)
    OpenAIRoutes(generation).add_to(app)
    MessagesRoutes(generation).add_to(app)
    ResponsesRoutes(generation).add_to(app)
    _add_operations(app, generation, health, more_metrics)
    _add_error_handlers(app, generation)
    return app


def _add_operations(
    app: FastAPI, generation: Generation, health: HealthCheck, more_metrics: MoreMetrics | None
) -> None:
    @app.get("/health/live")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        now = await health()
        status = "not_ready" if not now.is_ready else "degraded" if now.is_degraded else "ready"
        return JSONResponse({"status": status, "detail": now.detail}, 200 if now.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        more = await more_metrics() if more_metrics else b""
        return Response(generation.metrics.to_text() + more, media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI, generation: Generation) -> None:
    def refuse(request: Request, error: ApiError) -> Response:
        generation.metrics.count_refused(error.refusal.label)
        if is_of_messages(request.url.path):
            return refusal_response(error, request.state.id)
        return JSONResponse(error.to_json(), error.refusal.status, error.headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return refuse(request, error)

    @app.exception_handler(ClientGone)
    async def on_client_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return refuse(request, _routing_error(request, error))

    @app.exception_handler(Exception)
    async def on_unexpected(request: Request, error: Exception) -> Response:
        return refuse(request, unexpected(error))


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    """Return the ApiError for an unknown path or method; FastAPI itself reports no other mistakes."""
    path = request.url.path
    if error.status_code == ApiRefusal.METHOD.status:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(ApiRefusal.METHOD, f"{path} must be requested with {allowed}, not {request.method}.")
    return ApiError(ApiRefusal.NOT_FOUND, f"There is no path {path}; /v1/models lists the served models.")
