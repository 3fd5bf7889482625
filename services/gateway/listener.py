"""A `Listener` serves the gateway's own ports in the gateway's process: uvicorn serves REST, grpc.aio serves gRPC.

Ray Serve's proxies are not used for tokens. The proxies run in other processes, delay each token by 2 to 3 ms and use
1 ms of CPU time for each token. (Measured time to the first token: 11 to 15 ms through Serve's default path, 2.2 ms
with uvicorn alone.) The proxies still run in Kubernetes, because a pod is Ready only if a proxy runs in the pod.
Serve's HAProxy mode is as fast as uvicorn, but HAProxy needs fixed ports and file paths on the machine. HAProxy also
cuts off the requests that still run two minutes after a change of the replicas.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import uvicorn
from fastapi import FastAPI
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from protos.options import MAX_MESSAGE_BYTES
from services.gateway.grpc_api import GrpcError, InferenceApi

Context = grpc.aio.ServicerContext[object, object]
SERVICES = (pb.DESCRIPTOR.services_by_name["Inference"], health_pb2.DESCRIPTOR.services_by_name["Health"])
BACKLOG = 2048  # maximum number of TCP connections that wait to be accepted
ALL_INTERFACES = "0.0.0.0"


@dataclass(frozen=True)
class ListenerConfig:
    """A `ListenerConfig` says on which ports a gateway listens.

    If `http_port` is None, REST requests arrive only through Serve's HTTP proxy; if `grpc_port` is None, gRPC requests
    arrive only through Serve's gRPC proxy.
    """

    host: str
    http_port: int | None = None
    grpc_port: int | None = None
    drain_s: float = 1.0  # seconds that a stopping gateway waits for its open streams to end


class Listener:
    """A `Listener` serves REST and gRPC on the ports of its config.

    `start` and `stop` must be called on the same event loop. Several gateways on one machine may listen on the same
    ports; the kernel then divides new connections among them.
    """

    def __init__(self, config: ListenerConfig, rest: FastAPI, api: InferenceApi) -> None:
        self.config, self._rest, self._api = config, rest, api
        self._http: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._grpc: grpc.aio.Server | None = None
        self._grpc_serving: asyncio.Task[bool] | None = None

    async def start(self) -> None:
        """Start to serve on the configured ports. Raises OSError or RuntimeError if a port is taken."""
        if self.config.http_port is not None:
            await self._start_http(self.config.http_port)
        if self.config.grpc_port is not None:
            await self._start_grpc(self.config.grpc_port)

    async def stop(self) -> None:
        """Accept no new requests, and wait up to `drain_s` seconds for the open requests to end."""
        if self._http is not None:
            self._http.should_exit = True
        if self._grpc is not None:
            await self._grpc.stop(self.config.drain_s)
        if self._serving is not None:
            await self._serving
        if self._grpc_serving is not None:
            await self._grpc_serving

    @property
    def is_healthy(self) -> bool:
        """Return True while every configured port is served."""
        return not any(serving is not None and serving.done() for serving in (self._serving, self._grpc_serving))

    async def _start_http(self, port: int) -> None:
        uvicorn_config = uvicorn.Config(
            self._rest,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=math.ceil(self.config.drain_s),
        )
        listening = socket.create_server((self.config.host, port), backlog=BACKLOG, reuse_port=True)
        # asyncio sets TCP_NODELAY only on sockets that were created with the protocol number IPPROTO_TCP, and
        # create_server uses 0. Without TCP_NODELAY, Nagle's algorithm delays a token by up to 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._http = uvicorn.Server(uvicorn_config)
        self._serving = asyncio.create_task(self._http.serve(sockets=[listening]))
        while not self._http.started and not self._serving.done():
            await asyncio.sleep(0.01)

    async def _start_grpc(self, port: int) -> None:
        self._grpc = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 1),
            )
        )
        for service in SERVICES:
            self._grpc.add_generic_rpc_handlers((grpc_handlers(service, self._api),))
        reflection.enable_server_reflection(
            (*(service.full_name for service in SERVICES), reflection.SERVICE_NAME), self._grpc
        )
        self._grpc.add_insecure_port(f"{self.config.host}:{port}")
        await self._grpc.start()
        self._grpc_serving = asyncio.create_task(self._grpc.wait_for_termination())


def grpc_handlers(service: ServiceDescriptor, api: InferenceApi) -> grpc.GenericRpcHandler:
    """Return the gRPC handlers of the RPCs of `service` that `api` implements.

    An RPC is implemented by the method of `api` that has the RPC's name in snake case.
    """
    named = ((method, getattr(api, _snake_case(method.name), None)) for method in service.methods)
    handlers = {method.name: _handler(method, function) for method, function in named if function is not None}
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _snake_case(name: str) -> str:
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")


def _handler(method: MethodDescriptor, function: Callable[[Any, Context], Any]) -> grpc.RpcMethodHandler[Any, Any]:
    make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    behaviour = _streamed(function) if method.server_streaming else _answered(function)
    return make(behaviour, GetMessageClass(method.input_type).FromString, _serialize)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _answered(function: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    async def answer(request: Any, context: Context) -> Any:
        try:
            return await function(request, context)
        except GrpcError as error:
            await context.abort(error.code, error.message)

    return answer


def _streamed(function: Callable[[Any, Context], Any]) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async with aclosing(function(request, context)) as messages:
                async for message in messages:
                    yield message
        except GrpcError as error:
            await context.abort(error.code, error.message)

    return stream
