"""A `Backbone` runs one model without its routed experts, and asks the expert shards for the routed experts' sums."""

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
from model.blocks.expert_bank import Experts
from model.family import ModelFamily
from model.state import Batch
from services.engine.backbone_config import BackboneConfig, build_engine
from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_params import SamplingParams
from services.engine.fleet_connection import FleetConnection
from services.engine.recorder import Recorder
from services.process_memory import keep_freed_memory

log = logging.getLogger(__name__)

# Seconds to wait for the first placement, and then the same number of seconds for the shards to load their experts.
PLACEMENT_TIMEOUT_S = 600.0
WARM_UP_PROMPT = 3  # tokens of the prompt of the first request: several, so that a chunk of a prompt is computed
WARM_UP_TOKENS = 8  # tokens to generate before the first request: enough that drafts are made and verified


class Backbone:
    """A `Backbone` serves one model with one engine.

    - `registry`: the store with the placement and the shards of the fleet. Without a registry, this process computes
      the routed experts itself.
    - `loads`: the store for the expert load; required if there is a registry.

    `start` and `stop` must be called on the same event loop.
    """

    def __init__(
        self, config: BackboneConfig, family: ModelFamily, registry: RegistryStore | None, loads: LoadStore | None
    ) -> None:
        torch.set_num_threads(config.num_threads)
        keep_freed_memory()
        self.config, self.family = config, family
        model_digest, shapes = family.checkpoint.digest, family.expert_shapes
        num_experts = {shape.layer: shape.num_experts for shape in shapes}
        picks, self.recorder = LoadCounter(num_experts), Recorder(model_digest, num_experts)
        self.fleet: FleetConnection | None = None
        if registry is not None:
            assert loads is not None, "a backbone with a registry needs a load store"
            expert_bytes = {shape.layer: shape.nbytes(config.dtype) for shape in shapes}
            self.fleet = FleetConnection(model_digest, expert_bytes, registry, loads, picks)
        experts = self.fleet.experts if self.fleet else family.load_local_experts(config.dtype, config.device)
        self._experts = CountedExperts(experts, picks, self.recorder)
        self.engine = build_engine(config, family, self._experts)

    async def start(self) -> None:
        """Start the engine and return once the engine serves requests; raise TimeoutError if no placement appears."""
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
        """Stop the engine, end its open streams, and disconnect from the fleet."""
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
        """Return the engine's counts for health checks and metrics; with remote experts, add the fleet's status."""
        status: dict[str, Any] = {"engine": asdict(self.engine.stats()), "has_mtp": self.family.has_mtp}
        return status | (self.fleet.status() if self.fleet else {})

    async def _warm_up(self) -> None:
        """Generate up to WARM_UP_TOKENS tokens, because the first request is slow and should not be a user's request.

        Retry for PLACEMENT_TIMEOUT_S seconds, because shards may still be loading experts.
        """
        max_len = self.config.max_model_len
        prompt = [0] * min(WARM_UP_PROMPT, max_len - 1)
        max_tokens = min(WARM_UP_TOKENS, max_len - len(prompt))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        deadline = time.monotonic() + PLACEMENT_TIMEOUT_S
        while True:
            try:
                async for _ in self.engine.generate(f"warm-up-{time.monotonic()}", prompt, params):
                    pass
                return
            except EngineFailed as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("The backbone is not ready yet and tries again: %s", error)
                await asyncio.sleep(0.5)

    @torch.inference_mode()
    def _compile_kernels(self) -> None:
        """Run the model on a prompt and on one decode step, without routed experts, so that its kernels are compiled.

        The backbone compiles the kernels before it waits for the first placement, because the shards load their experts
        in the meantime. No request uses the state that the two calls write.
        """
        device, model, state = self.config.device, self.engine.runner.model, self.engine.runner.state
        with self._experts.switched_off():
            for num_tokens, context in ((3, 0), (1, 3)):
                token_ids_T = torch.zeros(num_tokens, dtype=torch.long, device=device)
                batch = Batch(token_ids_T, (num_tokens,), (context,), (0,), ((0,),))
                model.logits(model.forward(batch, state))


class CountedExperts:
    """A `CountedExperts` passes layer calls on to `experts`, and counts in `picks` how often each expert is picked.

    `recorder` also gets the picks, and writes the picks to a file while a recording runs.
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
        """Make layer calls return zeros without calling the experts; on exit, reset the counts of picks to zero."""
        experts, self._experts = self._experts, _zeros
        yield
        self._experts = experts
        self._picks.take()


def _zeros(layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
    """Return a function that returns zeros of the shape of `x_NL`, as if every expert's output were zero."""
    return lambda: torch.zeros(x_NL.shape, dtype=torch.float32, device=x_NL.device)
