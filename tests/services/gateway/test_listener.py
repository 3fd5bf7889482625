from __future__ import annotations

import asyncio
import contextlib
import resource
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from protos.expertmesh.inference.v1 import inference_pb2_grpc
from services.gateway.generation import Generation
from services.gateway.listener import ListenerConfig
from services.gateway.ports.grpc_server import SERVICES
from tests.services.application import free_port
from tests.services.gateway.echo import EchoSource
from tests.services.gateway.listening import listening, run, until


def test_both_surfaces_answer_on_their_ports(generation: Generation) -> None:
    async def test() -> None:
        config = ListenerConfig("127.0.0.1", free_port(), free_port())
        async with listening(generation, config) as listener, httpx.AsyncClient() as http:
            assert listener.is_healthy
            answer = await http.post(
                f"http://127.0.0.1:{config.http_port}/v1/completions", json={"prompt": "hello", "max_tokens": 3}
            )
            assert answer.json()["usage"]["completion_tokens"] == 3
            async with grpc.aio.insecure_channel(f"127.0.0.1:{config.grpc_port}") as channel:
                stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
                request = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=3))
                assert (await stub.Generate(request)).usage.completion_tokens == 3
                assert sum([len(chunk.choice.token_ids) async for chunk in stub.GenerateStream(request)]) == 3
                health = health_pb2_grpc.HealthStub(channel)
                assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1  # 1 is SERVING
                reflecting = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
                listed = await anext(
                    aiter(reflecting(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
                )
                names = {service.name for service in listed.list_services_response.service}
                assert {service.full_name for service in SERVICES} <= names

    run(test)


def test_a_refusal_has_its_code_and_sentence(generation: Generation) -> None:
    async def test() -> None:
        config = ListenerConfig("127.0.0.1", grpc_port=free_port())
        async with listening(generation, config), grpc.aio.insecure_channel(f"127.0.0.1:{config.grpc_port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            request = pb.GenerateRequest(text="a", model="gpt")
            for call in (stub.Generate(request), stub.GenerateStream(request).read()):
                with pytest.raises(grpc.aio.AioRpcError, match="does not exist") as raised:
                    await call
                assert raised.value.code() == grpc.StatusCode.NOT_FOUND

    run(test)


def test_a_client_that_goes_away_frees_its_request(generation: Generation, source: EchoSource) -> None:
    source.pause = 0.05
    source.gate = may_answer = asyncio.Event()

    async def test() -> None:
        config = ListenerConfig("127.0.0.1", free_port(), free_port())
        body = {"prompt": "hello", "max_tokens": 50, "ignore_eos": True, "stream": True}
        async with listening(generation, config):
            may_answer.set()
            async with (
                httpx.AsyncClient() as http,
                http.stream("POST", f"http://127.0.0.1:{config.http_port}/v1/completions", json=body) as answer,
            ):
                await anext(answer.aiter_lines())
                may_answer.clear()  # from now on, only the client's leaving ends the request
                assert source.active
            await until(lambda: not source.active)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{config.grpc_port}") as channel:
                stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
                sampling = pb.SamplingParams(max_tokens=50, ignore_eos=True)
                call = stub.GenerateStream(pb.GenerateRequest(text="hello", sampling=sampling))
                may_answer.set()
                await call.read()
                may_answer.clear()
                call.cancel()
            await until(lambda: not source.active)

    run(test)


def test_a_grpc_server_that_ended_is_not_healthy(generation: Generation) -> None:
    async def test() -> None:
        async with listening(generation, ListenerConfig("127.0.0.1", grpc_port=free_port())) as listener:
            assert listener.is_healthy
            assert listener._grpc is not None
            await listener._grpc.stop(None)
            await until(lambda: not listener.is_healthy)

    run(test)


def test_several_gateways_of_a_machine_share_a_port(generation: Generation) -> None:
    async def test() -> None:
        config = ListenerConfig("127.0.0.1", free_port(), free_port())
        async with listening(generation, config), listening(generation, config), httpx.AsyncClient() as http:
            assert (await http.get(f"http://127.0.0.1:{config.http_port}/v1/models")).status_code == 200

    run(test)


@pytest.mark.parametrize(("drain_s", "is_whole"), [(20.0, True), (0.1, False)])
def test_open_streams_end_normally_within_the_time_to_drain(
    generation: Generation, source: EchoSource, drain_s: float, is_whole: bool
) -> None:
    source.pause = 0.05

    async def lines(http: httpx.AsyncClient, port: int) -> list[str]:
        body = {"prompt": "hello", "max_tokens": 40, "ignore_eos": True, "stream": True}
        found = []
        with contextlib.suppress(httpx.RemoteProtocolError):
            async with http.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    found.append(line)
        return found

    async def tokens(port: int) -> int:
        found = 0
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            sampling = pb.SamplingParams(max_tokens=40, ignore_eos=True)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for chunk in stub.GenerateStream(pb.GenerateRequest(text="hello", sampling=sampling)):
                    found += len(chunk.choice.token_ids)
        return found

    async def test() -> None:
        config = ListenerConfig("127.0.0.1", free_port(), free_port(), drain_s)
        async with listening(generation, config) as listener, httpx.AsyncClient() as http:
            assert config.http_port is not None
            assert config.grpc_port is not None
            rest, typed = (
                asyncio.create_task(lines(http, config.http_port)),
                asyncio.create_task(tokens(config.grpc_port)),
            )
            await until(lambda: len(source.active) == 2)
            await listener.stop()
            assert ("data: [DONE]" in await rest) == is_whole
            assert (await typed == 40) == is_whole

    run(test)


def test_the_connections_fit_the_limit_of_open_files(generation: Generation) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def test() -> None:
        async with listening(generation, ListenerConfig("127.0.0.1", free_port())):
            now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            assert now >= min(hard, 2 * generation.limits.connections)

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        run(test)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
