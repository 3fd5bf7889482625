"""Runs one scheduled step through the model and samples the requests that have caught up."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from model.state import Batch, State
from services.engine.request import Request
from services.engine.sampler import Row, Sampler
from services.engine.scheduler import ScheduledBatch, StepResult


class LanguageModel(Protocol):
    """What the engine asks of a model family."""

    def forward(self, batch: Batch, state: State, /) -> Tensor:
        """Hidden vectors (T, D) of the batch's tokens; reads and writes the requests' state."""

    def logits(self, hidden_SD: Tensor, /) -> Tensor:
        """Fp32 logits (S, V)."""


class Runner:
    """The only part of the engine that touches tensors. `device` is where the state lies."""

    def __init__(self, model: LanguageModel, state: State, device: torch.device | str = "cpu") -> None:
        self.model, self.state, self.device = model, state, device
        self.sampler = Sampler()

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> list[StepResult]:
        """New tokens of each request of the batch: none for a request that still lags behind."""
        self._copy(batch)
        if not batch.requests:
            return []
        packed = self._pack(batch)
        hidden_TD = self.model.forward(packed, self.state)
        caught_up = [i for i in range(len(batch.requests)) if batch.catches_up(i)]
        results = [StepResult()] * len(batch.requests)
        if caught_up:
            logits_SV = self.model.logits(hidden_TD[[packed.last_rows[i] for i in caught_up]])
            sampled = self.sampler.sample(logits_SV, [Row(batch.requests[i]) for i in caught_up])
            for i, token in zip(caught_up, sampled, strict=True):
                results[i] = StepResult(failed=True) if token is None else StepResult((token,))
        return results

    def release(self, request: Request) -> None:
        """Forgets what is noted about a request that has ended."""
        self.sampler.release(request)

    def _copy(self, batch: ScheduledBatch) -> None:
        for source, target in batch.slot_copies:
            for tensors in self.state.slots.values():
                for tensor in tensors:
                    tensor[target] = tensor[source]
        size = self.state.spec.block_size
        for source, target in batch.page_copies:
            for pages in self.state.pages.values():
                pages[target * size : (target + 1) * size] = pages[source * size : (source + 1) * size]

    def _pack(self, batch: ScheduledBatch) -> Batch:
        token_ids: list[int] = []
        for request, length in batch:
            start = request.num_computed_tokens
            token_ids += request.token_ids[start : start + length]
        return Batch(
            token_ids_T=torch.tensor(token_ids, device=self.device),
            lens=batch.lens,
            context_lens=tuple(request.num_computed_tokens for request in batch.requests),
            slots=tuple(_slot(request) for request in batch.requests),
            block_tables=tuple(tuple(request.block_table) for request in batch.requests),
        )


def _slot(request: Request) -> int:
    assert request.slot is not None, "a scheduled request has a slot"
    return request.slot
