"""`ExpertShard` is one expert shard: a generic host for routed experts with a gRPC server and a heartbeat.

A shard starts empty and registers itself. A controller then tells the shard which experts to load.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from dataclasses import dataclass, field

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.control.operator_orders import PoolSize
from cluster.control.registry_store import RegistryStore, StoreUnavailable
from cluster.topology import Shard
from model.family import ModelFamily
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from protos.options import SERVER_OPTIONS
from services.expert.drain import DRAIN_POLL_S, MOVE_TIMEOUT_S, DrainState, DrainTimes, drain_state, may_stop
from services.expert.service import ExpertService
from services.expert.transport.wire import WIRE_DTYPES
from services.expert.weights.host import ExpertHost
from services.process_memory import keep_freed_memory

log = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Expert"].full_name
HEARTBEAT_S = 1.0  # seconds between two heartbeats
ANSWER_TIMEOUT_S = 10.0  # maximum seconds in which a stopping shard answers its accepted requests
MAX_FAILED = 20  # consecutive failed requests after which a shard is not healthy
MAX_BUSY_S = 30.0  # seconds with one request after which a shard is not healthy
STOP_GRACE_S = 0.2  # seconds for the last replies on open streams, which never end by themselves


@dataclass(frozen=True)
class ShardConfig:
    """A `ShardConfig` says where a shard runs and listens, and how much memory the shard may use."""

    shard_id: str
    memory_budget: int  # bytes of device memory for homes and promoted experts
    pool: str = "experts-cpu"
    node: str = field(default_factory=socket.gethostname)
    host: str = "127.0.0.1"  # the address to listen on
    port: int = 0  # the port of the gRPC server; 0 takes a free port
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    max_queue: int = 64  # maximum number of requests that wait for the device; same limit for promotions
    host_budget: int = 0  # bytes of host memory for standbys
    move_timeout_s: float = MOVE_TIMEOUT_S  # maximum seconds that a draining shard waits for its experts to move

    def __post_init__(self) -> None:
        if not self.shard_id:
            raise ValueError("shard_id must not be empty.")
        if self.memory_budget <= 0 or self.max_queue <= 0:
            numbers = f"memory_budget is {self.memory_budget} and max_queue {self.max_queue}"
            raise ValueError(f"{numbers}, but both must be above 0.")
        if self.host_budget < 0 or self.move_timeout_s < 0:
            numbers = f"host_budget is {self.host_budget} and move_timeout_s {self.move_timeout_s}"
            raise ValueError(f"{numbers}, but both must be at least 0.")
        if self.dtype not in WIRE_DTYPES:
            raise ValueError(f"dtype is {self.dtype}, but a shard computes in float32 or bfloat16.")


class ExpertShard:
    """An `ExpertShard` serves experts of one model family; `start` and `stop` belong to one event loop."""

    def __init__(self, config: ShardConfig, family: ModelFamily, registry: RegistryStore) -> None:
        self.config, self.registry = config, registry
        self.incarnation = secrets.token_hex(8)
        self.endpoint = self.compute_endpoint = ""
        self.pool_size: PoolSize | None = None  # the size that the controller decided last for the pool
        keep_freed_memory()
        self._has_left = False  # whether the shard has left the registry, because it cannot compute
        shapes, device = family.expert_shapes, torch.device(config.device)
        self.host = ExpertHost(shapes, config.dtype, device, config.memory_budget, config.host_budget)
        self._read = family.load_expert

    async def start(self) -> None:
        """Start to serve, and register the shard; raise RuntimeError if the port is taken.

        If the registry is down, the shard serves nevertheless, and every heartbeat tries to register the shard again.
        """
        config = self.config
        self.service = ExpertService(self.host, self._read, config.shard_id, self.incarnation, config.max_queue)
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        expert_pb2_grpc.add_ExpertServicer_to_server(self.service, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.endpoint = f"{config.host}:{self._bind()}"
        self.compute_endpoint = self.service.open_compute_port(config.host)
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        await self._heartbeat()
        self._beating = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        """Drain the shard and stop it.

        The shard announces the drain and continues to serve until its experts have moved. Then the shard refuses new
        requests, removes itself from the registry, answers the accepted requests, and closes its ports.
        """
        self.service.has_announced_drain = True
        if self._can_compute:
            await self._heartbeat()
            await self._wait_for_moves()
        self.service.handler.is_refusing = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        await self._unregister()
        if self.service.worker.is_alive:
            await self._finish_requests()
        await self.service.close_compute_port()
        await self._server.stop(STOP_GRACE_S)
        await asyncio.to_thread(self.service.worker.close)

    async def _finish_requests(self) -> None:
        try:
            await asyncio.wait_for(self.service.handler.idle(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            log.warning("Shard %s stops with %d requests unanswered.", self.config.shard_id, self.service.worker.depth)

    async def _wait_for_moves(self) -> None:
        """Wait until the shard may stop, but at most `move_timeout_s` seconds."""
        started = since = time.monotonic()
        previous, state = None, await self._drain_state()
        while True:
            now = time.monotonic()
            since = since if state is previous else now
            if may_stop(state, DrainTimes(now - self.service.handler.last_request_at, now - since)):
                log.info("Shard %s stops: %s.", self.config.shard_id, state.value)
                return
            if now - started >= self.config.move_timeout_s:
                bound = f"move_timeout_s = {self.config.move_timeout_s}"
                log.warning("Shard %s stops after %s, although %s.", self.config.shard_id, bound, state.value)
                return
            await asyncio.sleep(min(DRAIN_POLL_S, self.config.move_timeout_s))
            previous, state = state, await self._drain_state()

    async def _drain_state(self) -> DrainState:
        try:
            placement, shards = await self.registry.placement(), await self.registry.shards()
            return drain_state(self.config.shard_id, placement, shards, await self.registry.has_leader())
        except StoreUnavailable:
            return DrainState.CUT_OFF

    @property
    def is_healthy(self) -> bool:
        """Return True if the heartbeat runs and the device computes; valid only between `start` and `stop`.

        Without this check, a shard whose device hangs or fails at every request would remain a home for ever.
        """
        return not self._beating.done() and self._can_compute

    @property
    def _can_compute(self) -> bool:
        worker = self.service.worker
        is_failing = self.service.handler.num_failed_in_a_row >= MAX_FAILED
        return worker.is_alive and worker.busy_s < MAX_BUSY_S and not is_failing

    @property
    def record(self) -> Shard:
        """Return the shard's record for the registry."""
        config = self.config
        return Shard(
            id=config.shard_id,
            endpoint=self.endpoint,
            node=config.node,
            pool=config.pool,
            device=config.device,
            incarnation=self.incarnation,
            memory_budget=config.memory_budget,
            held_digest=self.host.digest,
            num_held=self.host.num_held,
            queue_depth=self.service.worker.depth,
            draining=self.service.is_draining,
            host_budget=config.host_budget,
            compute_endpoint=self.compute_endpoint,
            cost_model=self.service.handler.cost_fit.cost_model,
            rows_per_call=self.service.handler.rows_per_call.mean,
        )

    def _bind(self) -> int:
        address = f"{self.config.host}:{self.config.port}"
        try:
            return self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise RuntimeError(f"Shard {self.config.shard_id} cannot listen on {address}: {error}") from None

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self._report()
            except Exception:
                log.exception("Shard %s failed to register itself and will try again.", self.config.shard_id)

    async def _report(self) -> None:
        """Tell the health service and the registry how the shard is; a shard that cannot compute leaves the registry.

        Otherwise the shard would stay a home of experts, and calls would wait for it, until Serve replaces the shard.
        """
        can_compute, health_status = self._can_compute, health_pb2.HealthCheckResponse
        can_serve = can_compute and not self.service.handler.is_refusing
        await self._set_health(health_status.SERVING if can_serve else health_status.NOT_SERVING)
        if can_compute:
            await self._heartbeat()
        elif not self._has_left:
            log.error("Shard %s cannot compute, and leaves the registry until it can.", self.config.shard_id)
            await self._unregister()
        self._has_left = not can_compute

    async def _heartbeat(self) -> None:
        self.service.handler.update_cost_model()
        try:
            await self.registry.heartbeat(self.record)
            self.pool_size = await self.registry.pool_size(self.config.pool) or self.pool_size
        except StoreUnavailable as error:
            log.warning("Shard %s serves on, but is not registered: %s", self.config.shard_id, error)

    async def _unregister(self) -> None:
        try:
            await self.registry.remove(self.record)
        except StoreUnavailable as error:
            log.warning("Shard %s stops, but stays in the registry: %s", self.config.shard_id, error)
