"""Guesses at what follows, made by the model's own draft module (multi-token prediction).

The module reads, for every position, the token there and the hidden vector before it, and keeps keys and values of its
own in the request's pages. What it has not read is kept for when drafts are wanted again, so that it then guesses as
well as if it had read all along; after more than MAX_UNREAD tokens it begins anew, and sees only positions from there
on. Guesses can only be wrong, never harmful: each is verified by the model before anybody sees it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.families.nemotron_h import NemotronHConfig
from model.state import Batch, State
from services.engine.drafting.draft_depth import MAX_UNREAD
from services.engine.request import Request
from services.engine.sampling.sampler import Row, Sampler


class DraftModel(Protocol):
    """What drafting asks of a model family."""

    def draft(self, batch: Batch, hidden_TD: Tensor, state: State, /) -> Tensor:
        """Hidden vectors (T, D) that follow the batch's tokens, from those before them."""

    def logits(self, hidden_SD: Tensor, /) -> Tensor:
        """Fp32 logits (S, V)."""


def bytes_per_request(config: NemotronHConfig, num_drafts: int) -> int:
    """What a request takes beside its state where up to `num_drafts` tokens are drafted for it, in fp32.

    Hidden vectors that the module has not read, and the inputs of each recurrent layer that `commit` replays.
    """
    if not num_drafts:
        return 0
    mamba, num_recurrent = config.mamba, len(config.state_spec.recurrent)
    width = mamba.inner_dim + mamba.conv_dim + mamba.num_heads
    values = MAX_UNREAD * config.hidden_size + (num_drafts + 1) * num_recurrent * width
    return values * torch.float32.itemsize


@dataclass
class Draft:
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
        num_old = self.request.num_tokens
        return [*self.request.token_ids[self.first :], *self.new_ids[max(0, self.first - num_old) :]]

    @property
    def row(self) -> Row:
        return Row(self.request, (*self.new_ids, *self.draft_ids))


@dataclass
class Unread:
    """Hidden vectors of one request that the module has not read: those before the tokens from `first` on."""

    first: int
    rows: deque[Tensor]
    num_rows: int = 0

    @property
    def end(self) -> int:
        return self.first + self.num_rows

    def add(self, hidden_TD: Tensor) -> None:
        self.rows.append(hidden_TD[-MAX_UNREAD:].clone())  # a view would keep the whole step's
        self.first += max(0, len(hidden_TD) - MAX_UNREAD)
        self.num_rows += len(self.rows[-1])
        while self.num_rows > MAX_UNREAD:
            dropped = len(self.rows.popleft())
            self.first, self.num_rows = self.first + dropped, self.num_rows - dropped


class Drafter:
    """Drafts for the requests of one engine; `state` is shared with the model."""

    def __init__(self, model: DraftModel, state: State, sampler: Sampler, device: torch.device | str) -> None:
        self.model, self.state, self.sampler, self.device = model, state, sampler, device
        self._unread: dict[str, Unread] = {}
        self._seen: dict[str, tuple[int, int]] = {}  # by request: the positions whose keys are in its pages, from, to

    def follow(self, request: Request, first: int, hidden_TD: Tensor) -> None:
        """Notes the hidden vectors before the request's tokens from position `first` on, for when it is drafted for."""
        unread = self._unread.get(request.id)
        if unread is None or unread.end != first:
            unread = self._unread[request.id] = Unread(first, deque())
        unread.add(hidden_TD)

    def guess(self, request: Request, new_ids: tuple[int, ...], depth: int) -> Draft:
        """What `draft` needs, with all that was noted: `new_ids` end with the token before the drafts."""
        unread = self._unread.pop(request.id)
        return Draft(request, new_ids, unread.first, torch.cat(tuple(unread.rows)), depth)

    def draft(self, guesses: Sequence[Draft]) -> None:
        """Sets `draft_ids`, up to `depth` of them, of every guess."""
        hidden_TD = torch.cat([guess.hidden_TD for guess in guesses])
        read = [guess.token_ids for guess in guesses]
        lens, ids = [len(token_ids) for token_ids in read], [token for token_ids in read for token in token_ids]
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
        self._unread.pop(request.id, None)

    def _pack(self, guesses: Sequence[Draft], ids: list[int], lens: list[int], positions: list[int]) -> Batch:
        requests = [guess.request for guess in guesses]
        return Batch(
            token_ids_T=torch.tensor(ids, device=self.device),
            lens=tuple(lens),
            context_lens=tuple(positions),
            slots=tuple(request.slot_id for request in requests),
            block_tables=tuple(tuple(request.block_table) for request in requests),
            first_keys=tuple(self._seen[request.id][0] for request in requests),
        )
