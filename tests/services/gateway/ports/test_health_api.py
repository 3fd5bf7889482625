from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest

from services.gateway.errors import GrpcError
from services.gateway.health import Health
from services.gateway.ports import health_api
from services.gateway.ports.grpc_server import INFERENCE
from services.gateway.ports.health_api import SERVICE_NAMES, HealthApi

READY, NOT_READY = Health(is_ready=True, is_degraded=True), Health(is_ready=False)


@pytest.fixture
def health() -> dict[str, Health]:
    return {"now": READY}


@pytest.fixture
def api(health: dict[str, Health]) -> HealthApi:
    async def check() -> Health:
        return health["now"]

    return HealthApi(check)


def test_check(api: HealthApi, health: dict[str, Health]) -> None:
    assert asyncio.run(api.check(HealthCheckRequest())).status == HealthCheckResponse.SERVING
    health["now"] = NOT_READY
    named = HealthCheckRequest(service=INFERENCE.full_name)
    assert asyncio.run(api.check(named)).status == HealthCheckResponse.NOT_SERVING
    with pytest.raises(GrpcError, match="service must be '' or 'expertmesh") as raised:
        asyncio.run(api.check(HealthCheckRequest(service="nothing")))
    assert raised.value.code == grpc.StatusCode.NOT_FOUND


def test_list(api: HealthApi) -> None:
    statuses = asyncio.run(api.list(HealthListRequest())).statuses
    assert {name: answer.status for name, answer in statuses.items()} == dict.fromkeys(
        SERVICE_NAMES, HealthCheckResponse.SERVING
    )


def test_watch_tells_each_change_once(
    api: HealthApi, health: dict[str, Health], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_api, "WATCH_PERIOD_S", 0.01)

    async def watch() -> list[int]:
        watching = api.watch(HealthCheckRequest())
        seen = [(await anext(watching)).status]
        for now in (NOT_READY, READY):
            pending = asyncio.ensure_future(anext(watching))
            await asyncio.sleep(0.05)
            assert not pending.done()
            health["now"] = now
            seen.append((await pending).status)
        await watching.aclose()
        return seen

    serving, not_serving = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
    assert asyncio.run(watch()) == [serving, not_serving, serving]


def test_watch_of_an_unknown_service(api: HealthApi) -> None:
    async def first() -> int:
        return int((await anext(api.watch(HealthCheckRequest(service="nothing")))).status)

    assert asyncio.run(first()) == HealthCheckResponse.SERVICE_UNKNOWN
