"""The gateway as a Serve deployment.

It stands apart from `services/app.py` because only its own process needs what it imports: OpenAI's types and the
tokenizers take a process seconds to read. Annotations stay objects in this file, because Serve reads them.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from model.family import load_family
from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services import logs
from services.args import AppArgs
from services.controller.controller import layer_specs
from services.engine.contract.errors import EngineFailed
from services.engine.grammar.grammar_checker import GrammarChecker
from services.gateway.backbones.backbone_pool import BackbonePool
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.errors import ApiError, ApiRefusal
from services.gateway.generation import Generation, ModelCard
from services.gateway.grpc_api import GrpcError, InferenceApi
from services.gateway.health import Health
from services.gateway.listener import ALL_INTERFACES, Listener, ListenerConfig
from services.gateway.metrics.backbone_metrics import backbone_metrics
from services.gateway.metrics.request_metrics import RequestMetrics
from services.gateway.openai.rest import build_rest
from services.gateway.operator.admin import add_admin
from services.gateway.operator.degraded import degraded_report
from services.gateway.operator.operations import ExpertTier, Operations

STATUS_TIMEOUT_S = 3.0
OTHERS_TIMEOUT_S = 0.5  # for the rest, once one has answered
TRACE_TIMEOUT_S = 10.0
PREVIEW_TIMEOUT_S = 30.0
STOPPING = Health(is_ready=False, detail="This gateway stops.")


def _ask_all(backbone: DeploymentHandle[Any]) -> Callable[[], Awaitable[list[dict[str, Any]]]]:
    """Asks every replica for its status; those that do not answer are left out."""

    async def ask() -> list[dict[str, Any]]:
        # Not `results_async`, which forgets who has answered where one replica hangs.
        asked = backbone.broadcast("status")._fetch_replica_results_async()
        replicas: list[Any] = await asyncio.wait_for(asked, STATUS_TIMEOUT_S)
        return await _answers([replica.get_async() for replica in replicas])

    return ask


async def _answers(asked: Sequence[Awaitable[Any]]) -> list[dict[str, Any]]:
    """What comes within STATUS_TIMEOUT_S, and within OTHERS_TIMEOUT_S of the first."""
    answers: list[dict[str, Any]] = []
    late = {asyncio.ensure_future(one) for one in asked}
    stop_at = time.monotonic() + STATUS_TIMEOUT_S
    while late and (left := stop_at - time.monotonic()) > 0:
        done, late = await asyncio.wait(late, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        told = [task.result() for task in done if not task.cancelled() and task.exception() is None]
        if told and not answers:
            stop_at = min(stop_at, time.monotonic() + OTHERS_TIMEOUT_S)
        answers += told
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return answers


def _trace_all(backbone: DeploymentHandle[Any]) -> Callable[[dict[str, Any] | None], Awaitable[list[dict[str, Any]]]]:
    """Has every replica begin or end a trace."""

    async def trace(bounds: dict[str, Any] | None) -> list[dict[str, Any]]:
        answers = backbone.broadcast("trace", bounds).results_async(timeout_s=TRACE_TIMEOUT_S, return_exceptions=True)
        return [
            answer if isinstance(answer, dict) else {"error": f"This backbone did not do it: {type(answer).__name__}."}
            for answer in await answers
        ]

    return trace


def _preview(controller: DeploymentHandle[Any]) -> Callable[[], Awaitable[dict[str, Any] | None]]:
    async def preview() -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(PREVIEW_TIMEOUT_S):
                plan: dict[str, Any] | None = await controller.preview.remote()
        except (TimeoutError, RayError, RayServeException) as error:
            sentence = f"The controller, who makes plans, does not answer ({type(error).__name__})."
            raise ApiError(ApiRefusal.UNAVAILABLE, sentence, retry_after=1) from error
        return plan

    return preview


@serve.ingress()
class GatewayDeployment:
    """REST and gRPC on ports of its own where `args` name some, and through Serve's proxies, where there are any.

    Serve's gRPC proxy calls methods by the rpc's name.
    """

    def __init__(
        self,
        args: AppArgs,
        backbone: DeploymentHandle[Any],
        controller: DeploymentHandle[Any] | None = None,
        *_: DeploymentHandle[Any],
    ) -> None:
        logs.configure("gateway", args.log_format)
        family = load_family(args.model)
        card = ModelCard(args.name, args.context(family), int(time.time()))
        host = (
            ALL_INTERFACES if args.host == "auto" else args.host
        )  # a forwarded port comes from the pod's own 127.0.0.1
        self._where = ListenerConfig(host, args.http_port, args.grpc_port, args.drain_s)
        metrics = RequestMetrics(card.id)
        self._backbone = BackbonePool(_ask_all(backbone), metrics.count_resumed)
        self._grammars = GrammarChecker(args.model)
        tokenizer = Tokenizer(args.model)
        self._generation = Generation(self._backbone, tokenizer, card, self._grammars.check, metrics=metrics)
        self._linger_s, self._is_stopping = args.linger_s, False
        self._grpc = InferenceApi(self._generation, self._health)
        self._admin_key = args.admin_key.get_secret_value() if args.admin_key else None
        self._operations: Operations | None = None
        if controller is not None:
            layers = layer_specs(family.expert_shapes, args.torch_dtype)
            pools = {pool.name: (pool.least_shards, pool.most_shards) for pool in args.pools}
            tier = ExpertTier(layers, pools, _preview(controller), _trace_all(backbone))
            self._registry, self._loads = args.registry(), args.loads()
            self._operations = Operations(tier, self._registry, self._loads)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls it before the first request, on the loop that serves them."""
        app = build_rest(self._generation, self._health, self._engine_metrics)
        app.add_api_route("/status", self._report, methods=["GET"])
        app.add_api_route("/health/degraded", self._degraded, methods=["GET"])
        add_admin(app, self._admin_key, self._operations)
        await self._backbone.start()
        self._listener = Listener(self._where, app, self._grpc)
        await self._listener.start()
        return app

    async def check_health(self) -> None:
        if not self._listener.is_healthy:
            raise RuntimeError("the gateway no longer listens on its own ports")

    async def _health(self) -> Health:
        return STOPPING if self._is_stopping else await self._backbone.health()

    async def __del__(self) -> None:
        self._is_stopping = True
        await asyncio.sleep(self._linger_s)  # until those who send clients here have heard of it
        await self._listener.stop()
        await self._backbone.stop()
        if self._operations is not None:
            await asyncio.gather(self._registry.redis.aclose(), self._loads.redis.aclose())
        self._grammars.close()

    async def _report(self) -> dict[str, Any]:
        """What `expertmesh status` shows."""
        health = await self._backbone.health()
        if not health.is_ready:
            raise ApiError(ApiRefusal.UNAVAILABLE, health.detail)
        state = "degraded" if health.is_degraded else "ready"
        statuses = await self._backbone.statuses()
        engines = [{"endpoint": status["endpoint"], "engine": status["engine"]} for status in statuses]
        fleet: dict[str, Any] = {}
        if self._operations is not None:
            try:
                fleet = await self._operations.fleet()
            except ApiError as error:  # backbones serve without the store, and say so
                fleet = {"store": error.message}
        return {"model": self._generation.card.id, "health": state, **statuses[0], "backbones": engines, **fleet}

    async def _degraded(self) -> JSONResponse:
        """503 as /health/ready: where what the path asks about is not well, or not known. No probe for restarts."""
        try:
            report = degraded_report(await self._backbone.statuses())
        except EngineFailed as error:
            return JSONResponse({"status": "unknown", "detail": str(error)}, 503)
        return JSONResponse(report, 503 if report["status"] == "degraded" else 200)

    async def _engine_metrics(self) -> bytes:
        try:
            return backbone_metrics(self._generation.card.id, await self._backbone.statuses())
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
