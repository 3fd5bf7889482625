"""`add_server_routes` adds the routes that tell about the server itself: its health, version, metrics and tokenizer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from services.gateway.generation import Generation
from services.gateway.health import Health

HealthCheck = Callable[[], Awaitable[Health]]
MoreMetrics = Callable[[], Awaitable[CollectorRegistry | None]]
VERSION = version("expertmesh")
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
METRICS_RESPONSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


class _Joined(Collector):
    """A `_Joined` collects the metrics of several registries, so that one text can hold all of them."""

    def __init__(self, *registries: CollectorRegistry | None) -> None:
        self._registries = registries

    def collect(self) -> Iterator[Metric]:
        for registry in self._registries:
            if registry is not None:
                yield from registry.collect()


def add_server_routes(
    app: FastAPI, generation: Generation, health: HealthCheck, more_metrics: MoreMetrics | None
) -> None:
    """Add the routes to `app`.

    `/metrics` shows the request metrics and the registry that `more_metrics` returns, in Prometheus' text format or, if
    the client accepts it, in OpenMetrics.
    """

    @app.get("/health/live")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        now = await health()
        status = "not_ready" if not now.is_ready else "degraded" if now.is_degraded else "ready"
        return JSONResponse({"status": status, "detail": now.detail}, 200 if now.is_ready else 503)

    # The status without a body, as vLLM answers. AWS SageMaker asks for /ping.
    async def health_status() -> Response:
        return Response(status_code=200 if (await health()).is_ready else 503)

    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        app.add_api_route(path, health_status, methods=[method], response_class=Response)

    @app.get("/version")
    async def server_version() -> JSONResponse:
        return JSONResponse({"version": VERSION})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> JSONResponse:
        return JSONResponse(generation.tokenizer.info())

    @app.get("/metrics", response_class=PlainTextResponse, responses=METRICS_RESPONSE)
    async def metrics(request: Request) -> Response:
        more = await more_metrics() if more_metrics else None
        text, media_type = _encode(_Joined(generation.metrics.registry, more), request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": media_type})


def _encode(metrics: Collector, accept: str) -> tuple[bytes, str]:
    """Return the text of `metrics` in a format that the client accepts, and the format's name."""
    encode, media_type = choose_encoder(accept)
    if media_type.startswith("application/openmetrics-text"):
        # prometheus_client would replace the colon in the names of samples, but not in the names of their families.
        # With the escaping "allow-utf-8", prometheus_client changes no name; our names need no escaping.
        text: bytes = openmetrics.generate_latest(metrics, openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
        return text, OPENMETRICS
    return encode(metrics), media_type
