"""Guesses at what follows, made by the model's own draft module (multi-token prediction).

The module reads, for every position, the token there and the hidden vector before it, and keeps keys and values of its
own in the request's pages. A request that was not drafted for a while begins anew: its module sees the positions from
there on. Guesses can only be wrong, never harmful: each is verified by the model before anybody sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.state import Batch, State
from services.engine.request import Request
from services.engine.sampler import Row, Sampler


class DraftModel(Protocol):
    """What drafting asks of a model family."""

    def draft(self, batch: Batch, hidden_TD: Tensor, state: State, /) -> Tensor:
        """Hidden vectors (T, D) that follow the batch's tokens, from those before them."""

    def logits(self, hidden_SD: Tensor, /) -> Tensor:
        """Fp32 logits (S, V)."""


@dataclass
class Guess:
    """What one request's next drafts are made from: its newest tokens, and the hidden vector before each of them."""

    request: Request
    new_ids: tuple[int, ...]  # what this step added to `request.token_ids`, which does not hold them yet
    first: int  # position of the first token that the module reads
    hidden_TD: Tensor
    depth: int
    draft_ids: tuple[int, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """The tokens that the module reads, up to the newest."""
        return [*self.request.token_ids, *self.new_ids][self.first :]

    @property
    def row(self) -> Row:
        return Row(self.request, (*self.new_ids, *self.draft_ids))


class Drafter:
    """Drafts for the requests of one engine; `state` is shared with the model."""

    def __init__(self, model: DraftModel, state: State, sampler: Sampler, device: torch.device | str) -> None:
        self.model, self.state, self.sampler, self.device = model, state, sampler, device
        self._seen: dict[str, tuple[int, int]] = {}  # by request: the positions whose keys are in its pages, from, to

    def draft(self, guesses: Sequence[Guess]) -> None:
        """Sets `draft_ids`, up to `depth` of them, of every guess."""
        hidden_TD = torch.cat([guess.hidden_TD for guess in guesses])
        lens = [len(guess.token_ids) for guess in guesses]
        ids = [token for guess in guesses for token in guess.token_ids]
        going, positions = list(guesses), [guess.first for guess in guesses]
        for guess, length in zip(guesses, lens, strict=True):
            start, end = self._seen.get(guess.request.id, (0, 0))
            self._seen[guess.request.id] = (start if end == guess.first else guess.first, guess.first + length)
        while going:
            out_TD = self.model.draft(self._pack(going, ids, lens, positions), hidden_TD, self.state)
            last = torch.tensor(lens, device=out_TD.device).cumsum(0) - 1
            hidden_TD = out_TD[last]
            tokens = self.sampler.sample(self.model.logits(hidden_TD), [g.row for g in going], with_logprobs=False)
            positions = [position + length for position, length in zip(positions, lens, strict=True)]
            for guess, token in zip(going, tokens, strict=True):
                guess.draft_ids += () if token is None else (token.token_id,)
            goes_on = [i for i, token in enumerate(tokens) if token and len(going[i].draft_ids) < going[i].depth]
            hidden_TD = hidden_TD[goes_on]
            going, positions = [going[i] for i in goes_on], [positions[i] for i in goes_on]
            ids, lens = [guess.draft_ids[-1] for guess in going], [1] * len(going)

    def release(self, request: Request) -> None:
        self._seen.pop(request.id, None)

    def _pack(self, guesses: Sequence[Guess], ids: list[int], lens: list[int], positions: list[int]) -> Batch:
        requests = [guess.request for guess in guesses]
        return Batch(
            token_ids_T=torch.tensor(ids, device=self.device),
            lens=tuple(lens),
            context_lens=tuple(positions),
            slots=tuple(request.slot_id for request in requests),
            block_tables=tuple(tuple(request.block_table) for request in requests),
            first_keys=tuple(self._seen[request.id][0] for request in requests),
        )
