"""A `GatewayDeployment` runs the gateway as a Ray Serve deployment.

The deployment is not in `services/app.py`, because the imports of FastAPI and the tokenizers take several seconds, and
only the gateway's process needs these imports. Ray Serve reads the annotations in this file, so the annotations must be
objects and not strings (there is no `from __future__ import annotations`).
"""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from model.families.registry import load_family
from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services import logs
from services.args import AppArgs
from services.controller.controller import layer_specs
from services.engine.contract.errors import EngineFailed
from services.engine.grammar.grammar_checker import GrammarChecker
from services.gateway.backbones.backbone_pool import BackbonePool
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.errors import ApiError, ApiRefusal, GrpcError
from services.gateway.generation import Generation, ModelCard
from services.gateway.grpc_api import InferenceApi
from services.gateway.health import Health
from services.gateway.listener import ALL_INTERFACES, Listener, ListenerConfig
from services.gateway.metrics.backbone_metrics import backbone_metrics
from services.gateway.metrics.request_metrics import RequestMetrics
from services.gateway.operator.admin import add_admin
from services.gateway.operator.degraded import degraded_report
from services.gateway.operator.operations import ExpertTier, Operations
from services.gateway.ports.health_api import HealthApi
from services.gateway.rest import build_rest

log = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 3.0  # seconds to wait for the first status of a backbone
OTHERS_TIMEOUT_S = 0.5  # seconds to wait for the statuses of the other backbones, after the first status
TRACE_TIMEOUT_S = 10.0  # seconds to wait until all backbones have started or stopped a recording
PREVIEW_TIMEOUT_S = 30.0  # seconds to wait for the controller's plan
STOPPING = Health(is_ready=False, detail="This gateway is stopping.")


def _ask_all(backbone: DeploymentHandle[Any]) -> Callable[[], Awaitable[list[dict[str, Any]]]]:
    """Return a function that returns the statuses of all backbone replicas that answer in time (see `_answers`)."""

    async def ask() -> list[dict[str, Any]]:
        # `results_async` is not used here, because it would lose the answers of all replicas if one replica hangs.
        broadcast = backbone.broadcast("status")._fetch_replica_results_async()
        replicas: list[Any] = await asyncio.wait_for(broadcast, STATUS_TIMEOUT_S)
        return await _answers([replica.get_async() for replica in replicas])

    return ask


async def _answers(calls: Sequence[Awaitable[Any]]) -> list[dict[str, Any]]:
    """Return the results of the `calls` that end in time; calls that fail or are late are left out.

    A call is in time if it ends within STATUS_TIMEOUT_S and within OTHERS_TIMEOUT_S after the first result.
    """
    answers: list[dict[str, Any]] = []
    pending = {asyncio.ensure_future(call) for call in calls}
    clock = asyncio.get_running_loop().time
    stop_at = clock() + STATUS_TIMEOUT_S
    while pending and (left := stop_at - clock()) > 0:
        done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        new = [task.result() for task in done if not task.cancelled() and task.exception() is None]
        if new and not answers:
            stop_at = min(stop_at, clock() + OTHERS_TIMEOUT_S)
        answers += new
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    return answers


def _trace_all(backbone: DeploymentHandle[Any]) -> Callable[[dict[str, Any] | None], Awaitable[list[dict[str, Any]]]]:
    """Return a function that makes every backbone replica start or stop recording the router's choices."""

    async def trace(bounds: dict[str, Any] | None) -> list[dict[str, Any]]:
        answers = backbone.broadcast("trace", bounds).results_async(timeout_s=TRACE_TIMEOUT_S, return_exceptions=True)
        return [
            answer
            if isinstance(answer, dict)
            else {"error": f"This backbone did not start or stop its trace: {type(answer).__name__}."}
            for answer in await answers
        ]

    return trace


def _preview(controller: DeploymentHandle[Any]) -> Callable[[], Awaitable[dict[str, Any] | None]]:
    """Return a function that returns the controller's plan, or None if no placement exists yet."""

    async def preview() -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(PREVIEW_TIMEOUT_S):
                plan: dict[str, Any] | None = await controller.preview.remote()
        except (TimeoutError, RayError, RayServeException) as error:
            sentence = f"The controller, which makes plans, does not answer ({type(error).__name__})."
            raise ApiError(ApiRefusal.UNAVAILABLE, sentence, retry_after=1) from error
        return plan

    return preview


@serve.ingress()
class GatewayDeployment:
    """A `GatewayDeployment` serves REST and gRPC through Ray Serve's proxies and on the ports that `args` name.

    For each RPC, Serve's gRPC proxy calls the method with the name of the RPC.
    """

    def __init__(
        self,
        args: AppArgs,
        backbone: DeploymentHandle[Any],
        controller: DeploymentHandle[Any] | None = None,
        *_: DeploymentHandle[Any],
    ) -> None:
        logs.configure("gateway", args.log_format)
        args = args.resolved()
        family = load_family(args.model)
        card = ModelCard(args.name, args.context(family), int(time.time()))
        # "auto" means all interfaces, because a port-forward of Kubernetes connects to the pod's own 127.0.0.1.
        host = ALL_INTERFACES if args.host == "auto" else args.host
        self._where = ListenerConfig(host, args.http_port, args.grpc_port, args.drain_s, args.keep_alive_s)
        metrics = RequestMetrics(card.id)
        self._backbone = BackbonePool(_ask_all(backbone), metrics.count_resumed)
        self._grammars = GrammarChecker(args.model)
        tokenizer = Tokenizer(args.model)
        for note in tokenizer.template.notes:
            log.info("%s", note)
        self._generation = Generation(
            self._backbone,
            tokenizer,
            card,
            self._grammars.check,
            metrics=metrics,
            limits=args.limits,
            defaults=args.sampling_defaults(family),
        )
        self._linger_s, self._is_stopping = args.linger_s, False
        self._allowed_origins = args.allowed_origins
        self._grpc, self._grpc_health = InferenceApi(self._generation), HealthApi(self._health)
        self._admin_key = args.admin_key.get_secret_value() if args.admin_key else None
        self._operations: Operations | None = None
        if controller is not None:
            layers = layer_specs(family.expert_shapes, args.torch_dtype)
            pools = {pool.name: (pool.least_shards, pool.most_shards) for pool in args.pools}
            tier = ExpertTier(layers, pools, _preview(controller), _trace_all(backbone))
            self._registry, self._loads = args.registry(), args.loads()
            self._operations = Operations(tier, self._registry, self._loads)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the REST application and start to listen.

        Serve calls this method before the first request, on the event loop that serves the requests.
        """
        app = build_rest(self._generation, self._health, self._engine_metrics, self._allowed_origins)
        app.add_api_route("/status", self._report, methods=["GET"])
        app.add_api_route("/health/degraded", self._degraded, methods=["GET"])
        add_admin(app, self._admin_key, self._operations)
        await self._backbone.start()
        self._listener = Listener(self._where, app, self._generation, self._grpc_health)
        await self._listener.start()
        # What the gateway holds now lives as long as the gateway. Without `freeze`, every full garbage collection would
        # look through all of it and block the event loop for 300 ms.
        gc.collect()
        gc.freeze()
        return app

    async def check_health(self) -> None:
        if not self._listener.is_healthy:
            raise RuntimeError("the gateway no longer listens on its own ports")

    async def _health(self) -> Health:
        return STOPPING if self._is_stopping else await self._backbone.health()

    async def __del__(self) -> None:
        self._is_stopping = True
        await asyncio.sleep(self._linger_s)  # wait until load balancers notice that the gateway is not ready
        await self._listener.stop()
        await self._backbone.stop()
        if self._operations is not None:
            await asyncio.gather(self._registry.redis.aclose(), self._loads.redis.aclose())
        self._grammars.close()

    async def _report(self) -> dict[str, Any]:
        """Return the fields of `/status`, which `expertmesh status` shows."""
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
            except ApiError as error:  # the status is useful without the store, because backbones serve without it
                fleet = {"store": error.message}
        return {"model": self._generation.card.id, "health": state, **statuses[0], "backbones": engines, **fleet}

    async def _degraded(self) -> JSONResponse:
        """Return the response of `/health/degraded`: status 503 if the cover is below two or no backbone answers.

        `/health/degraded` must not be a liveness probe, because the gateway itself works while the cover is below two.
        """
        try:
            report = degraded_report(await self._backbone.statuses())
        except EngineFailed as error:
            return JSONResponse({"status": "unknown", "detail": str(error)}, 503)
        return JSONResponse(report, 503 if report["status"] == "degraded" else 200)

    async def _engine_metrics(self) -> CollectorRegistry | None:
        try:
            return backbone_metrics(self._generation.card.id, await self._backbone.statuses())
        except EngineFailed:
            return None

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
        model: pb.Model = await _answer(self._grpc.get_model(request, grpc_context), grpc_context)
        return model

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext) -> pb.TokenizeResponse:
        tokens: pb.TokenizeResponse = await _answer(self._grpc.tokenize(request, grpc_context), grpc_context)
        return tokens

    async def Detokenize(
        self, request: pb.DetokenizeRequest, grpc_context: RayServegRPCContext
    ) -> pb.DetokenizeResponse:
        text: pb.DetokenizeResponse = await _answer(self._grpc.detokenize(request, grpc_context), grpc_context)
        return text

    async def Check(self, request: HealthCheckRequest, grpc_context: RayServegRPCContext) -> HealthCheckResponse:
        return await _answer(self._grpc_health.check(request), grpc_context)

    async def List(self, request: HealthListRequest) -> HealthListResponse:
        return await self._grpc_health.list(request)

    async def Watch(self, request: HealthCheckRequest) -> AsyncGenerator[HealthCheckResponse, None]:
        async with aclosing(self._grpc_health.watch(request)) as statuses:
            async for status in statuses:
                yield status


async def _answer(answer: Any, context: RayServegRPCContext) -> Any:
    try:
        return await answer
    except GrpcError as error:
        _refuse(context, error)


def _refuse(context: RayServegRPCContext, error: GrpcError) -> None:
    """Write the code and message of `error` to `context`, and raise `error`.

    After an exception, Ray Serve takes the code and the message for the client from the context.
    """
    context.set_code(error.code)
    context.set_details(error.message)
    raise error
