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
import resource
import socket
from dataclasses import dataclass
from functools import partial

import grpc
import uvicorn
from fastapi import FastAPI

from services.gateway.generation import Generation
from services.gateway.grpc_api import InferenceApi
from services.gateway.ports.grpc_server import start_grpc_server
from services.gateway.ports.health_api import HealthApi
from services.gateway.ports.http_protocol import BoundedHttpProtocol, OpenConnections

BACKLOG = 2048  # maximum number of TCP connections that wait to be accepted
# Bytes of a response that the kernel keeps while the client does not read. By default, Linux keeps up to 4 MiB for each
# connection. A stream of tokens needs far less.
SEND_BUFFER = 256 << 10
# Files that a gateway may need to open in addition to the connections of its clients: its program, its streams to
# backbones and Ray's own connections.
OTHER_FILES = 1024
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
    keep_alive_s: float = 5.0  # seconds for which an idle connection to the REST port stays open


class Listener:
    """A `Listener` serves REST and gRPC on the ports of its config.

    `start` and `stop` must be called on the same event loop. Several gateways of one application and machine may listen
    on the same ports; the kernel then divides new connections among them. This happens when a gateway is replaced.
    `expertmesh up` refuses a port that another application uses (`services/cli/local_application.py`).
    """

    def __init__(self, config: ListenerConfig, rest: FastAPI, generation: Generation, health: HealthApi) -> None:
        self.config, self._rest, self._generation, self._health = config, rest, generation, health
        self._http: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._grpc: grpc.aio.Server | None = None
        self._grpc_serving: asyncio.Task[bool] | None = None

    async def start(self) -> None:
        """Start to serve on the configured ports. Raises OSError or RuntimeError if a port is taken."""
        _allow_open_files(3 * self._generation.limits.connections + OTHER_FILES)  # REST, refused REST and gRPC
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
        metrics = self._generation.metrics
        connections = OpenConnections(
            self._generation.limits, lambda refusal: metrics.count_refused(refusal.label), self.config.keep_alive_s
        )
        uvicorn_config = uvicorn.Config(
            self._rest,
            http=partial(BoundedHttpProtocol, connections),  # type: ignore[arg-type]  # uvicorn only calls it
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
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # accepted connections inherit it
        self._http = uvicorn.Server(uvicorn_config)
        self._serving = asyncio.create_task(self._http.serve(sockets=[listening]))
        while not self._http.started and not self._serving.done():
            await asyncio.sleep(0.01)

    async def _start_grpc(self, port: int) -> None:
        limits, card = self._generation.limits, self._generation.card
        address, max_message_bytes = f"{self.config.host}:{port}", limits.max_body_bytes(card.max_model_len)
        api = InferenceApi(self._generation)
        self._grpc = await start_grpc_server(address, api, self._health, limits, max_message_bytes)
        self._grpc_serving = asyncio.create_task(self._grpc.wait_for_termination())


def _allow_open_files(number: int) -> None:
    """Raise the process's limit on open files to `number`, or as far as the system allows.

    Many systems allow only 1,024 by default. If connections used them up, the server could accept no connection at all.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
