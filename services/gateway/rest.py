"""The REST API is one FastAPI application: `build_rest` joins the routes of all APIs and their error handlers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from services.gateway.anthropic.refusals import is_of_messages, refusal_response
from services.gateway.anthropic.routes import MessagesRoutes
from services.gateway.connection import CLIENT_CLOSED_REQUEST, ClientGone
from services.gateway.errors import ApiError, ApiRefusal, unexpected
from services.gateway.generation import Generation
from services.gateway.openai.routes import OpenAIRoutes
from services.gateway.ports.middleware import ApiCorsMiddleware, HeadMiddleware, UnexpectedErrorMiddleware
from services.gateway.ports.openapi import ERRORS, document
from services.gateway.request_id import RequestIdMiddleware
from services.gateway.responses.routes import ResponsesRoutes
from services.gateway.server_routes import VERSION, HealthCheck, MoreMetrics, add_server_routes

Refuse = Callable[[Request, ApiError], Response]
DESCRIPTION = "OpenAI's and Anthropic's APIs for one model, with vLLM's names where those APIs have none."


def build_rest(
    generation: Generation,
    health: HealthCheck,
    more_metrics: MoreMetrics | None = None,
    allowed_origins: Sequence[str] = (),
) -> FastAPI:
    """Return the FastAPI application with all routes for clients.

    `/metrics` shows the request metrics and the result of `more_metrics`, for example the metrics of the engines. Web
    pages of the `allowed_origins` may call the API. `/docs` works without access to other servers.
    """
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        title="Expertmesh",
        version=VERSION,
        description=DESCRIPTION,
        responses=ERRORS,
        redirect_slashes=False,
    )
    document(app)
    OpenAIRoutes(generation).add_to(app)
    MessagesRoutes(generation).add_to(app)
    ResponsesRoutes(generation).add_to(app)
    add_server_routes(app, generation, health, more_metrics)
    refuse = _refuser(generation)
    _add_error_handlers(app, refuse)
    # The middleware that is added last sees a request first.
    app.add_middleware(UnexpectedErrorMiddleware, lambda request, error: refuse(request, unexpected(error)))
    app.add_middleware(HeadMiddleware)
    app.add_middleware(RequestIdMiddleware)
    if allowed_origins:
        app.add_middleware(ApiCorsMiddleware, list(allowed_origins))
    return app


def _refuser(generation: Generation) -> Refuse:
    def refuse(request: Request, error: ApiError) -> Response:
        generation.metrics.count_refused(error.refusal.label)
        if is_of_messages(request.url.path):
            return refusal_response(error, request.state.id)
        return JSONResponse(error.to_json(), error.refusal.status, error.headers)

    return refuse


def _add_error_handlers(app: FastAPI, refuse: Refuse) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return refuse(request, error)

    @app.exception_handler(ClientGone)
    async def on_client_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        response = refuse(request, _routing_error(request, error))
        if error.status_code == ApiRefusal.METHOD.status:
            response.headers["Allow"] = _allowed(request)
        return response


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    """Return the ApiError for an unknown path or method; FastAPI itself reports no other mistakes."""
    path = request.url.path
    if error.status_code == ApiRefusal.METHOD.status:
        return ApiError(ApiRefusal.METHOD, f"{path} must be requested with {_allowed(request)}, not {request.method}.")
    return ApiError(ApiRefusal.NOT_FOUND, f"There is no path {path}; /v1/models lists the served models.")


def _allowed(request: Request) -> str:
    """Return the methods that the routes of the request's path allow, in the form of the header Allow."""
    matching = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    methods = {method for route in matching if isinstance(route, Route) for method in route.methods or ()}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
