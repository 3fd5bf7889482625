"""A `BackboneConfig` holds the settings of a backbone, and `build_engine` builds the backbone's engine from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model import kernels
from model.blocks.expert_bank import Experts
from model.family import ModelFamily
from model.state import State
from services.engine.drafting.draft_depth import DEFAULT_DRAFT_TOKENS
from services.engine.engine import Engine
from services.engine.grammar.compiled_grammar import GrammarCompiler
from services.engine.runner import Runner
from services.engine.scheduling.memory import MemoryPlan
from services.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from services.expert.expert_call import ExpertsUnavailable

# Largest number of logits that a step computes for the logprobs of prompts while other requests run. These logits
# lengthen the step by about 10 ms: 8 rows of a vocabulary of 131,072 on a CPU core, or 512 rows on a GPU.
SCORED_LOGITS_CPU, SCORED_LOGITS_ELSEWHERE = 2**20, 2**26


@dataclass(frozen=True)
class BackboneConfig:
    """A `BackboneConfig` holds the settings with which a backbone serves a model; lengths are in tokens.

    `draft_tokens` is the largest draft depth: 0 turns drafting off, and None means DEFAULT_DRAFT_TOKENS.
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

    def scheduler_config(self, family: ModelFamily, has_drafts: bool) -> SchedulerConfig:
        """Return the scheduler's configuration for a model of `family`; `has_drafts` says if the model can draft."""
        max_draft_tokens = DEFAULT_DRAFT_TOKENS if self.draft_tokens is None else self.draft_tokens
        # Compiled kernels compute a prompt token by token as a recurrence. Therefore the scheduler may split a prompt
        # at any token, and may save the recurrent state at any token.
        align = 1 if kernels.is_compiled(self.device) else family.config.chunk_align
        scored_logits = SCORED_LOGITS_CPU if self.device == "cpu" else SCORED_LOGITS_ELSEWHERE
        return SchedulerConfig(
            self.memory.num_slots,
            self.memory.num_blocks,
            self.memory.block_size,
            self.max_model_len,
            max_batch_tokens=self.max_batch_tokens,
            max_waiting=self.max_waiting,
            chunk_align=align,
            max_scored_tokens=max(1, scored_logits // family.config.vocab_size),
            checkpoint_align=align,
            num_checkpoint_slots=self.memory.num_checkpoint_slots,
            bytes_per_slot=self.memory.bytes_per_slot,
            bytes_per_block=self.memory.bytes_per_block,
            has_prefix_cache=self.prefix_cache,
            turn_end_ids=frozenset(family.eos_token_ids),
            max_draft_tokens=max_draft_tokens if has_drafts else 0,
        )


def build_engine(config: BackboneConfig, family: ModelFamily, experts: Experts) -> Engine:
    """Load the backbone's weights, allocate the state of its requests, and return the engine without starting it."""
    model = family.load_backbone(experts, config.dtype, config.device)
    plan = config.memory
    state = State(family.config.state_spec, plan.num_state_slots, plan.num_blocks, config.dtype, config.device)
    scheduler_config = config.scheduler_config(family, model.has_drafts)
    return Engine(
        Runner(model, state, config.device, has_drafts=scheduler_config.max_draft_tokens > 0),
        Scheduler(scheduler_config),
        family.config.vocab_size,
        family.eos_token_ids,
        outages=(ExpertsUnavailable,),
        compile_grammar=GrammarCompiler(family.checkpoint.path, family.eos_token_ids).compile,
    )
