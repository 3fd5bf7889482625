"""One machine: starts or joins Ray, starts the embedded store, runs the application, and stops what it started."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from cluster.embedded import EmbeddedRedis
from services.app import GRPC_SERVICERS, AppArgs, build_app

APP_NAME = "expertmesh"


@dataclass(frozen=True)
class Ports:
    """Where the application listens on 127.0.0.1."""

    http: int = 8000
    grpc: int = 9000


def check_port(name: str, port: int) -> None:
    """Raises ValueError if somebody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ValueError(
                f"{name} {port} is in use on 127.0.0.1; choose another one or stop what listens there"
            ) from None


@contextmanager
def running(args: AppArgs, ports: Ports, ray_address: str | None = None) -> Iterator[AppArgs]:
    """The application, ready for its first request; on exit everything that was started here is stopped."""
    check_port("--port", ports.http)
    check_port("--grpc-port", ports.grpc)
    with ExitStack() as stack:
        if args.redis_url == "embedded://" and args.experts == "remote":
            args = args.model_copy(update={"redis_url": stack.enter_context(EmbeddedRedis()).url})
        stack.enter_context(_ray(args, ray_address))
        stack.enter_context(_serve(args, ports))
        yield args


@contextmanager
def _ray(args: AppArgs, address: str | None) -> Iterator[None]:
    num_cpus = args.backbone_threads + 8 + int(sum(pool.shards * max(1, pool.num_cpus) for pool in args.pools))
    own: dict[str, Any] = {} if address else {"num_cpus": num_cpus, "include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _serve(args: AppArgs, ports: Ports) -> Iterator[None]:
    grpc = {"port": ports.grpc, "grpc_servicer_functions": GRPC_SERVICERS}
    serve.start(http_options={"host": "127.0.0.1", "port": ports.http}, grpc_options=grpc)
    try:
        serve.run(build_app(args), name=APP_NAME, route_prefix="/")
        yield
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
