"""The context manager `running` runs the application on one machine, with a store, Ray and Ray Serve.

At the end, `running` stops everything that it has started.
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numba
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import DeploymentStatusOverview

import model.cpu  # noqa: F401  sets the folder in which numba keeps compiled kernels
from cluster.control.embedded_redis import EmbeddedRedis
from cluster.control.registry_store import StoreUnavailable
from model.families.registry import load_family
from services.app import GRPC_SERVICERS, build_app
from services.args import AppArgs
from services.cli.start_failure import reason_of
from services.cli.start_steps import SHARDS, StartGoal, StartObservation, StartReporter, StartStep, StepReport, steps_of

log = logging.getLogger(__name__)

APP_NAME = "expertmesh"
OUR_DEPLOYMENTS = ("gateway", "backbone", "controller")  # every other deployment is a pool of shards
# CPUs that Ray may give to the gateway, the controller and Serve. Backbones and shards have further CPUs.
OTHER_CPUS = 8
# Seconds between two observations; each observation costs Serve's controller up to 0.2 s if the machine is busy.
WATCH_PERIOD_S = 0.5
WATCH_JOIN_S = 5.0  # seconds to wait for the last observation, which may hang in Ray if Serve's controller has died


@dataclass(frozen=True)
class Ports:
    """A `Ports` holds the ports of the REST API and the gRPC API on 127.0.0.1.

    If the application joins a Ray cluster, the gRPC port is open on all addresses of the machine.
    """

    http: int = 8000
    grpc: int = 9000


def bind_port(name: str, port: int, host: str) -> socket.socket:
    """Return a socket that is bound to `port` on `host`; raise ValueError if the port cannot be used.

    `name` is the command-line option for the port, for the message.
    """
    # The first attempt fails if another process has the port, or if a server on the port has just stopped and its
    # connections are in TIME_WAIT. SO_REUSEADDR ignores such connections, but also other sockets that have this option
    # and do not listen. So the second attempt alone would not notice a socket that holds the port for an application.
    for may_reuse in (0, 1):
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, may_reuse)
        try:
            bound.bind((host, port))
        except OSError as error:
            bound.close()
            number, reason = error.errno, error.strerror
        else:
            return bound
    if number == errno.EADDRINUSE:
        raise ValueError(f"{name} {port} is in use; choose another port or stop the process that uses it")
    raise ValueError(f"{name} {port} cannot be used ({reason}); choose another port")


@contextmanager
def held_port(name: str, port: int) -> Iterator[None]:
    """Hold `port` on 127.0.0.1 for this application until the body ends; raise ValueError if the port cannot be used.

    A gateway opens its ports with SO_REUSEPORT, so that its replacement can listen before the old gateway has stopped.
    The kernel would also let the gateway of a second application share the port, and give it half of the connections.
    The held socket prevents that from the start of the application on: the socket never listens, and `bind_port` of the
    second application fails, because `bind_port` binds without SO_REUSEPORT.
    """
    with bind_port(name, port, "127.0.0.1") as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # from now on, the gateway can share the port
        yield


def check_store(args: AppArgs) -> None:
    """Raise ValueError if no store answers at the URL of `args`, or if the store refuses the password."""

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
    """Return the folder of Ray's log files, which hold the standard error of all processes on this machine."""
    return Path("/tmp/ray/session_latest").resolve() / "logs"


@contextmanager
def running(args: AppArgs, ports: Ports, reporter: StartReporter, ray_address: str | None = None) -> Iterator[AppArgs]:
    """Run the application until the body ends, then stop everything that this function has started.

    The body begins when the application is ready for its first request. `reporter` is told the progress of each step of
    the start. `ray_address` is the address of a Ray cluster to join; if None, Ray is started on this machine. Raises
    ValueError with one sentence if a port or the store cannot be used. Raises RuntimeError with one sentence if a
    replica does not start.
    """
    if ports.http == ports.grpc:
        raise ValueError(f"--port and --grpc-port are both {ports.http}; they must differ")
    with ExitStack() as stack:
        if ray_address:  # Serve's proxies listen
            bind_port("--port", ports.http, "127.0.0.1").close()
            bind_port("--grpc-port", ports.grpc, "").close()
        else:
            stack.enter_context(held_port("--port", ports.http))
            stack.enter_context(held_port("--grpc-port", ports.grpc))
        if args.experts == "remote":
            reporter.report(StepReport(StartStep.STORE, "starting"))
            if args.redis_url == "embedded://":
                args = args.model_copy(update={"redis_url": stack.enter_context(EmbeddedRedis()).url})
            check_store(args)
            reporter.report(StepReport(StartStep.STORE, f"{args.shown_redis_url} answers", is_done=True))
        reporter.report(StepReport(StartStep.RAY, f"joining {ray_address}" if ray_address else "starting"))
        stack.enter_context(_ray(args, ray_address))
        if ray_address:
            stack.enter_context(_joined_serve(ports))
        else:
            stack.enter_context(_own_serve())
            args = args.model_copy(update={"http_port": ports.http, "grpc_port": ports.grpc})
        reporter.report(StepReport(StartStep.RAY, "running, with Ray Serve", is_done=True))
        goal = StartGoal(
            num_shards=0 if args.experts == "local" else sum(pool.shards for pool in args.pools),
            replicas={"gateway": args.gateway_replicas, "backbone": args.backbone_replicas},
            ports=(ports.http, ports.grpc),
            num_cached=None if ray_address else _num_kernels(),
        )
        # If the start fails, this callback runs first. The user sees the failure before Serve, Ray and the store stop.
        stack.callback(reporter.end)
        with StartWatch(args, goal, reporter) as watch:
            _deploy(build_app(args))
        watch.complete()
        yield args


def _deploy(app: serve.Application) -> None:
    """Start the application, and wait until all of its replicas run.

    Raises RuntimeError with one sentence that gives the reason if Serve gives up starting a deployment. Serve tries to
    start a replica three times.
    """
    try:
        serve.run(app, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        deployments = _deployments()
        failed = [name for name, seen in deployments.items() if seen.status == "DEPLOY_FAILED"]
        reasons = {name: reason_of(deployments[name].message) or "Ray Serve gives no reason" for name in failed}
        parts = [f"{_part(name)} did not start: {reason}" for name, reason in reasons.items()]
        sentence = "; ".join(parts) or str(error)
        raise RuntimeError(f"{sentence}; the traceback is in {logs_path() / 'serve'}") from error


def _part(deployment: str) -> str:
    """Return what a user calls a replica of `deployment`."""
    return f"the {deployment}" if deployment in OUR_DEPLOYMENTS else f"a shard of the pool {deployment}"


def _quiet_ray() -> AbstractContextManager[object]:
    """Keep Ray's messages off the terminal while the body shuts Ray down.

    Ray would report that Serve's controller failed, although the shutdown ends the controller on purpose.
    """
    return redirect_stdout(io.StringIO())


@contextmanager
def _ray(args: AppArgs, address: str | None) -> Iterator[None]:
    num_cpus = (
        args.backbone_replicas * args.threads(load_family(args.model))
        + OTHER_CPUS
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
def _own_serve() -> Iterator[None]:
    """Run Ray Serve without proxies until the body ends.

    Clients connect to the gateway directly, because a proxy would add a network hop for every token.
    """
    # Serve would log only what the display of the steps already shows.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    try:
        yield
    finally:
        with _quiet_ray():
            serve.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def _joined_serve(ports: Ports) -> Iterator[None]:
    """Use the Ray Serve of a running cluster. On exit, remove our application and leave Serve running.

    Other applications may run in the same Serve. The gateway may run on any node of the cluster, so clients reach the
    gateway through Serve's proxies.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    grpc = {"port": ports.grpc, "grpc_servicer_functions": GRPC_SERVICERS}
    serve.start(http_options={"host": "127.0.0.1", "port": ports.http}, grpc_options=grpc)
    try:
        yield
    finally:
        serve.delete(APP_NAME)


class StartWatch:
    """A `StartWatch` observes a start while the body of a `with` runs, and reports the progress of every step.

    The observations run on a separate thread, and have three sources:

    - The registry tells which shards have registered, and whether there is a placement.
    - Ray Serve tells which replicas run.
    - The folder of compiled kernels tells how many kernels have been compiled.
    """

    def __init__(self, args: AppArgs, goal: StartGoal, reporter: StartReporter) -> None:
        self._args, self._goal, self._reporter = args, goal, reporter
        self._seen = StartObservation()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="start watch", daemon=True)

    def complete(self) -> None:
        """Report every step as done. The caller calls this method when Ray Serve has said that all replicas run."""
        self._look()
        for report in steps_of(self._seen, self._goal):
            self._reporter.report(replace(report, is_done=True))

    def _run(self) -> None:
        while not self._is_over.is_set():
            self._look()
            for report in steps_of(self._seen, self._goal):
                self._reporter.report(report)
            self._is_over.wait(WATCH_PERIOD_S)

    def _look(self) -> None:
        """Observe the start once. If a source fails or replies too late, keep the source's last values."""
        try:
            self._observe()
        except Exception:  # a fault of the display must not make the start fail
            log.debug("The start could not be observed.", exc_info=True)

    def _observe(self) -> None:
        if self._args.experts == "remote":
            with suppress(StoreUnavailable):
                self._seen = asyncio.run(_with_registry(self._seen, self._args))
        with suppress(RayError, RayServeException):
            deployments = _deployments()
            self._seen = replace(self._seen, running=_running(deployments), failures=failures(deployments))
        self._seen = replace(self._seen, num_kernels=_num_kernels())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(WATCH_JOIN_S)


async def _with_registry(seen: StartObservation, args: AppArgs) -> StartObservation:
    """Return a copy of `seen` with what the registry says about the shards and the first placement.

    A placement does not count if one of its shards has no live record: an earlier start has left this placement.
    """
    registry = args.registry()
    try:
        shards = await registry.shards()
        seen = replace(seen, num_registered=len(shards), num_held=sum(shard.num_held for shard in shards))
        placement = await registry.placement() if seen.num_homes is None else None
    finally:
        await registry.redis.aclose()
    if placement is None or not {shard.id for shard in shards}.issuperset(placement.shard_ids):
        return seen
    return replace(seen, num_homes=sum(len(homes) for layer in placement.homes.values() for homes in layer))


def _deployments() -> dict[str, DeploymentStatusOverview]:
    """Return what Serve says about each deployment; the dict is empty until Serve knows the application."""
    application = serve.status().applications.get(APP_NAME)
    return application.deployments if application else {}


def _running(deployments: Mapping[str, DeploymentStatusOverview]) -> dict[str, int]:
    """Return the number of running replicas of each deployment."""
    return {
        name: sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
        for name, deployment in deployments.items()
    }


def failures(deployments: Mapping[str, DeploymentStatusOverview]) -> dict[str, str]:
    """Return, for each deployment with a replica that failed to start, the reason. The pools share the name SHARDS."""
    return {
        name if name in OUR_DEPLOYMENTS else SHARDS: reason
        for name, deployment in deployments.items()
        if (reason := reason_of(deployment.message))
    }


def _num_kernels() -> int:
    """Return how many compiled kernels numba keeps on this machine's disk."""
    return sum(name.endswith(".nbc") for _, _, names in os.walk(numba.config.CACHE_DIR) for name in names)
