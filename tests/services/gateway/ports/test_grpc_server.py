from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from protos.expertmesh.inference.v1 import inference_pb2_grpc
from services.gateway.generation import Generation
from services.gateway.grpc_api import InferenceApi
from services.gateway.limits import GatewayLimits
from services.gateway.listener import ListenerConfig
from services.gateway.ports.grpc_server import (
    HEALTH,
    INFERENCE,
    MAX_ERROR_LEN,
    REFLECTION_V1,
    REFLECTIONS,
    SERVICES,
    _descriptions,
    grpc_handlers,
)
from services.gateway.ports.health_api import HealthApi
from tests.services.application import free_port
from tests.services.gateway.echo import EchoSource
from tests.services.gateway.listening import PlainConnection, connect, listening, run, until


@contextlib.asynccontextmanager
async def channel(generation: Generation, **limits: float) -> AsyncIterator[grpc.aio.Channel]:
    """Serve `generation` with the `limits`, and yield a channel to the server."""
    generation.limits = GatewayLimits.model_validate(generation.limits.model_dump() | limits)
    config = ListenerConfig("127.0.0.1", grpc_port=free_port())
    address = f"127.0.0.1:{config.grpc_port}"
    async with listening(generation, config), grpc.aio.insecure_channel(address) as opened:
        yield opened


def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]


def trailers(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    return dict(error.trailing_metadata())


def test_every_rpc_is_served() -> None:
    for service, api in zip(SERVICES, (InferenceApi, HealthApi), strict=True):
        handlers: Any = grpc_handlers(service, api)  # type: ignore[arg-type]
        assert {name.rpartition("/")[2] for name in handlers._method_handlers} == {m.name for m in service.methods}
    assert SERVICES == (INFERENCE, HEALTH)


@pytest.mark.parametrize("method", [method.name for method in INFERENCE.methods])
def test_a_request_that_cannot_be_decoded(
    generation: Generation, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with channel(generation) as opened:
            call = opened.unary_stream(f"/{INFERENCE.full_name}/{method}")(b"\xff\xff")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call.read()
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            kind = INFERENCE.methods_by_name[method].input_type.full_name
            assert str(raised.value.details()).startswith(f"The request must be a message {kind} in protobuf's")
            assert trailers(raised.value)["x-request-id"]

    with caplog.at_level(logging.WARNING):
        run(test)
    assert caplog.records == []


def test_every_error_has_a_request_id(generation: Generation) -> None:
    other_model = {"model": "other"}

    async def test() -> None:
        async with channel(generation) as opened:
            calls = [
                stub(opened).Generate(pb.GenerateRequest(text="a", request_id="mine", **other_model)),
                stub(opened).GenerateStream(pb.GenerateRequest(text="a", **other_model)).read(),
                stub(opened).GenerateStream(pb.GenerateRequest(request_id="x" * 999)).read(),
                stub(opened).GetModel(pb.GetModelRequest(id="other")),
                stub(opened).Tokenize(pb.TokenizeRequest(text="a", **other_model)),
                stub(opened).Detokenize(pb.DetokenizeRequest(token_ids=[9999])),
                health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(service="x")),
                opened.unary_unary("/expertmesh.inference.v1.Inference/Nothing")(b""),
                opened.stream_stream("/other.Service/Nothing")(iter([b""])).read(),
            ]
            ids = []
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call
                ids.append(trailers(raised.value)["x-request-id"])
            assert raised.value.details() == "There is no RPC /other.Service/Nothing."
            assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
            assert ids[0] == "mine"
            assert all(ids)
            assert len(set(ids)) == len(ids)

    run(test)


def test_messages_are_bounded_as_bodies_are(generation: Generation) -> None:
    async def test() -> None:
        async with channel(generation, body_bytes=1 << 20) as opened:
            for num_chars, code in ((1 << 20, "RESOURCE_EXHAUSTED"), ((1 << 20) - 100, "INVALID_ARGUMENT")):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await stub(opened).Tokenize(pb.TokenizeRequest(text="a" * num_chars))
                assert raised.value.code().name == code
            assert raised.value.details().startswith("prompt must have at most 65536 tokens to be tokenized")
            answer = await stub(opened).Tokenize(pb.TokenizeRequest(text="a" * 1000))
            assert len(answer.token_ids) == 1000
            assert not answer.token_texts


def test_ids_to_detokenize_are_bounded(generation: Generation) -> None:
    async def test() -> None:
        async with channel(generation) as opened:
            answer = await stub(opened).Detokenize(pb.DetokenizeRequest(token_ids=[65] * 65_536))
            assert len(answer.text) == 65_536
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub(opened).Detokenize(pb.DetokenizeRequest(token_ids=[65] * 65_537))
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert raised.value.details() == "tokens must hold at most 65536 token ids, but holds more."

    run(test)


def test_a_long_text_of_messages_is_bounded(generation: Generation) -> None:
    async def test() -> None:
        async with channel(generation, body_bytes=1 << 20) as opened:
            chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="a" * 500_000)])
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub(opened).Tokenize(pb.TokenizeRequest(chat=chat))
            assert raised.value.details().startswith("messages must have at most 65536 tokens to be tokenized")

    run(test)

    run(test)


def test_metadata_is_bounded(generation: Generation) -> None:
    async def test() -> None:
        async with channel(generation, header_bytes=4096) as opened:
            await stub(opened).ListModels(pb.ListModelsRequest(), metadata=[("a", "x" * 2000)])
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub(opened).ListModels(pb.ListModelsRequest(), metadata=[("a", "x" * 5000)])
            assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    run(test)


def test_rpcs_in_flight_are_bounded(generation: Generation, source: EchoSource) -> None:
    source.gate = asyncio.Event()
    generation.limits = GatewayLimits(grpc_streams=3)
    config = ListenerConfig("127.0.0.1", grpc_port=free_port())
    request = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=3))
    address, options = f"127.0.0.1:{config.grpc_port}", (("grpc.use_local_subchannel_pool", 1),)

    async def test() -> None:
        async with (
            listening(generation, config),
            grpc.aio.insecure_channel(address, options) as one,
            grpc.aio.insecure_channel(address, options) as other,
        ):
            calls = [asyncio.ensure_future(stub(one).Generate(request)) for _ in range(3)]
            await until(lambda: len(source.active) == 3)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub(other).Generate(request)
            assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            source.gate.set()
            assert [answer.usage.completion_tokens for answer in await asyncio.gather(*calls)] == [3, 3, 3]
            assert (await stub(other).Generate(request)).usage.completion_tokens == 3

    run(test)


@pytest.mark.parametrize("version", REFLECTIONS)
def test_reflection_lists_and_describes_every_service(generation: Generation, version: str) -> None:
    async def test() -> None:
        async with channel(generation) as opened:
            call = opened.stream_stream(
                f"/{version}/ServerReflectionInfo",
                reflection_pb2.ServerReflectionRequest.SerializeToString,
                reflection_pb2.ServerReflectionResponse.FromString,
            )
            [listed] = [one async for one in call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))]
            names = {service.name for service in listed.list_services_response.service}
            assert names == {INFERENCE.full_name, HEALTH.full_name, REFLECTION_V1, reflection.SERVICE_NAME}
            asked = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(names)]
            answers = [answer async for answer in call(iter(asked))]
            for name, answer in zip(sorted(names), answers, strict=True):
                pool = DescriptorPool()
                for file in reversed(answer.file_descriptor_response.file_descriptor_proto):  # dependencies first
                    pool.AddSerializedFile(file)
                assert pool.FindServiceByName(name).methods

    run(test)


def test_v1_of_reflection_is_described_with_the_names_of_v1() -> None:
    described = _descriptions().FindFileContainingSymbol(REFLECTION_V1)
    assert described.package == "grpc.reflection.v1"
    method = described.services_by_name["ServerReflection"].methods_by_name["ServerReflectionInfo"]
    assert method.input_type.full_name == "grpc.reflection.v1.ServerReflectionRequest"
    assert b"alpha" not in described.serialized_pb
    assert not described.GetOptions().deprecated


@pytest.mark.parametrize("name", REFLECTIONS)
def test_undecodable_requests_of_reflection(
    generation: Generation, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    async def test() -> None:
        async with channel(generation) as opened:
            call = opened.stream_stream(f"/{name}/ServerReflectionInfo")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                [answer async for answer in call(iter([b"\xff"]))]
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    run(test)
    assert not caplog.records


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (pb.Chat(messages=[pb.ChatMessage(role="x" * 50_000)]), r"messages\[0\]\.role must be 'system', .*, not 'xxx"),
        (pb.Chat(template_kwargs={"a": float("nan")}), r"chat_template_kwargs must hold only finite numbers, not NaN"),
    ],
)
def test_refusals_fit_into_metadata(generation: Generation, chat: pb.Chat, message: str) -> None:
    async def test() -> None:
        async with channel(generation) as opened:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub(opened).Generate(pb.GenerateRequest(chat=chat))
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert re.match(message, str(raised.value.details()))
            assert len(str(raised.value.details())) <= MAX_ERROR_LEN

    run(test)


def test_health_is_watched_and_listed(generation: Generation) -> None:
    async def test() -> None:
        async with channel(generation) as opened:
            health = health_pb2_grpc.HealthStub(opened)
            call = health.Watch(health_pb2.HealthCheckRequest())
            assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
            call.cancel()
            assert "" in (await health.List(health_pb2.HealthListRequest())).statuses

    run(test)


def test_connections_are_bounded(generation: Generation) -> None:
    async def test() -> None:
        generation.limits = GatewayLimits(connections=3)
        config = ListenerConfig("127.0.0.1", grpc_port=free_port())
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(listening(generation, config))
            clients: list[PlainConnection] = []
            for _ in range(5):
                clients.append(await stack.enter_async_context(connect(config.grpc_port)))
            await until(lambda: clients[3].is_closed and clients[4].is_closed)
            assert [client.is_closed for client in clients] == [False, False, False, True, True]

    run(test)
