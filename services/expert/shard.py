"""An expert shard: a generic host for routed experts, with a gRPC server and a heartbeat.

It starts empty, registers itself, and is told what to hold.
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
from services.expert.drain import LEAVE_POLL_S, LEAVE_TIMEOUT_S, DrainOutlook, DrainWait, may_go, outlook
from services.expert.host import ExpertHost
from services.expert.service import ExpertService
from services.expert.transport.wire import WIRE_DTYPES

log = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Expert"].full_name
HEARTBEAT_S = 1.0
DRAIN_TIMEOUT_S = 10.0
MAX_FAILED = 20  # requests in a row
MAX_BUSY_S = 30.0  # at one request
STOP_GRACE_S = 0.2  # streams never end by themselves; this is for the last replies on them


@dataclass(frozen=True)
class ShardConfig:
    """Where a shard listens and how much it may hold; budgets are in bytes, port 0 takes a free one.

    `memory_budget` is for the device, `host_budget` for experts that stand by in host memory. A shard that is stopped
    serves on for at most `leave_timeout_s`, until its experts have moved.
    """

    shard_id: str
    memory_budget: int
    pool: str = "experts-cpu"
    node: str = field(default_factory=socket.gethostname)
    host: str = "127.0.0.1"
    port: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    max_queue: int = 64
    host_budget: int = 0
    leave_timeout_s: float = LEAVE_TIMEOUT_S

    def __post_init__(self) -> None:
        if not self.shard_id:
            raise ValueError("shard_id must not be empty.")
        if self.memory_budget <= 0 or self.max_queue <= 0:
            numbers = f"memory_budget is {self.memory_budget} and max_queue {self.max_queue}"
            raise ValueError(f"{numbers}, but both must be above 0.")
        if self.host_budget < 0 or self.leave_timeout_s < 0:
            numbers = f"host_budget is {self.host_budget} and leave_timeout_s {self.leave_timeout_s}"
            raise ValueError(f"{numbers}, but both must be at least 0.")
        if self.dtype not in WIRE_DTYPES:
            raise ValueError(f"dtype is {self.dtype}, but a shard computes in float32 or bfloat16.")


class ExpertShard:
    """One shard of a model family; `start` and `stop` belong to one event loop."""

    def __init__(self, config: ShardConfig, family: ModelFamily, registry: RegistryStore) -> None:
        self.config, self.registry = config, registry
        self.incarnation = secrets.token_hex(8)
        self.endpoint = self.compute_endpoint = ""
        self.pool_size: PoolSize | None = None  # what was last decided of its pool
        shapes, device = family.expert_shapes, torch.device(config.device)
        self.host = ExpertHost(shapes, config.dtype, device, config.memory_budget, config.host_budget)
        self._read = family.load_expert

    async def start(self) -> None:
        """Serves and registers; RuntimeError if the port is taken. A registry that is down is tried again and again."""
        config = self.config
        self.service = ExpertService(self.host, self._read, config.shard_id, self.incarnation, config.max_queue)
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        expert_pb2_grpc.add_ExpertServicer_to_server(self.service, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.endpoint = f"{config.host}:{self._bind()}"
        self.compute_endpoint = self.service.open_front(config.host)
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        await self._heartbeat()
        self._beating = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        """Drains: says so, serves on until its experts have moved, answers what was accepted, leaves, closes."""
        self.service.is_leaving = True
        await self._heartbeat()
        await self._wait_for_moves()
        self.service.is_draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        await self._leave()
        try:
            await asyncio.wait_for(self.service.answered(), DRAIN_TIMEOUT_S)
        except TimeoutError:
            log.warning("Shard %s stops with %d requests unanswered.", self.config.shard_id, self.service.worker.depth)
        await self.service.close_front()
        await self._server.stop(STOP_GRACE_S)
        await asyncio.to_thread(self.service.worker.close)

    async def _wait_for_moves(self) -> None:
        started = since = time.monotonic()
        before, now = None, await self._outlook()
        while True:
            at = time.monotonic()
            since = since if now is before else at
            if may_go(now, DrainWait(at - self.service.last_request_at, at - since)):
                log.info("Shard %s goes: %s.", self.config.shard_id, now.value)
                return
            if at - started >= self.config.leave_timeout_s:
                bound = f"leave_timeout_s = {self.config.leave_timeout_s}"
                log.warning("Shard %s goes after %s, though %s.", self.config.shard_id, bound, now.value)
                return
            await asyncio.sleep(min(LEAVE_POLL_S, self.config.leave_timeout_s))
            before, now = now, await self._outlook()

    async def _outlook(self) -> DrainOutlook:
        try:
            placement, shards = await self.registry.placement(), await self.registry.shards()
            return outlook(self.config.shard_id, placement, shards, await self.registry.has_leader())
        except StoreUnavailable:
            return DrainOutlook.CUT_OFF

    @property
    def is_healthy(self) -> bool:
        """Whether it still registers itself and computes; asked between `start` and `stop`.

        A device that hangs, or that fails whatever it is asked, would else keep its homes for ever.
        """
        service = self.service
        can_compute = service.num_failed_in_a_row < MAX_FAILED and service.worker.busy_s < MAX_BUSY_S
        return not self._beating.done() and service.worker.is_alive and can_compute

    @property
    def record(self) -> Shard:
        """What this shard says of itself in the registry."""
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
            draining=self.service.is_leaving or self.service.is_draining,
            host_budget=config.host_budget,
            compute_endpoint=self.compute_endpoint,
            cost_model=self.service.cost_fit.cost_model,
            rows_per_call=self.service.rows_per_call.mean,
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
                if self.service.is_draining:
                    await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
                await self._heartbeat()
            except Exception:
                log.exception("Shard %s failed to register itself and will try again.", self.config.shard_id)

    async def _heartbeat(self) -> None:
        self.service.learn_pace()
        try:
            await self.registry.heartbeat(self.record)
            self.pool_size = await self.registry.pool_size(self.config.pool) or self.pool_size
        except StoreUnavailable as error:
            log.warning("Shard %s serves on, but is not registered: %s", self.config.shard_id, error)

    async def _leave(self) -> None:
        try:
            await self.registry.remove(self.record)
        except StoreUnavailable as error:
            log.warning("Shard %s leaves without a word to the registry: %s", self.config.shard_id, error)
