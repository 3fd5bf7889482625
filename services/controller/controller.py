"""The `Controller` runs the reconciler's and the scaler's loops on the real registry, load and shards.

Backbones generate tokens without the controller: if it is gone, they continue with the last placement that they read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from cluster.control.leader.reconciler import ControllerTiming, Reconciler
from cluster.control.load_store import LoadHistory, LoadStore
from cluster.control.operator_orders import with_drain_orders
from cluster.control.registry_store import RegistryStore, StoreUnavailable
from cluster.control.scaling import PoolPolicy
from cluster.load import ExpectedLoad
from cluster.placement.plan import Plan, PlanPolicy
from cluster.placement.planner import plan
from cluster.topology import LayerSpec, Placement, Shard
from model.blocks.expert_bank import memory_on
from model.configs.expert_shape import ExpertShape
from services.controller.scaler import Scaler
from services.controller.shards import GrpcShards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControllerConfig:
    """A `ControllerConfig` says what a controller serves and how it decides.

    - `num_shards`: the number of shards of each pool that must be alive before the first placement is planned.
    - `model`, `dtype`: the checkpoint's digest, and the dtype in which shards hold the weights.
    - `policy`, `timing`: the planner's policy, and the reconciler's waiting times.
    - `pools`: the policies of the pools that grow and shrink; other pools keep their size.
    """

    num_shards: Mapping[str, int]
    model: str
    dtype: torch.dtype
    policy: PlanPolicy = field(default_factory=PlanPolicy)
    timing: ControllerTiming = field(default_factory=ControllerTiming)
    pools: Mapping[str, PoolPolicy] = field(default_factory=dict)


def layer_specs(shapes: Sequence[ExpertShape], dtype: torch.dtype) -> list[LayerSpec]:
    """Return the planner's `LayerSpec` of each MoE layer in `shapes`; `dtype` is the dtype of the experts' weights."""
    memory = {device: memory_on(shapes, dtype, device) for device in ("cpu", "cuda")}
    return [
        LayerSpec.of(shape, shape.nbytes(dtype), {device: of[shape.layer] for device, of in memory.items()})
        for shape in shapes
    ]


def without_hysteresis(policy: PlanPolicy) -> PlanPolicy:
    """Return a copy of `policy` that accepts any gain, however small, and ignores the cost of moves."""
    return replace(policy, min_gain=0.0, good_enough=policy.aim, stay_s=1e9, group_stay_s=1e9)


class Controller:
    """A `Controller` owns a reconciler and a scaler; if `loads` is None, all experts count as equally popular."""

    def __init__(
        self,
        config: ControllerConfig,
        shapes: Sequence[ExpertShape],
        registry: RegistryStore,
        loads: LoadStore | None = None,
    ) -> None:
        self.config, self.registry = config, registry
        self.layers = layer_specs(shapes, config.dtype)
        self._history = loads and LoadHistory(loads, {spec.layer: spec.num_experts for spec in self.layers})
        self._last_load: dict[int, ExpectedLoad] = {}
        self.reconciler = Reconciler(
            f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}",
            config.model,
            self.layers,
            config.num_shards,
            registry,
            GrpcShards(registry, shapes, config.model, config.dtype),
            self.plan,
            time.time,
            config.timing,
            ordered_planner=self.plan_as_ordered,
        )
        self.scaler = Scaler(
            config.pools, self.layers, registry, self.reconciler, self.expected_load, time.time, config.policy
        )

    async def run(self) -> None:
        """Run the loops of the reconciler and the scaler until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.reconciler.run())
            tasks.create_task(self.scaler.run())

    async def plan(self, shards: Sequence[Shard], placement: Placement | None) -> Plan:
        """Return the plan for the present load; raise ValueError if the experts do not fit on the shards."""
        return await self._plan(shards, placement, self.config.policy)

    async def plan_as_ordered(self, shards: Sequence[Shard], placement: Placement | None) -> Plan:
        """Return the plan without hysteresis: the operator who ordered the plan accepts the cost of the moves."""
        return await self._plan(shards, placement, without_hysteresis(self.config.policy))

    async def preview(self) -> Plan | None:
        """Return the plan that an order to rebalance would lead to now, or None if no placement is published."""
        shards = with_drain_orders(await self.registry.shards(), await self.registry.orders())
        placement = await self.registry.placement()
        return None if placement is None else await self.plan_as_ordered(shards, placement)

    async def _plan(self, shards: Sequence[Shard], placement: Placement | None, policy: PlanPolicy) -> Plan:
        load = await self.expected_load()
        return await asyncio.to_thread(plan, self.layers, shards, placement, load, policy)

    async def expected_load(self) -> Mapping[int, ExpectedLoad]:
        """Return the expected load, by layer, of every layer that had picks lately.

        If the store does not answer, the method returns the load that was read last.
        """
        if self._history:
            try:
                self._last_load = await self._history.expected(time.time())
            except StoreUnavailable as error:
                log.warning("The load that was read last is used again, because the store does not answer: %s", error)
        return self._last_load
