"""One machine: starts or joins Ray, starts the embedded store, runs the application, and stops what it started."""

from __future__ import annotations

import asyncio
import io
import logging
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve

from cluster.control.embedded_redis import EmbeddedRedis
from cluster.control.registry_store import StoreUnavailable
from model.family import load_family
from services.app import GRPC_SERVICERS, build_app
from services.args import AppArgs

APP_NAME = "expertmesh"


@dataclass(frozen=True)
class Ports:
    """Where the application listens on 127.0.0.1 (gRPC on every address where Serve's proxy does it)."""

    http: int = 8000
    grpc: int = 9000


def check_port(name: str, port: int, host: str) -> None:
    """Raises ValueError if somebody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise ValueError(f"{name} {port} is in use; choose another one or stop what listens there") from None


def check_store(args: AppArgs) -> None:
    """Raises ValueError if no store answers, or not to this password."""

    async def ask() -> None:
        registry = args.registry()
        await registry.shards()
        await registry.redis.aclose()

    try:
        asyncio.run(ask())
    except StoreUnavailable as error:
        raise ValueError(
            f"--redis-url {args.shown_redis_url} does not answer ({error}); start a server there or use embedded://"
        ) from None


def logs_path() -> Path:
    """Where Ray keeps what the processes of this machine write to standard error."""
    return Path("/tmp/ray/session_latest").resolve() / "logs"


@contextmanager
def running(args: AppArgs, ports: Ports, ray_address: str | None = None) -> Iterator[AppArgs]:
    """The application, ready for its first request; on exit everything that was started here is stopped."""
    if ports.http == ports.grpc:
        raise ValueError(f"--port and --grpc-port are both {ports.http}; they must differ")
    check_port("--port", ports.http, "127.0.0.1")
    check_port("--grpc-port", ports.grpc, "" if ray_address else "127.0.0.1")
    with ExitStack() as stack:
        if args.experts == "remote":
            if args.redis_url == "embedded://":
                args = args.model_copy(update={"redis_url": stack.enter_context(EmbeddedRedis()).url})
            check_store(args)
        stack.enter_context(_ray(args, ray_address))
        stack.enter_context(_serve_joined(args, ports) if ray_address else _serve_own(args, ports))
        yield args


def _quiet_ray() -> AbstractContextManager[object]:
    """Ray prints on the terminal that Serve's controller, which it was told to kill, failed."""
    return redirect_stdout(io.StringIO())


@contextmanager
def _ray(args: AppArgs, address: str | None) -> Iterator[None]:
    num_cpus = (
        args.backbone_replicas * args.threads(load_family(args.model))
        + 8
        + int(sum(pool.most_shards * max(1, pool.num_cpus) for pool in args.pools))
    )
    own: dict[str, Any] = {} if address else {"num_cpus": num_cpus, "include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield
    finally:
        with _quiet_ray():
            ray.shutdown()


@contextmanager
def _serve_own(args: AppArgs, ports: Ports) -> Iterator[None]:
    """The gateway listens itself: Serve's proxies would cost every token a hop and a process."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the command line says what is to be said
    serve.start(proxy_location="Disabled")
    try:
        _run(args.model_copy(update={"http_port": ports.http, "grpc_port": ports.grpc}))
        yield
    finally:
        with _quiet_ray():
            serve.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def _serve_joined(args: AppArgs, ports: Ports) -> Iterator[None]:
    """On a cluster that was there before the gateway may run on any node, where Serve's proxies find it, and Serve may
    be others' too: only our application goes when we go."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    grpc = {"port": ports.grpc, "grpc_servicer_functions": GRPC_SERVICERS}
    serve.start(http_options={"host": "127.0.0.1", "port": ports.http}, grpc_options=grpc)
    try:
        _run(args)
        yield
    finally:
        serve.delete(APP_NAME)


def _run(args: AppArgs) -> None:
    serve.run(build_app(args), name=APP_NAME, route_prefix="/")
