"""The `Drafter` drafts the next tokens with the model's own draft module (multi-token prediction, MTP).

At every position the draft module reads two inputs: the token at the position, and the model's hidden vector at the
position before. The draft module has its own keys and values in the request's pages.

While nothing is drafted for a request, the drafter keeps the hidden vectors that the draft module has not read yet.
Later drafts are then as good as if the module had read every vector at once. The drafter keeps only the last MAX_UNREAD
vectors. If older vectors were dropped, the module starts again, and sees only the positions from the first kept vector
on. A wrong draft does no harm, because the model verifies every draft before a client sees the token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.configs.model_config import ModelConfig
from model.family import LanguageModel
from model.state import Batch, State
from services.engine.drafting.draft_depth import MAX_UNREAD
from services.engine.request import Request
from services.engine.sampling.sampler import Sampler, SamplingRow


def bytes_per_request(config: ModelConfig, num_drafts: int) -> int:
    """Return the bytes of fp32 values that drafting needs for one request, in addition to the request's state.

    Up to `num_drafts` tokens are drafted for the request in a step. The values are the hidden vectors that the draft
    module has not read yet, and the inputs that `LanguageModel.commit` replays in each recurrent layer.
    """
    if not num_drafts:
        return 0
    values = MAX_UNREAD * config.hidden_size + (num_drafts + 1) * config.replay_width
    return values * torch.float32.itemsize


@dataclass
class DraftRequest:
    """A `DraftRequest` asks for the next drafts of one request, and collects them in `draft_ids`.

    The draft module reads the newest tokens of the request, each with the hidden vector of the position before.
    """

    request: Request
    new_ids: tuple[int, ...]  # tokens of this step, which `request.token_ids` does not hold yet
    first: int  # position of the first token that the draft module reads
    hidden_TD: Tensor
    depth: int
    draft_ids: tuple[int, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """Return the tokens that the draft module reads: from position `first` to the newest token."""
        num_old = self.request.num_tokens
        return [*self.request.token_ids[self.first :], *self.new_ids[max(0, self.first - num_old) :]]

    @property
    def row(self) -> SamplingRow:
        """Return the row with which the sampler chooses the next draft."""
        return SamplingRow(self.request, (*self.new_ids, *self.draft_ids))


@dataclass
class UnreadHidden:
    """An `UnreadHidden` keeps the hidden vectors of one request that the draft module has not read yet.

    The first kept vector belongs to position `first - 1`. The draft module reads it with the token at position `first`.
    """

    first: int
    rows: deque[Tensor]
    num_rows: int = 0

    @property
    def end(self) -> int:
        """Return the position after the last token for which a vector is kept."""
        return self.first + self.num_rows

    def add(self, hidden_TD: Tensor) -> None:
        """Append the hidden vectors of the next tokens, and keep only the last MAX_UNREAD vectors."""
        self.rows.append(hidden_TD[-MAX_UNREAD:].clone())  # a view would keep the hidden vectors of the whole step
        self.first += max(0, len(hidden_TD) - MAX_UNREAD)
        self.num_rows += len(self.rows[-1])
        while self.num_rows > MAX_UNREAD:
            dropped = len(self.rows.popleft())
            self.first, self.num_rows = self.first + dropped, self.num_rows - dropped


class Drafter:
    """A `Drafter` drafts tokens for the requests of one engine; it shares `state` with the model."""

    def __init__(self, model: LanguageModel, state: State, sampler: Sampler, device: torch.device | str) -> None:
        self.model, self.state, self.sampler, self.device = model, state, sampler, device
        self._unread: dict[str, UnreadHidden] = {}
        # By request id: the first position that the draft module has read, and the position after the last one.
        self._read: dict[str, tuple[int, int]] = {}

    def add_hidden(self, request: Request, first: int, hidden_TD: Tensor) -> None:
        """Keep hidden vectors for the next drafts; `hidden_TD[t]` belongs to the request's position `first - 1 + t`."""
        unread = self._unread.get(request.id)
        if unread is None or unread.end != first:
            unread = self._unread[request.id] = UnreadHidden(first, deque())
        unread.add(hidden_TD)

    def draft_request(self, request: Request, new_ids: tuple[int, ...], depth: int) -> DraftRequest:
        """Return a `DraftRequest` for `depth` drafts; `new_ids` holds the tokens that this step adds before the drafts.

        The draft request takes over the hidden vectors that were kept for the request.
        """
        unread = self._unread.pop(request.id)
        return DraftRequest(request, new_ids, unread.first, torch.cat(tuple(unread.rows)), depth)

    def draft(self, draft_requests: Sequence[DraftRequest]) -> None:
        """Set the `draft_ids` of every draft request: `depth` tokens, or fewer if the sampler can choose no token."""
        hidden_TD = torch.cat([one.hidden_TD for one in draft_requests])
        read = [one.token_ids for one in draft_requests]
        lens, ids = [len(token_ids) for token_ids in read], [token for token_ids in read for token in token_ids]
        active, positions = list(draft_requests), [one.first for one in draft_requests]
        for one, length in zip(draft_requests, lens, strict=True):
            start, end = self._read.get(one.request.id, (0, 0))
            self._read[one.request.id] = (start if end == one.first else one.first, one.first + length)
        while active:
            out_TD = self.model.draft(self._pack(active, ids, lens, positions), hidden_TD, self.state)
            last = torch.tensor(lens, device=out_TD.device).cumsum(0) - 1
            hidden_TD = out_TD[last]
            rows = [one.row for one in active]
            tokens = self.sampler.sample(self.model.logits(hidden_TD), rows, with_logprobs=False)
            positions = [position + length for position, length in zip(positions, lens, strict=True)]
            for one, token in zip(active, tokens, strict=True):
                one.draft_ids += () if token is None else (token.token_id,)
            goes_on = [i for i, token in enumerate(tokens) if token and len(active[i].draft_ids) < active[i].depth]
            hidden_TD = hidden_TD[goes_on]
            active, positions = [active[i] for i in goes_on], [positions[i] for i in goes_on]
            ids, lens = [one.draft_ids[-1] for one in active], [1] * len(active)

    def release(self, request: Request) -> None:
        """Forget the vectors and positions of a request that has ended or was preempted."""
        self._read.pop(request.id, None)
        self._unread.pop(request.id, None)

    def _pack(
        self, draft_requests: Sequence[DraftRequest], ids: list[int], lens: list[int], positions: list[int]
    ) -> Batch:
        requests = [one.request for one in draft_requests]
        return Batch(
            token_ids_T=torch.tensor(ids, device=self.device),
            lens=tuple(lens),
            context_lens=tuple(positions),
            slots=tuple(request.slot_id for request in requests),
            block_tables=tuple(request.block_table for request in requests),
            first_keys=tuple(self._read[request.id][0] for request in requests),
        )
