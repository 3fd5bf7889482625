"""Runs one scheduled step through the model and samples the requests that have caught up."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from model.state import Batch, State
from services.engine.request import Request
from services.engine.sampler import Row, Sampler
from services.engine.scheduler import NewTokens, ScheduledBatch


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
    def run(self, batch: ScheduledBatch) -> list[NewTokens]:
        """New tokens of each request of the batch: none for a request that still lags behind."""
        if not batch.requests:
            return []
        packed = self._pack(batch)
        hidden_TD = self.model.forward(packed, self.state)
        caught_up = [i for i, (request, length) in enumerate(batch) if length == request.num_pending]
        new_tokens: list[NewTokens] = [()] * len(batch.requests)
        if caught_up:
            logits_SV = self.model.logits(hidden_TD[[packed.last_rows[i] for i in caught_up]])
            sampled = self.sampler.sample(logits_SV, [Row(batch.requests[i]) for i in caught_up])
            for i, token in zip(caught_up, sampled, strict=True):
                new_tokens[i] = None if token is None else (token.token_id,)
        return new_tokens

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
