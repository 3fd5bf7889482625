"""`build_app` is the composition root: the function builds the Serve application out of plain classes.

Only this file and `services/ingress.py` turn plain classes into Serve deployments. A Serve config names
`import_path: services.app:build_app`, and the config's `args` have the fields of `AppArgs`. This file does not use
`from __future__ import annotations`, because Serve validates the arguments with the annotation of the parameter `args`.
"""

import services.low_priority_imports  # isort: skip  # noqa: F401
import asyncio
import logging
import os
import socket
import warnings
from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.control.registry_store import StoreUnavailable
from model.families.registry import load_family
from services import logs
from services.args import AppArgs, PoolArgs
from services.controller.controller import Controller, ControllerConfig
from services.controller.serve_policy import report
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.recorder import Bounds
from services.engine.server import EngineServer
from services.expert.drain import MOVE_TIMEOUT_S
from services.expert.shard import ANSWER_TIMEOUT_S, ExpertShard, ShardConfig
from services.low_priority import run_at_low_priority

log = logging.getLogger(__name__)

GRPC_SERVICERS = [
    "protos.expertmesh.inference.v1.inference_pb2_grpc:add_InferenceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc:add_HealthServicer_to_server",
]
SHARD_STOP_TIMEOUT_S = MOVE_TIMEOUT_S + ANSWER_TIMEOUT_S + 10  # seconds; Serve kills a shard that takes longer to stop
SCALING_POLICY = "services.controller.serve_policy:follow_the_controller"
METRICS_INTERVAL_S = 1.0  # seconds between two reports of a shard to Serve's autoscaler
GATEWAY_CPUS, CONTROLLER_CPUS = 0.5, 0.1
GATEWAY_STOP_S = 20  # seconds that a gateway may take to stop after it has drained
# In an update, all new replicas start before the old replicas stop, if the nodes have enough resources for both.
SURGE_PERCENT = 100
ONE_PER_NODE: dict[str, Any] = {"max_replicas_per_node": 1}
MAX_OPEN = 1024  # maximum number of open streams of a replica; the engine's queue is full with far fewer requests


class ShardDeployment:
    """A `ShardDeployment` runs one replica of a pool. Each replica of a pool is one expert shard.

    The shard's id contains the replica's id. It does not contain the replica's rank, because Serve may give the same
    rank to a later replica.
    """

    async def __init__(self, args: AppArgs, pool: PoolArgs) -> None:  # type: ignore[misc]
        logs.configure(pool.name, args.log_format)
        torch.set_num_threads(max(1, int(pool.num_cpus)))
        args = await run_at_low_priority(args.resolved)
        family = await run_at_low_priority(load_family, args.model)
        config = ShardConfig(
            shard_id=f"{pool.name}-{serve.get_replica_context().replica_id.unique_id}",
            memory_budget=args.shard_memory(pool, family),
            host_budget=args.shard_host_memory(pool, family),
            pool=pool.name,
            node=os.environ.get("EXPERTMESH_NODE") or socket.gethostname(),
            host=_address(pool.host),
            device=pool.device,
            dtype=args.torch_dtype,
        )
        self._shard = await run_at_low_priority(ExpertShard, config, family, args.registry())
        await self._shard.start()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the pool size that the controller decided, or an empty dict if no size is known yet.

        Serve calls this method on every replica of an elastic pool.
        """
        size = self._shard.pool_size
        return report(size.shards, size.at) if size else {}

    async def check_health(self) -> None:
        if not self._shard.is_healthy:
            raise RuntimeError("the shard's heartbeat or its worker has ended, or its device hangs or always fails")

    async def __del__(self) -> None:
        await self._shard.stop()


class ControllerDeployment:
    """A `ControllerDeployment` runs one replica of the controller; one of the replicas is the leader.

    If the leader dies, the backbones continue to serve. Another replica becomes the leader, or Serve starts a new
    replica.
    """

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        logs.configure("controller", args.log_format)
        args = await run_at_low_priority(args.resolved)
        family = await run_at_low_priority(load_family, args.model)
        pools = {pool.name: pool.scaling for pool in args.pools if pool.is_elastic}
        policy, digest = args.placement.policy, family.checkpoint.digest
        config = ControllerConfig(args.num_shards, digest, args.torch_dtype, policy, pools=pools)
        self._controller = Controller(config, family.expert_shapes, args.registry(), args.loads())
        self._loop = asyncio.create_task(self._controller.run())

    async def __del__(self) -> None:
        """End the controller's loop. The loop then gives up the lease, so that another replica can lead at once."""
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)

    async def preview(self) -> dict[str, Any] | None:
        """Return, as JSON, the plan that an order to rebalance would start, or None before the first placement.

        An error is returned as `{"error": message}`, because Serve would wrap an exception in a traceback.
        """
        try:
            plan = await self._controller.preview()
        except (StoreUnavailable, ValueError) as error:
            return {"error": str(error)}
        return None if plan is None else plan.to_dict()

    async def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError("the controller's loop has ended") from self._loop.exception()


class BackboneDeployment:
    """A `BackboneDeployment` runs one backbone and a gRPC server. Gateways open their streams to this server."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        logs.configure("backbone", args.log_format)
        log.info("Arithmetic: %s.", "; ".join(args.arithmetic()))
        args = await asyncio.to_thread(args.resolved)
        family = load_family(args.model)
        config = BackboneConfig(
            dtype=args.torch_dtype,
            device=args.device,
            max_model_len=args.context(family),
            max_batch_tokens=max(args.max_batch_tokens, args.max_requests + family.config.chunk_align),
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
        """Return the backbone's status, with the process id and the endpoint to which gateways open their streams."""
        return {**self._backbone.status(), "pid": os.getpid(), "endpoint": self._endpoint}

    async def trace(self, bounds: dict[str, Any] | None) -> dict[str, Any]:
        """Start to record which experts the router picks; if `bounds` is None, stop. Return the recorder's report.

        `bounds` limits the recording.
        """
        recorder = self._backbone.recorder
        report = recorder.start(Bounds(**bounds)) if bounds is not None else await asyncio.to_thread(recorder.stop)
        return {"endpoint": self._endpoint, **report}

    async def check_health(self) -> None:
        if not self._backbone.is_healthy:
            raise RuntimeError("the engine's thread or a background task has ended, or the last steps all failed")

    async def __del__(self) -> None:
        await self._server.stop()
        await self._backbone.stop()


def _address(host: str) -> str:
    return str(ray.util.get_node_ip_address()) if host == "auto" else host  # type: ignore[no-untyped-call]


def _deployment(
    cls: type, name: str, labels: dict[str, str], num_cpus: float, num_gpus: float = 0, **options: Any
) -> Any:
    resources: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    where = {"label_selector": labels} if labels else {}
    return serve.deployment(name=name, ray_actor_options=resources | where, **options)(cls)


def build_app(args: AppArgs) -> Application:
    """Return the whole application: gateway and backbone; with remote experts also the controller and the pools.

    Raise ValueError if an argument is wrong or if the model cannot be served. The function itself starts nothing. If
    the model is a repository, its files are downloaded to this node; each other node downloads the same commit when it
    starts a replica.
    """
    resolved = args.resolved()
    family = resolved.check()
    args = args.pinned(resolved).without_idle_shards(family)
    backbone = _deployment(
        BackboneDeployment,
        "backbone",
        args.labels,
        num_cpus=args.threads(family),
        num_gpus=args.gpus,
        num_replicas=args.backbone_replicas,
        max_surge_percent=SURGE_PERCENT,
        max_ongoing_requests=MAX_OPEN,
        graceful_shutdown_timeout_s=10,
        health_check_period_s=5,
    )
    # The gateway is imported here, because the import takes seconds and memory, and other processes do not need it.
    from services.ingress import GatewayDeployment

    gateway = _deployment(
        GatewayDeployment,
        "gateway",
        args.labels,
        num_cpus=GATEWAY_CPUS,
        num_replicas=args.gateway_replicas,
        max_surge_percent=SURGE_PERCENT,
        max_ongoing_requests=MAX_OPEN,
        graceful_shutdown_timeout_s=args.linger_s + args.drain_s + GATEWAY_STOP_S,
        # Two gateways on one node would collide, because both would listen on the same ports.
        **(ONE_PER_NODE if args.host == "auto" and args.http_port else {}),
    )
    extras = [] if args.experts == "local" else _expert_tier(args)
    app: Application = gateway.bind(args, backbone.bind(args), *extras)
    return app


def _expert_tier(args: AppArgs) -> list[Application]:
    """Return the controller's application and one application for each pool of shards."""
    controller = _deployment(
        ControllerDeployment,
        "controller",
        args.labels,
        num_cpus=CONTROLLER_CPUS,
        num_replicas=args.controller_replicas,
        **(ONE_PER_NODE if args.host == "auto" else {}),  # so that the loss of a node ends at most one controller
    )
    return [controller.bind(args), *(_pool(pool).bind(args, pool) for pool in args.pools)]


def _pool(pool: PoolArgs) -> Any:
    size: dict[str, Any] = (
        {"autoscaling_config": _autoscaling(pool)} if pool.is_elastic else {"num_replicas": pool.shards}
    )
    return _deployment(
        ShardDeployment,
        pool.name,
        pool.labels,
        num_cpus=pool.num_cpus,
        num_gpus=pool.gpus,
        **size,
        graceful_shutdown_timeout_s=SHARD_STOP_TIMEOUT_S,
    )


def _autoscaling(pool: PoolArgs) -> AutoscalingConfig:
    """Return Serve's autoscaling settings for `pool`. Serve then follows the controller's decisions without a delay.

    The controller has already waited for the delays before growing and shrinking.
    """
    with warnings.catch_warnings():
        # Ray 2.60 deprecates metrics_interval_s, but ignores the option that replaces it. The default is 10 s.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=pool.least_shards,
            initial_replicas=pool.shards,
            max_replicas=pool.most_shards,
            upscale_delay_s=0,
            downscale_delay_s=0,
            metrics_interval_s=METRICS_INTERVAL_S,
            look_back_period_s=5 * METRICS_INTERVAL_S,
            policy=AutoscalingPolicy(policy_function=SCALING_POLICY),  # type: ignore[no-untyped-call]
        )
