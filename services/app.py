"""The composition root: the Serve application, and the only place where plain classes become deployments.

`import_path: services.app:build_app` with `args` as in `AppArgs`. Annotations stay objects in this file,
because Serve validates `args` by them.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from fastapi import FastAPI
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from pydantic import BaseModel, ByteSize, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from cluster.load import LoadStore
from cluster.planner import first_placement
from cluster.registry import Registry, connect, key_prefix
from cluster.topology import Shard
from model.family import ModelFamily, load_family
from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services.controller.controller import Controller, ControllerConfig, layer_specs
from services.engine.backbone import Backbone, BackboneConfig
from services.engine.memory import MemoryPlan, plan_memory
from services.engine.request import EngineFailed, SamplingParams, TokenOutput
from services.expert.shard import ExpertShard, ShardConfig
from services.gateway.backbone_metrics import backbone_metrics
from services.gateway.errors import ApiError, Refusal
from services.gateway.generation import Generation, Health, ModelCard
from services.gateway.grpc_api import GrpcError, InferenceApi
from services.gateway.rest import build_rest
from services.gateway.text import Tokenizer

log = logging.getLogger("ray.serve")

DEMO = Path(__file__).parent.parent / "model" / "demo" / "checkpoint"
GRPC_SERVICERS = [
    "protos.expertmesh.inference.v1.inference_pb2_grpc:add_InferenceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc:add_HealthServicer_to_server",
]
NUM_HOMES = 2  # of every expert, on different shards
SHARE_MARGIN = 1.1  # experts cannot be cut to make shares even
DEFAULT_STATE_MEMORY = 1 << 30
MAX_OPEN = 1024  # streams; the engine's own queue refuses long before
HEALTH_TTL_S = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PoolArgs(BaseModel):
    """One pool of expert shards."""

    model_config = ConfigDict(extra="forbid")

    name: str = "experts-cpu"
    shards: int = Field(3, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    num_cpus: float = Field(1, ge=0)
    memory_budget: ByteSize | None = Field(None, gt=0, description="of expert weights; an even share if left out")
    host: str = Field("127.0.0.1", description="address a shard listens on; on a cluster, auto for the node's own")


class AppArgs(BaseModel):
    """Arguments of the application, as `args:` in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    model: str = str(DEMO)
    model_name: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    experts: Literal["remote", "local"] = Field("remote", description="local: no shards, everything in the backbone")
    redis_url: str = "redis://127.0.0.1:6379"
    pools: list[PoolArgs] = Field(default_factory=lambda: [PoolArgs()], min_length=1)
    max_model_len: int | None = Field(None, ge=2)
    max_requests: int = Field(64, ge=1)
    max_batch_tokens: int = Field(2048, ge=64)
    state_memory: ByteSize | None = Field(None, gt=0, description="for requests' KV and recurrent state")
    backbone_replicas: int = Field(1, ge=1)
    backbone_threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    gateway_replicas: int = Field(1, ge=1)

    @property
    def name(self) -> str:
        return self.model_name or ("demo" if self.model == str(DEMO) else Path(self.model).resolve().name)

    @property
    def torch_dtype(self) -> torch.dtype:
        """auto is bf16 on a GPU, where it is fast, and fp32 on a CPU, where it is exact."""
        return (
            DTYPES["bfloat16" if self.device == "cuda" else "float32"] if self.dtype == "auto" else DTYPES[self.dtype]
        )

    def context(self, family: ModelFamily) -> int:
        longest = family.config.max_position_embeddings
        if self.max_model_len and self.max_model_len > longest:
            raise ValueError(f"max_model_len is {self.max_model_len}; the model's own context is {longest}")
        return self.max_model_len or longest

    @property
    def shard_ids(self) -> list[str]:
        """Every shard of every pool; a replica's rank names it."""
        return [f"{pool.name}-{rank}" for pool in self.pools for rank in range(pool.shards)]

    def shard_memory(self, pool: PoolArgs, family: ModelFamily) -> int:
        """Bytes of expert weights that a shard of `pool` may hold."""
        whole = sum(shape.num_experts * shape.nbytes(self.torch_dtype) for shape in family.expert_shapes)
        even_share = NUM_HOMES * whole / len(self.shard_ids)
        return int(pool.memory_budget or min(whole, SHARE_MARGIN * even_share))

    def memory_plan(self, family: ModelFamily) -> MemoryPlan:
        """How many requests fit; raises ValueError if not even one of the longest does."""
        spec, longest = family.config.state_spec, self.context(family)
        one = spec.bytes_per_slot(self.torch_dtype) + spec.num_blocks(longest) * spec.bytes_per_block(self.torch_dtype)
        budget = self.state_memory or max(DEFAULT_STATE_MEMORY, one)
        return plan_memory(spec, self.torch_dtype, budget, longest, self.max_requests)

    def check(self) -> ModelFamily:
        """Raises ValueError with one sentence where these arguments cannot be served. Reads no weights."""
        family = load_family(self.model)
        family.check()
        Tokenizer(self.model)
        key_prefix(self.name)
        self.memory_plan(family)
        if self.experts == "remote":
            first_placement(
                layer_specs(family.expert_shapes, self.torch_dtype), self._fleet(family), num_homes=NUM_HOMES
            )
        return family

    def _fleet(self, family: ModelFamily) -> list[Shard]:
        """The shards that there will be, as far as placing experts on them goes."""
        return [
            Shard(
                f"{pool.name}-{rank}", "", f"node-{rank}", pool.name, pool.device, "", self.shard_memory(pool, family)
            )
            for pool in self.pools
            for rank in range(pool.shards)
        ]

    def registry(self) -> Registry:
        return Registry(connect(self.redis_url), self.name)

    def loads(self) -> LoadStore:
        return LoadStore(connect(self.redis_url), self.name)


class ShardDeployment:
    """A replica of a pool: one expert shard. Its rank names it, so that a restarted one takes up where it was."""

    async def __init__(self, args: AppArgs, pool: PoolArgs) -> None:  # type: ignore[misc]
        torch.set_num_threads(max(1, int(pool.num_cpus)))
        family = load_family(args.model)
        config = ShardConfig(
            shard_id=f"{pool.name}-{serve.get_replica_context().rank.rank}",
            memory_budget=args.shard_memory(pool, family),
            pool=pool.name,
            host=_own_address() if pool.host == "auto" else pool.host,
            device=pool.device,
            dtype=args.torch_dtype,
        )
        self._shard = ExpertShard(config, family, args.registry())
        await self._shard.start()

    async def pid(self) -> int:
        return os.getpid()

    async def __del__(self) -> None:
        await self._shard.stop()


class ControllerDeployment:
    """One replica; where it dies, backbones serve on and Serve starts another."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        family = load_family(args.model)
        config = ControllerConfig(frozenset(args.shard_ids), family.checkpoint.digest, args.torch_dtype)
        controller = Controller(config, family.expert_shapes, args.registry())
        self._loop = asyncio.create_task(controller.run())

    async def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError("the controller's loop has ended") from self._loop.exception()


class BackboneDeployment:
    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        family = load_family(args.model)
        config = BackboneConfig(
            dtype=args.torch_dtype,
            device=args.device,
            max_model_len=args.context(family),
            max_batch_tokens=max(args.max_batch_tokens, args.max_requests + family.config.chunk_size),
            memory=args.memory_plan(family),
            num_threads=args.backbone_threads,
        )
        stores = (None, None) if args.experts == "local" else (args.registry(), args.loads())
        self._backbone = Backbone(config, family, *stores)
        await self._backbone.start()

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[TokenOutput | Exception, None]:
        """Tokens; a refusal or failure is the last item, because Ray would wrap a raised one in its traceback."""
        try:
            async with aclosing(self._backbone.engine.generate(request_id, prompt_token_ids, params)) as outputs:
                async for output in outputs:
                    yield output
        except Exception as error:
            yield error

    async def status(self) -> dict[str, Any]:
        return {**self._backbone.status(), "pid": os.getpid()}

    async def check_health(self) -> None:
        if not self._backbone.is_healthy:
            raise RuntimeError("the engine's thread or a background task has ended, or the last steps all failed")

    async def __del__(self) -> None:
        await self._backbone.stop()


class BackboneHandle:
    """A `TokenSource` in another process."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._status = handle.status
        self._generate = handle.options(stream=True).generate
        self._last: tuple[float, dict[str, Any]] = (0.0, {})

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[TokenOutput, None]:
        stream: Any = self._generate.remote(request_id, prompt_token_ids, params)
        is_done = False
        try:
            async for item in stream:
                is_done = isinstance(item, Exception) or item.finish_reason is not None
                if isinstance(item, Exception):
                    raise item
                yield item
        except (RayError, RayServeException) as error:
            message = f"The backbone that answered this request is gone ({type(error).__name__}); try again."
            raise ApiError(Refusal.UNAVAILABLE, message) from error
        finally:
            if not is_done:
                stream.cancel()

    async def status(self) -> dict[str, Any]:
        """Not older than half a second; raises EngineFailed where no backbone answers."""
        asked_at, status = self._last
        if time.monotonic() - asked_at > HEALTH_TTL_S:
            try:
                status = await asyncio.wait_for(self._status.remote(), timeout=5)
            except Exception as error:
                raise EngineFailed(f"No backbone answers ({type(error).__name__}).") from error
            self._last = time.monotonic(), status
        return status

    async def health(self) -> Health:
        try:
            status = await self.status()
        except EngineFailed as error:
            return Health(is_ready=False, detail=str(error))
        if not status["engine"]["is_healthy"]:
            return Health(is_ready=False, detail="The engine's last steps failed.")
        down = status.get("down", [])
        detail = f"Shards that do not serve what they should: {', '.join(down)}." if down else ""
        return Health(is_ready=True, is_degraded=bool(down), detail=detail)


@serve.ingress()
class GatewayDeployment:
    """REST through Serve's HTTP proxy, gRPC through its gRPC proxy, which calls methods by the rpc's name."""

    def __init__(self, args: AppArgs, backbone: DeploymentHandle[Any], *_: DeploymentHandle[Any]) -> None:
        family = load_family(args.model)
        card = ModelCard(args.name, args.context(family), int(time.time()))
        self._backbone = BackboneHandle(backbone)
        self._generation = Generation(self._backbone, Tokenizer(args.model), card)
        self._grpc = InferenceApi(self._generation, self._backbone.health)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        app = build_rest(self._generation, self._backbone.health, self._engine_metrics)
        app.add_api_route("/status", self._report, methods=["GET"])
        return app

    async def _report(self) -> dict[str, Any]:
        """What `expertmesh status` shows."""
        health = await self._backbone.health()
        if not health.is_ready:
            raise ApiError(Refusal.UNAVAILABLE, health.detail)
        state = "degraded" if health.is_degraded else "ready"
        return {"model": self._generation.card.id, "health": state, **await self._backbone.status()}

    async def _engine_metrics(self) -> bytes:
        try:
            return backbone_metrics(self._generation.card.id, await self._backbone.status())
        except EngineFailed:
            return b""

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext) -> pb.GenerateResponse:
        answer: pb.GenerateResponse = await _answer(self._grpc.generate(request), grpc_context)
        return answer

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        try:
            async with aclosing(self._grpc.generate_stream(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except GrpcError as error:
            _refuse(grpc_context, error)

    async def ListModels(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        return await self._grpc.list_models(request)

    async def Check(self, request: HealthCheckRequest, grpc_context: RayServegRPCContext) -> HealthCheckResponse:
        return await _answer(self._grpc.check(request), grpc_context)


async def _answer(answer: Any, context: RayServegRPCContext) -> Any:
    try:
        return await answer
    except GrpcError as error:
        _refuse(context, error)


def _refuse(context: RayServegRPCContext, error: GrpcError) -> None:
    """Serve sends the code and details that the context holds when an exception leaves the method."""
    context.set_code(error.code)
    context.set_details(error.message)
    raise error


def _own_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _deployment(cls: type, name: str, **options: Any) -> Any:
    return serve.deployment(name=name, **options)(cls)


def build_app(args: AppArgs) -> Application:
    """The whole application: gateway, backbone, and, unless the experts are local, controller and expert pools."""
    args.check()  # before anything starts
    gpu = 1 if args.device == "cuda" else 0
    backbone = _deployment(
        BackboneDeployment,
        "backbone",
        num_replicas=args.backbone_replicas,
        max_ongoing_requests=MAX_OPEN,
        ray_actor_options={"num_cpus": args.backbone_threads, "num_gpus": gpu},
        graceful_shutdown_timeout_s=10,
        health_check_period_s=5,
    )
    gateway = _deployment(
        GatewayDeployment,
        "gateway",
        num_replicas=args.gateway_replicas,
        max_ongoing_requests=MAX_OPEN,
        ray_actor_options={"num_cpus": 0.5},
    )
    extras = [] if args.experts == "local" else _expert_tier(args)
    app: Application = gateway.bind(args, backbone.bind(args), *extras)
    return app


def _expert_tier(args: AppArgs) -> list[Application]:
    controller = _deployment(ControllerDeployment, "controller", num_replicas=1, ray_actor_options={"num_cpus": 0.1})
    return [controller.bind(args), *(_pool(pool).bind(args, pool) for pool in args.pools)]


def _pool(pool: PoolArgs) -> Any:
    num_gpus = 1 if pool.device == "cuda" else 0
    return _deployment(
        ShardDeployment,
        pool.name,
        num_replicas=pool.shards,
        ray_actor_options={"num_cpus": pool.num_cpus, "num_gpus": num_gpus},
        graceful_shutdown_timeout_s=15,
    )
