"""The controller as a process: the reconciler's loop on the real registry, load and shards.

It is never on the token path: backbones run on the last placement they saw.
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
from model.blocks.moe import ExpertShape
from services.controller.scaler import Scaler
from services.controller.shards import GrpcShards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControllerConfig:
    """`num_shards` of each pool must have registered before a placement is made; `model` is the checkpoint's digest.

    `pools` are those that grow and shrink.
    """

    num_shards: Mapping[str, int]
    model: str
    dtype: torch.dtype
    policy: PlanPolicy = field(default_factory=PlanPolicy)
    timing: ControllerTiming = field(default_factory=ControllerTiming)
    pools: Mapping[str, PoolPolicy] = field(default_factory=dict)


def layer_specs(shapes: Sequence[ExpertShape], dtype: torch.dtype) -> list[LayerSpec]:
    """The planner's view of the experts."""
    return [LayerSpec(shape.layer, shape.num_experts, shape.nbytes(dtype), shape.top_k) for shape in shapes]


def eager(policy: PlanPolicy) -> PlanPolicy:
    """A policy that takes whatever gains anything, and that counts no cost."""
    return replace(policy, min_gain=0.0, good_enough=policy.aim, stay_s=1e9)


class Controller:
    """Without `loads` every expert counts as equally popular."""

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
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.reconciler.run())
            tasks.create_task(self.scaler.run())

    async def plan(self, shards: Sequence[Shard], placement: Placement | None) -> Plan:
        """What the planner would do now; raises ValueError where it finds no place for the experts."""
        return await self._plan(shards, placement, self.config.policy)

    async def plan_as_ordered(self, shards: Sequence[Shard], placement: Placement | None) -> Plan:
        """The same without hysteresis: an operator who asks has decided that it is worth the moves."""
        return await self._plan(shards, placement, eager(self.config.policy))

    async def preview(self) -> Plan | None:
        """What an order to rebalance would lead to now; None where no placement is published yet."""
        shards = with_drain_orders(await self.registry.shards(), await self.registry.orders())
        placement = await self.registry.placement()
        return None if placement is None else await self.plan_as_ordered(shards, placement)

    async def _plan(self, shards: Sequence[Shard], placement: Placement | None, policy: PlanPolicy) -> Plan:
        load = await self.expected_load()
        return await asyncio.to_thread(plan, self.layers, shards, placement, load, policy)

    async def expected_load(self) -> Mapping[int, ExpectedLoad]:
        """Of every layer that was used lately; what was known before where the store does not answer."""
        if self._history:
            try:
                self._last_load = await self._history.expected(time.time())
            except StoreUnavailable as error:
                log.warning("The load of before must do: %s", error)
        return self._last_load
