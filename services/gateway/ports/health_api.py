"""A `HealthApi` implements grpc.health.v1, with which load balancers and clients ask whether the server can serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse

from services.gateway.errors import GrpcError
from services.gateway.health import Health

# names of services that a client may ask about; "" stands for the whole server
SERVICE_NAMES = ("", "expertmesh.inference.v1.Inference")
WATCH_PERIOD_S = 1.0  # seconds between two checks of the health for a client that watches the health


class HealthApi:
    """A `HealthApi` implements the RPCs of grpc.health.v1; each method has the name of its RPC in snake case.

    A degraded server is reported as SERVING.
    """

    def __init__(self, health: Callable[[], Awaitable[Health]]) -> None:
        self._health = health

    async def check(self, request: HealthCheckRequest, _: Any = None) -> HealthCheckResponse:
        """Return the status of a service. Raises GrpcError if there is no such service."""
        if request.service not in SERVICE_NAMES:
            allowed = " or ".join(map(repr, SERVICE_NAMES))
            sentence = f"service must be {allowed}, not {request.service!r:.200}."
            raise GrpcError(grpc.StatusCode.NOT_FOUND, sentence)
        return HealthCheckResponse(status=await self._status())

    async def list(self, _: HealthListRequest, __: Any = None) -> HealthListResponse:
        """Return the status of every service."""
        now = HealthCheckResponse(status=await self._status())
        return HealthListResponse(statuses=dict.fromkeys(SERVICE_NAMES, now))

    async def watch(self, request: HealthCheckRequest, _: Any = None) -> AsyncGenerator[HealthCheckResponse, None]:
        """Yield the status of a service now and after each change, without end.

        The status of a service that does not exist is SERVICE_UNKNOWN, as grpc.health.v1 demands.
        """
        is_known, last = request.service in SERVICE_NAMES, None
        while True:
            status = await self._status() if is_known else HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                yield HealthCheckResponse(status=status)
            last = status
            await asyncio.sleep(WATCH_PERIOD_S)

    async def _status(self) -> HealthCheckResponse.ServingStatus:
        is_ready = (await self._health()).is_ready
        return HealthCheckResponse.SERVING if is_ready else HealthCheckResponse.NOT_SERVING
