"""`start_grpc_server` serves the gRPC API, grpc.health.v1 and server reflection on a port of the gateway."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import text_format
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from protos.options import KEEPALIVE, MAX_MESSAGE_BYTES
from services.gateway.errors import GrpcError
from services.gateway.grpc_api import InferenceApi
from services.gateway.limits import GatewayLimits
from services.gateway.ports.health_api import HealthApi

Context = grpc.aio.ServicerContext[object, object]
INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
SERVICES = (INFERENCE, HEALTH)
# grpcio-reflection offers only v1alpha. The messages of v1 are the same; only the names differ.
REFLECTION_METHOD = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].methods_by_name[
    "ServerReflectionInfo"
]
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
REFLECTIONS = (REFLECTION_V1, reflection.SERVICE_NAME)
IDLE_S = 300  # seconds after which a connection without an RPC is closed; clients connect again by themselves
MAX_ERROR_LEN = 1000  # characters of an error's sentence, because clients limit the size of its metadata
MIN_PING_INTERVAL_S = 10  # seconds; a client that sends keepalive pings more often is disconnected


@dataclass(frozen=True)
class _Undecodable:
    """An `_Undecodable` stands for a request that is no message of the type `kind`."""

    kind: str


class _UnknownMethods(grpc.GenericRpcHandler):
    """An `_UnknownMethods` answers RPCs that no other handler knows, so that these answers have a request id, too."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method

        async def refuse(_: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            await _abort(context, GrpcError(grpc.StatusCode.UNIMPLEMENTED, f"There is no RPC {method:.200}."))
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)


async def start_grpc_server(
    address: str, api: InferenceApi, health: HealthApi, limits: GatewayLimits, max_message_bytes: int
) -> grpc.aio.Server:
    """Start to serve `api` and `health` at `address`, and return the server.

    A request may be at most `max_message_bytes` long. Raises RuntimeError if the address is taken.
    """
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_metadata_size", limits.header_bytes),
            ("grpc.absolute_max_metadata_size", limits.header_bytes),
            ("grpc.max_concurrent_streams", limits.grpc_streams),
            ("grpc.max_allowed_incoming_connections", limits.connections),
            ("grpc.server_handshake_timeout_ms", round(1000 * limits.header_s)),
            ("grpc.max_connection_idle_ms", 1000 * IDLE_S),
            *KEEPALIVE,
            ("grpc.http2.min_ping_interval_without_data_ms", 1000 * MIN_PING_INTERVAL_S),
            ("grpc.so_reuseport", 1),
        ),
        maximum_concurrent_rpcs=limits.grpc_streams,
    )
    server.add_generic_rpc_handlers((grpc_handlers(INFERENCE, api), grpc_handlers(HEALTH, health)))
    reflections = [_reflection(name) for name in REFLECTIONS]
    server.add_generic_rpc_handlers((*reflections, _UnknownMethods()))
    server.add_insecure_port(address)
    await server.start()
    return server


def grpc_handlers(service: ServiceDescriptor, api: InferenceApi | HealthApi) -> grpc.GenericRpcHandler:
    """Return the gRPC handlers of the RPCs of `service` that `api` implements.

    An RPC is implemented by the method of `api` that has the RPC's name in snake case.
    """
    named = ((method, getattr(api, _snake_case(method.name), None)) for method in service.methods)
    handlers = {method.name: _handler(method, function) for method, function in named if function is not None}
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _reflection(service: str) -> grpc.GenericRpcHandler:
    """Return the handlers of the reflection service with the name `service`."""
    names = (*(served.full_name for served in SERVICES), *REFLECTIONS)
    servicer = reflection.aio.ReflectionServicer(service_names=names, pool=_descriptions())

    async def info(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        try:
            async for response in servicer.ServerReflectionInfo(_decoded(requests), context):
                yield response
        except GrpcError as error:
            await _abort(context, error)

    handler = grpc.stream_stream_rpc_method_handler(info, _decoder(REFLECTION_METHOD), _serialize)
    return grpc.method_handlers_generic_handler(service, {REFLECTION_METHOD.name: handler})


def _descriptions() -> DescriptorPool:
    """Return the descriptions of all services that reflection lists.

    The pool is not protobuf's default pool, because another library might add its own description of v1 there.
    """
    pool = DescriptorPool()

    def add(file: FileDescriptor) -> None:
        for dependency in file.dependencies:
            add(dependency)
        pool.AddSerializedFile(file.serialized_pb)

    for file in (pb.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        add(file)
    alpha = FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    v1 = text_format.Parse(text_format.MessageToString(alpha).replace("v1alpha", "v1"), FileDescriptorProto())
    v1.options.ClearField("deprecated")  # only v1alpha is deprecated
    pool.AddSerializedFile(v1.SerializeToString())
    return pool


async def _decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        _check_decoded(request)
        yield request


def _snake_case(name: str) -> str:
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")


def _handler(method: MethodDescriptor, function: Callable[[Any, Context], Any]) -> grpc.RpcMethodHandler[Any, Any]:
    make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    behaviour = _streamed(function) if method.server_streaming else _answered(function)
    return make(behaviour, _decoder(method), _serialize)


def _decoder(method: MethodDescriptor) -> Callable[[bytes], Any]:
    """Return a function that decodes the requests of `method`.

    The function returns an `_Undecodable` for a bad request. If the function raised an exception, gRPC would
    log a traceback and answer INTERNAL.
    """
    kind = GetMessageClass(method.input_type)

    def decode(data: bytes) -> Any:
        try:
            return kind.FromString(data)
        except DecodeError:
            return _Undecodable(method.input_type.full_name)

    return decode


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _check_decoded(request: Any) -> None:
    if isinstance(request, _Undecodable):
        sentence = f"The request must be a message {request.kind} in protobuf's binary format, but cannot be decoded."
        raise GrpcError(grpc.StatusCode.INVALID_ARGUMENT, sentence)


def _answered(function: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    async def answer(request: Any, context: Context) -> Any:
        try:
            _check_decoded(request)
            return await function(request, context)
        except GrpcError as error:
            await _abort(context, error)

    return answer


def _streamed(function: Callable[[Any, Context], Any]) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            _check_decoded(request)
            async with aclosing(function(request, context)) as messages:
                async for message in messages:
                    yield message
        except GrpcError as error:
            await _abort(context, error)

    return stream


async def _abort(context: Context, error: GrpcError) -> None:
    """End the RPC with `error`, and with a request id if the RPC has none yet."""
    metadata = tuple(context.trailing_metadata() or ())
    if all(name != "x-request-id" for name, _ in metadata):
        metadata = (*metadata, ("x-request-id", uuid.uuid4().hex))
    await context.abort(error.code, error.message[:MAX_ERROR_LEN], metadata)
