"""A backbone replica: the model without its routed experts, its engine, and what it knows of the fleet."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.control.follower import Follower
from cluster.control.load_store import LoadStore
from cluster.control.registry_store import RegistryStore, StoreUnavailable
from cluster.dispatch.shard_health import Circuit
from cluster.load import LoadCounter
from cluster.placement.coverage import CoverageReport
from cluster.topology import Placement, Shard
from model import kernels
from model.blocks.moe import Experts
from model.family import ModelFamily
from model.state import Batch, State
from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_params import SamplingParams
from services.engine.drafting.draft_depth import DEFAULT_DRAFT_TOKENS
from services.engine.engine import Engine
from services.engine.grammar.compiled_grammar import GrammarCompiler
from services.engine.memory import MemoryPlan
from services.engine.recorder import Recorder
from services.engine.runner import Runner
from services.engine.scheduler import Scheduler, SchedulerConfig
from services.engine.tier_watch import TierWatch
from services.expert.client import ExpertsUnavailable, RemoteExperts

log = logging.getLogger(__name__)

WATCH_PERIOD_S = 0.5
FLUSH_PERIOD_S = 1.0
RATE_KEPT = 0.9  # of the picks per second, from one flush to the next
PLACEMENT_TIMEOUT_S = 600.0
WARM_UP_TOKENS = 8  # enough for drafts to be made and verified


@dataclass(frozen=True)
class BackboneConfig:
    """What a backbone needs to know beside the model; lengths in tokens.

    `draft_tokens`: the most that are drafted at once for a request; 0 turns drafting off, None leaves it to us.
    """

    dtype: torch.dtype
    device: str
    max_model_len: int
    max_batch_tokens: int
    memory: MemoryPlan
    num_threads: int
    max_waiting: int = 256
    draft_tokens: int | None = None
    prefix_cache: bool = True


class CountedExperts:
    """Passes calls on, counts the picks of each expert, and has them recorded where somebody asked for it."""

    def __init__(self, experts: Experts, counter: LoadCounter, recorder: Recorder) -> None:
        self.experts, self.counter, self.recorder = experts, counter, recorder

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        wait = self.experts(layer, x_NL, topk_ids_NK, topk_weights_NK)
        picks_NK = topk_ids_NK.cpu().numpy()
        self.counter.add(layer, picks_NK)
        self.recorder.add(layer, picks_NK)
        return wait


class Backbone:
    """`start` and `stop` belong to one event loop; without a registry the experts are computed in this process."""

    def __init__(
        self, config: BackboneConfig, family: ModelFamily, registry: RegistryStore | None, loads: LoadStore | None
    ) -> None:
        torch.set_num_threads(config.num_threads)
        self.config, self.family, self.loads = config, family, loads
        num_experts = {shape.layer: shape.num_experts for shape in family.expert_shapes}
        self.counter, self.recorder = LoadCounter(num_experts), Recorder(family.checkpoint.digest, num_experts)
        expert_mib = {shape.layer: shape.nbytes(config.dtype) / 2**20 for shape in family.expert_shapes}
        self.remote = None if registry is None else RemoteExperts(expert_mib=expert_mib)
        inner: Experts = self.remote or family.load_local_experts(config.dtype, config.device)
        self._experts = CountedExperts(inner, self.counter, self.recorder)
        model = family.load_backbone(self._experts, config.dtype, config.device)
        plan = config.memory
        state = State(family.config.state_spec, plan.num_state_slots, plan.num_blocks, config.dtype, config.device)
        most = DEFAULT_DRAFT_TOKENS if config.draft_tokens is None else config.draft_tokens
        draft_tokens = most if model.has_drafts else 0
        # Where prompts go through the recurrence they may be cut anywhere, and their state be saved there.
        align = 1 if kernels.is_compiled(config.device) else family.config.chunk_size
        scheduler = Scheduler(
            SchedulerConfig(
                plan.num_slots,
                plan.num_blocks,
                plan.block_size,
                config.max_model_len,
                max_batch_tokens=config.max_batch_tokens,
                max_waiting=config.max_waiting,
                chunk_align=align,
                checkpoint_align=align,
                num_checkpoint_slots=plan.num_checkpoint_slots,
                bytes_per_slot=plan.bytes_per_slot,
                bytes_per_block=plan.bytes_per_block,
                has_prefix_cache=config.prefix_cache,
                turn_end_ids=frozenset(family.config.eos_token_ids),
                max_draft_tokens=draft_tokens,
            )
        )
        self.engine = Engine(
            Runner(model, state, config.device, has_drafts=draft_tokens > 0),
            scheduler,
            family.config.vocab_size,
            family.config.eos_token_ids,
            outages=(ExpertsUnavailable,),
            compile_grammar=lambda grammar: self._grammars.compile(grammar),
        )
        name, digest = f"{socket.gethostname()}-{secrets.token_hex(4)}", family.checkpoint.digest
        self.follower = None if registry is None else Follower(name, digest, registry, self._adopt)
        self._placed_at = 0.0
        self._wanted: dict[str, str] = {}  # what each shard should hold, as a digest
        self._rates: dict[int, NDArray[np.float64]] = {}
        self._tier = TierWatch({shape.layer: shape.nbytes(config.dtype) for shape in family.expert_shapes})
        self._tasks: list[asyncio.Task[None]] = []

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        # Made by the first grammar, on its thread: reading a large tokenizer takes a second.
        return GrammarCompiler(self.family.checkpoint.path, self.family.config.eos_token_ids)

    async def start(self) -> None:
        """Returns when the first token could be served; raises TimeoutError if no placement comes."""
        log.info("%s; %s", kernels.describe(self.config.device), self.config.memory)
        if not self.family.has_mtp:
            log.warning("%s has no MTP weights and is served without drafting.", self.family.checkpoint.path)
        if self.remote is not None:
            await asyncio.to_thread(self._compile)
            await asyncio.wait_for(self._first_placement(), PLACEMENT_TIMEOUT_S)
            self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._flush())]
        self.engine.start()
        await self._warm_up()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.remote is not None:
            self.remote.give_up()  # or the engine might wait for a home, and we for the engine
        await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.recorder.stop)
        if self.follower is not None:
            with suppress(StoreUnavailable):
                await self.follower.leave()
        if self.remote is not None:
            await asyncio.to_thread(self.remote.close)

    @property
    def epoch(self) -> int:
        return self.remote.epoch if self.remote else 0

    @property
    def is_healthy(self) -> bool:
        return self.engine.is_healthy and not any(task.done() for task in self._tasks)

    def status(self) -> dict[str, Any]:
        """Engine, placement and traffic in numbers, for health and metrics."""
        status: dict[str, Any] = {"engine": asdict(self.engine.stats()), "has_mtp": self.family.has_mtp}
        follower, remote = self.follower, self.remote
        if remote is not None and follower is not None and (placement := follower.placement) is not None:
            states, circuits = self._shard_states(placement), remote.circuits
            exposure = self._watch_tier(placement)
            tier = self._tier.report(exposure, self._rates, time.time())
            status |= {
                "epoch": remote.epoch,
                "cover": exposure.cover,
                "placement_age_s": time.time() - self._placed_at,
                "down": sorted(set(placement.shard_ids) - exposure.live),
                "traffic": asdict(remote.traffic),
                "circuits": circuits,
                "tier": tier,
                "shards": self._shard_report(placement, states, tier, circuits),
            }
        return status

    @property
    def _known(self) -> Mapping[str, Shard]:
        return self.follower.shards if self.follower else {}

    @property
    def _unreachable(self) -> set[str]:
        """By their streams, or gone from the store: a process that hangs keeps its stream open while nobody calls."""
        assert self.remote is not None
        assert self.follower is not None
        return {*self.remote.down, *self.follower.gone}

    def _shard_states(self, placement: Placement) -> dict[str, str]:
        """Of each shard of the placement: live, or why it does not serve what it should."""
        unreachable = self._unreachable

        def state(shard: Shard) -> str:
            if shard.id in unreachable:
                return "unreachable"
            if shard.draining:
                return "draining"
            return "live" if shard.held_digest == self._wanted[shard.id] else "loading"

        return {shard_id: state(self._known.get(shard_id) or _never_seen(shard_id)) for shard_id in placement.shard_ids}

    def _watch_tier(self, placement: Placement) -> CoverageReport:
        """Which shards serve what the placement says. One that changes holds other experts, but none too few: it gets
        the new ones before they are published, and keeps the old ones until they are published no more."""
        assert self.remote is not None
        unreachable, circuits = self._unreachable, self.remote.circuits
        live = [
            id
            for id in placement.shard_ids
            if id not in unreachable
            and circuits.get(id) != Circuit.OPEN
            and (shard := self._known.get(id)) is not None
            and (shard.num_held > 0 or shard.held_digest == self._wanted[id])
        ]
        return self._tier.note(placement, live, time.time())

    def _shard_report(
        self, placement: Placement, states: Mapping[str, str], tier: Mapping[str, Any], circuits: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """The placement's shards, with their picks of late."""
        report = []
        for shard in (self._known.get(id) or _never_seen(id) for id in sorted(placement.shard_ids)):
            names = ("id", "pool", "node", "endpoint", "device", "num_held", "incarnation", "queue_depth")
            told = {
                "pace": asdict(shard.cost_model),
                "picks_per_s": tier["shard_picks_per_s"][shard.id],
                "blast_radius": tier["blast_radius"][shard.id],
                "circuit": circuits.get(shard.id, "unknown"),
                "state": states[shard.id],
            }
            report.append({name: getattr(shard, name) for name in names} | told)
        return report

    async def _warm_up(self) -> None:
        """A prompt and some steps, so that no user meets the first call's cost; shards may still be loading."""
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
    def _compile(self) -> None:
        """Computes a prompt and a step without experts: what kernels they need is compiled while others place them.

        The state that this writes belongs to no request yet.
        """
        device, shards = self.config.device, self._experts.experts
        model, state = self.engine.runner.model, self.engine.runner.state
        self._experts.experts = _nothing
        for num_tokens, context in ((3, 0), (1, 3)):
            token_ids_T = torch.zeros(num_tokens, dtype=torch.long, device=device)
            batch = Batch(token_ids_T, (num_tokens,), (context,), (0,), ((0,),))
            model.logits(model.forward(batch, state))
        self._experts.experts = shards
        self.counter.take()

    async def _first_placement(self) -> None:
        while not await self._refresh():
            await asyncio.sleep(0.1)

    async def _refresh(self) -> bool:
        """Takes the newest placement and shards; a registry that is down changes nothing."""
        assert self.follower is not None
        try:
            return await self.follower.refresh()
        except StoreUnavailable as error:
            log.warning("Serving on with epoch %d: %s", self.epoch, error)
            return False

    def _adopt(self, placement: Placement, shards: Iterable[Shard]) -> None:
        assert self.remote is not None
        if placement.epoch != self.remote.epoch:
            self._wanted = {shard_id: placement.digest_of(shard_id) for shard_id in placement.shard_ids}
        self._placed_at = time.time()
        self.remote.update(placement, shards)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                await self._refresh()
                if self.follower is not None and (placement := self.follower.placement) is not None:
                    self._watch_tier(placement)
            except Exception:
                log.exception("Serving on with epoch %d.", self.epoch)

    def _note_rates(self, taken: Mapping[int, NDArray[np.int64]]) -> None:
        """Picks per second of each expert, averaged over about ten flushes."""
        for layer in {*self._rates, *taken}:
            old, new = self._rates.get(layer, 0.0), taken.get(layer, 0)
            self._rates[layer] = np.asarray(RATE_KEPT * old + (1 - RATE_KEPT) * new / FLUSH_PERIOD_S)

    async def _flush(self) -> None:
        """Adds the expert counts to the store once a second; what cannot be sent is kept and added to the next."""
        assert self.loads is not None
        while True:
            await asyncio.sleep(FLUSH_PERIOD_S)
            taken = self.counter.take()
            self._note_rates(taken)
            try:
                await self.loads.add(taken, time.time())
                self.counter.mark_sent()
            except StoreUnavailable as error:
                log.warning("Expert load is kept for later: %s", error)
                self.counter.merge(taken)
            except Exception:
                log.exception("The expert load of the last second is lost.")


def _nothing(layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
    """Experts that add nothing."""
    return lambda: torch.zeros(x_NL.shape, dtype=torch.float32, device=x_NL.device)


def _never_seen(shard_id: str) -> Shard:
    """A shard that the placement names and that has not registered since this backbone started."""
    return Shard(shard_id, endpoint="", node="", pool="", device="", incarnation="", memory_budget=0)
