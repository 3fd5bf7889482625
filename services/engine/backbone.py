"""A backbone runs the model without its routed experts: it has an engine, and a connection to the expert shards."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cluster.control.load_store import LoadStore
from cluster.control.registry_store import RegistryStore
from cluster.load import LoadCounter
from model import kernels
from model.blocks.moe import Experts
from model.family import ModelFamily
from model.state import Batch
from services.engine.backbone_config import BackboneConfig, build_engine
from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_params import SamplingParams
from services.engine.fleet_connection import FleetConnection
from services.engine.recorder import Recorder

log = logging.getLogger(__name__)

# Seconds to wait for the first placement, and as many again for the shards to load their experts.
PLACEMENT_TIMEOUT_S = 600.0
WARM_UP_TOKENS = 8  # tokens to generate before the first request; enough for drafts to be made and verified


class Backbone:
    """A `Backbone` serves one model with one engine.

    `registry` and `loads` are the stores of the expert fleet; without them the experts are computed in this process.
    `start` and `stop` belong to one event loop.
    """

    def __init__(
        self, config: BackboneConfig, family: ModelFamily, registry: RegistryStore | None, loads: LoadStore | None
    ) -> None:
        torch.set_num_threads(config.num_threads)
        self.config, self.family = config, family
        model_digest, shapes = family.checkpoint.digest, family.expert_shapes
        num_experts = {shape.layer: shape.num_experts for shape in shapes}
        picks, self.recorder = LoadCounter(num_experts), Recorder(model_digest, num_experts)
        self.fleet: FleetConnection | None = None
        if registry is not None:
            assert loads is not None, "with a registry there is a load store"
            expert_bytes = {shape.layer: shape.nbytes(config.dtype) for shape in shapes}
            self.fleet = FleetConnection(model_digest, expert_bytes, registry, loads, picks)
        experts = self.fleet.experts if self.fleet else family.load_local_experts(config.dtype, config.device)
        self._experts = CountedExperts(experts, picks, self.recorder)
        self.engine = build_engine(config, family, self._experts)

    async def start(self) -> None:
        """Start the engine, and return when it can serve tokens; raise TimeoutError if no placement comes."""
        log.info("%s; %s", kernels.describe(self.config.device), self.config.memory)
        if not self.family.has_mtp:
            log.warning("%s has no MTP weights and is served without drafting.", self.family.checkpoint.path)
        if self.fleet is not None:
            await asyncio.to_thread(self._compile_kernels)
            await asyncio.wait_for(self.fleet.first_placement(), PLACEMENT_TIMEOUT_S)
            self.fleet.start()
        self.engine.start()
        await self._warm_up()

    async def stop(self) -> None:
        """End the engine and its open streams, and leave the fleet."""
        if self.fleet is not None:
            await self.fleet.stop()
        await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.recorder.stop)
        if self.fleet is not None:
            await self.fleet.leave()

    @property
    def is_healthy(self) -> bool:
        return self.engine.is_healthy and (self.fleet is None or self.fleet.is_healthy)

    def status(self) -> dict[str, Any]:
        """Return the numbers of the engine and, with remote experts, of the fleet, for health and metrics."""
        status: dict[str, Any] = {"engine": asdict(self.engine.stats()), "has_mtp": self.family.has_mtp}
        return status | (self.fleet.status() if self.fleet else {})

    async def _warm_up(self) -> None:
        """Generate a few tokens, so that no user waits for the work that only the first call has to do.

        Retry for PLACEMENT_TIMEOUT_S, because shards may still be loading.
        """
        params = SamplingParams(max_tokens=WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
        deadline = time.monotonic() + PLACEMENT_TIMEOUT_S
        while True:
            try:
                async for _ in self.engine.generate(f"warm-up-{time.monotonic()}", [0, 0, 0], params):
                    pass
                return
            except EngineFailed as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("Not ready yet: %s", error)
                await asyncio.sleep(0.5)

    @torch.inference_mode()
    def _compile_kernels(self) -> None:
        """Compute a prompt and a step without experts, so that kernels are compiled while the experts are placed.

        No request uses the state that these calls write.
        """
        device, model, state = self.config.device, self.engine.runner.model, self.engine.runner.state
        with self._experts.switched_off():
            for num_tokens, context in ((3, 0), (1, 3)):
                token_ids_T = torch.zeros(num_tokens, dtype=torch.long, device=device)
                batch = Batch(token_ids_T, (num_tokens,), (context,), (0,), ((0,),))
                model.logits(model.forward(batch, state))


class CountedExperts:
    """A `CountedExperts` passes layer calls on to `experts`, and counts the picks of each expert.

    The picks also go to `recorder`, which writes them to a file while a recording runs.
    """

    def __init__(self, experts: Experts, picks: LoadCounter, recorder: Recorder) -> None:
        self._experts, self._picks, self._recorder = experts, picks, recorder

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        wait = self._experts(layer, x_NL, topk_ids_NK, topk_weights_NK)
        picks_NK = topk_ids_NK.cpu().numpy()
        self._picks.add(layer, picks_NK)
        self._recorder.add(layer, picks_NK)
        return wait

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Let layer calls return zeros without calling the experts; on exit, forget the picks that were counted."""
        experts, self._experts = self._experts, _zeros
        yield
        self._experts = experts
        self._picks.take()


def _zeros(layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
    """Return the result of experts that add nothing."""
    return lambda: torch.zeros(x_NL.shape, dtype=torch.float32, device=x_NL.device)
