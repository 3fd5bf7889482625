"""The composition root: the Serve application, and the only place where plain classes become deployments.

`import_path: services.app:build_app` with `args` as in `AppArgs`. Annotations stay objects in this file,
because Serve validates `args` by them.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import ray
import torch
from fastapi import FastAPI
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from ray import serve
from ray.serve import Application
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from model.family import load_family
from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services import logs
from services.args import AppArgs, PoolArgs
from services.controller.controller import Controller, ControllerConfig
from services.engine.backbone import Backbone, BackboneConfig
from services.engine.grammar import GrammarCompiler
from services.engine.request import EngineFailed
from services.engine.service import EngineServer
from services.expert.shard import ExpertShard, ShardConfig
from services.gateway.backbone import Backbones
from services.gateway.backbone_metrics import backbone_metrics
from services.gateway.errors import ApiError, Refusal
from services.gateway.generation import Generation, ModelCard
from services.gateway.grpc_api import GrpcError, InferenceApi
from services.gateway.listener import Listener
from services.gateway.rest import build_rest
from services.gateway.text import Tokenizer

GRPC_SERVICERS = [
    "protos.expertmesh.inference.v1.inference_pb2_grpc:add_InferenceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc:add_HealthServicer_to_server",
]
MAX_OPEN = 1024  # streams; the engine's own queue refuses long before
STATUS_TIMEOUT_S = 3.0


class ShardDeployment:
    """A replica of a pool: one expert shard. Its rank names it, so that a restarted one takes up where it was."""

    async def __init__(self, args: AppArgs, pool: PoolArgs) -> None:  # type: ignore[misc]
        logs.configure(pool.name, args.log_format)
        torch.set_num_threads(max(1, int(pool.num_cpus)))
        family = load_family(args.model)
        config = ShardConfig(
            shard_id=f"{pool.name}-{serve.get_replica_context().rank.rank}",
            memory_budget=args.shard_memory(pool, family),
            pool=pool.name,
            host=_address(pool.host),
            device=pool.device,
            dtype=args.torch_dtype,
        )
        self._shard = ExpertShard(config, family, args.registry())
        await self._shard.start()

    async def check_health(self) -> None:
        if not self._shard.is_healthy:
            raise RuntimeError("the shard's heartbeat or its worker has ended")

    async def __del__(self) -> None:
        await self._shard.stop()


class ControllerDeployment:
    """One replica; where it dies, backbones serve on and Serve starts another."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        logs.configure("controller", args.log_format)
        family = load_family(args.model)
        config = ControllerConfig(frozenset(args.shard_ids), family.checkpoint.digest, args.torch_dtype)
        controller = Controller(config, family.expert_shapes, args.registry())
        self._loop = asyncio.create_task(controller.run())

    async def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError("the controller's loop has ended") from self._loop.exception()


class BackboneDeployment:
    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        logs.configure("backbone", args.log_format)
        family = load_family(args.model)
        config = BackboneConfig(
            dtype=args.torch_dtype,
            device=args.device,
            max_model_len=args.context(family),
            max_batch_tokens=max(args.max_batch_tokens, args.max_requests + family.config.chunk_size),
            memory=args.memory_plan(family),
            num_threads=args.threads(family),
            max_waiting=args.max_waiting,
            draft_tokens=args.draft_tokens,
            prefix_cache=args.prefix_cache,
        )
        stores = (None, None) if args.experts == "local" else (args.registry(), args.loads())
        self._backbone = Backbone(config, family, *stores)
        await self._backbone.start()
        self._server = EngineServer(self._backbone.engine, _address(args.host))
        self._endpoint = await self._server.start()

    async def status(self) -> dict[str, Any]:
        """The engine's numbers, and where gateways open their stream to it."""
        return {**self._backbone.status(), "pid": os.getpid(), "endpoint": self._endpoint}

    async def check_health(self) -> None:
        if not self._backbone.is_healthy:
            raise RuntimeError("the engine's thread or a background task has ended, or the last steps all failed")

    async def __del__(self) -> None:
        await self._server.stop()
        await self._backbone.stop()


def _ask_all(backbone: DeploymentHandle[Any]) -> Callable[[], Awaitable[list[dict[str, Any]]]]:
    """Asks every replica for its status; those that do not answer are left out."""

    async def ask() -> list[dict[str, Any]]:
        answers = backbone.broadcast("status").results_async(timeout_s=STATUS_TIMEOUT_S, return_exceptions=True)
        return [answer for answer in await answers if isinstance(answer, dict)]

    return ask


@serve.ingress()
class GatewayDeployment:
    """REST and gRPC on ports of its own where `args` name some, and through Serve's proxies, where there are any.

    Serve's gRPC proxy calls methods by the rpc's name.
    """

    def __init__(self, args: AppArgs, backbone: DeploymentHandle[Any], *_: DeploymentHandle[Any]) -> None:
        logs.configure("gateway", args.log_format)
        family = load_family(args.model)
        card = ModelCard(args.name, args.context(family), int(time.time()))
        self._args = args
        self._backbone = Backbones(_ask_all(backbone))
        self._generation = Generation(self._backbone, Tokenizer(args.model), card, GrammarCompiler(args.model).check)
        self._grpc = InferenceApi(self._generation, self._backbone.health)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls it before the first request, on the loop that serves them."""
        app = build_rest(self._generation, self._backbone.health, self._engine_metrics)
        app.add_api_route("/status", self._report, methods=["GET"])
        await self._backbone.start()
        self._listener = Listener(self._args.listening, app, self._grpc)
        await self._listener.start()
        return app

    async def check_health(self) -> None:
        if not self._listener.is_healthy:
            raise RuntimeError("the gateway no longer listens on its own ports")

    async def __del__(self) -> None:
        await self._listener.stop()
        await self._backbone.stop()

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
        answer: pb.GenerateResponse = await _answer(self._grpc.generate(request, grpc_context), grpc_context)
        return answer

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        try:
            async with aclosing(self._grpc.generate_stream(request, grpc_context)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except GrpcError as error:
            _refuse(grpc_context, error)

    async def ListModels(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        return await self._grpc.list_models(request)

    async def GetModel(self, request: pb.GetModelRequest, grpc_context: RayServegRPCContext) -> pb.Model:
        model: pb.Model = await _answer(self._grpc.get_model(request), grpc_context)
        return model

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext) -> pb.TokenizeResponse:
        tokens: pb.TokenizeResponse = await _answer(self._grpc.tokenize(request), grpc_context)
        return tokens

    async def Detokenize(
        self, request: pb.DetokenizeRequest, grpc_context: RayServegRPCContext
    ) -> pb.DetokenizeResponse:
        text: pb.DetokenizeResponse = await _answer(self._grpc.detokenize(request), grpc_context)
        return text

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


def _address(host: str) -> str:
    return str(ray.util.get_node_ip_address()) if host == "auto" else host  # type: ignore[no-untyped-call]


def _deployment(cls: type, name: str, **options: Any) -> Any:
    return serve.deployment(name=name, **options)(cls)


def build_app(args: AppArgs) -> Application:
    """The whole application: gateway, backbone, and, unless the experts are local, controller and expert pools."""
    family = args.check()  # before anything starts
    gpu = 1 if args.device == "cuda" else 0
    backbone = _deployment(
        BackboneDeployment,
        "backbone",
        num_replicas=args.backbone_replicas,
        max_ongoing_requests=MAX_OPEN,
        ray_actor_options={"num_cpus": args.threads(family), "num_gpus": gpu},
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
