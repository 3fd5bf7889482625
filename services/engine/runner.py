"""The `Runner` runs a batch: it computes hidden vectors, verifies drafts, samples tokens, and makes new drafts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from model.family import LanguageModel
from model.state import Batch, State
from services.engine.contract.token_output import TokenLogprob
from services.engine.drafting.drafter import Drafter, DraftRequest
from services.engine.request import Request
from services.engine.sampling.sampler import SampledToken, Sampler, SamplingRow, token_logprobs
from services.engine.scheduling.scheduled_batch import ScheduledBatch, StepResult

PROMPT_LOGITS_ROWS = 32  # rows whose logits are computed at once: with a vocabulary of 131,072 they take 16 MiB


class Runner:
    """A `Runner` runs batches on a device; in the engine only the runner, its sampler and its drafter touch tensors.

    The tensors of `state` are on `device`. If `has_drafts` is True and the model can draft, the runner drafts.
    """

    def __init__(
        self, model: LanguageModel, state: State, device: torch.device | str = "cpu", has_drafts: bool = True
    ) -> None:
        self.model, self.state, self.device = model, state, device
        self.sampler = Sampler()
        self.drafter = Drafter(model, state, self.sampler, device) if has_drafts and model.has_drafts else None

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> list[StepResult]:
        """Compute a batch and return one `StepResult` per request, in the order of `batch.requests`."""
        if self.drafter:
            for request in batch.preempted:
                self.drafter.release(request)
        self.state.copy_slots(batch.slot_copies)
        self.state.copy_pages(batch.page_copies)
        if not batch.requests:
            return []
        packed = self._pack(batch)
        hidden_TD = self.model.forward(packed, self.state)
        new_tokens = self._verify(batch, packed, hidden_TD)
        if packed.has_drafts:
            self.model.commit(packed, [max(0, len(tokens or ()) - 1) for tokens in new_tokens], self.state)
        drafts = self._draft(batch, packed, hidden_TD, new_tokens)
        return [
            StepResult(
                tuple(tokens or ()),
                drafts.get(i, ()),
                self._prompt_logprobs(batch, packed, hidden_TD, i),
                tokens is None,
            )
            for i, tokens in enumerate(new_tokens)
        ]

    def release(self, request: Request) -> None:
        """Delete the sampler's and the drafter's state of a request that has ended."""
        self.sampler.release(request)
        if self.drafter:
            self.drafter.release(request)

    def _verify(self, batch: ScheduledBatch, packed: Batch, hidden_TD: Tensor) -> list[list[SampledToken] | None]:
        """Return the new tokens of each request: the accepted drafts, and the token sampled after the drafts.

        The result holds one list per request. The list is empty if the request still has pending tokens. The result
        holds None instead of a list if no token could be chosen for the request.
        """
        places = [i for i in range(len(batch.requests)) if batch.catches_up(i)]
        rows = [
            SamplingRow(batch.requests[i], batch.requests[i].draft_ids[:n])
            for i in places
            for n in range(batch.num_drafts[i] + 1)
        ]
        found: list[list[SampledToken] | None] = [[] for _ in batch.requests]
        if not places:
            return found
        hidden_rows = [packed.last_rows[i] - n for i in places for n in range(batch.num_drafts[i], -1, -1)]
        sampled = self.sampler.sample(self.model.logits(hidden_TD[hidden_rows]), rows)
        ends = accumulate(batch.num_drafts[i] + 1 for i in places)
        for i, end in zip(places, ends, strict=True):
            drafts = batch.requests[i].draft_ids[: batch.num_drafts[i]]
            found[i] = accept(sampled[end - len(drafts) - 1 : end], drafts, batch.requests[i])
        return found

    def _draft(
        self, batch: ScheduledBatch, packed: Batch, hidden_TD: Tensor, new_tokens: Sequence[list[SampledToken] | None]
    ) -> dict[int, tuple[int, ...]]:
        """Return the drafts that follow `new_tokens`, by the index of the request in the batch."""
        draft_requests: dict[int, DraftRequest] = {}
        if self.drafter is None:
            return {}
        for i, tokens in enumerate(new_tokens):
            if tokens is None:
                continue
            request, start = batch.requests[i], packed.starts[i]
            num_right = batch.lens[i] - batch.num_drafts[i] + max(0, len(tokens) - 1)
            self.drafter.add_hidden(request, packed.context_lens[i] + 1, hidden_TD[start : start + num_right])
            if not tokens or tokens[-1].token_id in request.stop_ids:
                continue
            # The last token of a request is not drafted: the step that verifies the drafts before the last token also
            # samples the last token.
            depth = min(batch.draft_depths[i], request.max_len - request.num_tokens - len(tokens) - 1)
            if depth > 0:
                new_ids = tuple(token.token_id for token in tokens)
                draft_requests[i] = self.drafter.draft_request(request, new_ids, depth)
        if draft_requests:
            self.drafter.draft(list(draft_requests.values()))
        return {i: one.draft_ids for i, one in draft_requests.items()}

    def _prompt_logprobs(
        self, batch: ScheduledBatch, packed: Batch, hidden_TD: Tensor, i: int
    ) -> tuple[TokenLogprob, ...]:
        """Return the logprob of the prompt token that follows each computed token of `batch.requests[i]`.

        Return () if the request did not ask for the logprobs of its prompt.
        """
        request, start, context = batch.requests[i], packed.starts[i], packed.context_lens[i]
        num_top = request.params.prompt_logprobs
        if num_top is None or not request.scores_prompt:
            return ()
        following = request.token_ids[context + 1 : context + 1 + batch.lens[i]]
        found: list[TokenLogprob] = []
        for first in range(0, len(following), PROMPT_LOGITS_ROWS):
            ids = following[first : first + PROMPT_LOGITS_ROWS]
            logits_SV = self.model.logits(hidden_TD[start + first : start + first + len(ids)])
            found += token_logprobs(logits_SV, ids, num_top)
        return tuple(found)

    def _pack(self, batch: ScheduledBatch) -> Batch:
        """Convert the scheduler's batch to the `Batch` that the model computes."""
        token_ids: list[int] = []
        for (request, length), num_drafts in zip(batch, batch.num_drafts, strict=True):
            start = request.num_computed_tokens
            token_ids += request.token_ids[start : start + length - num_drafts]
            token_ids += request.draft_ids[:num_drafts]
        return Batch(
            token_ids_T=torch.tensor(token_ids, device=self.device),
            lens=batch.lens,
            context_lens=tuple(request.num_computed_tokens for request in batch.requests),
            slots=tuple(request.slot_id for request in batch.requests),
            block_tables=tuple(request.block_table for request in batch.requests),
            num_drafts=batch.num_drafts,
        )


def accept(
    sampled: Sequence[SampledToken | None], drafts: Sequence[int], request: Request
) -> list[SampledToken] | None:
    """Return the tokens that a step adds to a request: the accepted drafts, and the token sampled after the drafts.

    A draft is accepted if all earlier drafts were accepted and the draft equals the token sampled at its position. The
    token `sampled[n]` was drawn from the model's own logits after `drafts[:n]`. So the tokens have the same
    distribution as without drafts. The result ends after a stop token, or when the request reaches `max_len` tokens.

    An entry of `sampled` is None if no token could be chosen for it. If one of the tokens to add is None, return None.
    """
    accepted: list[SampledToken] = []
    for n, token in enumerate(sampled):
        if token is None:
            return None
        accepted.append(token)
        is_end = token.token_id in request.stop_ids or request.num_tokens + len(accepted) == request.max_len
        if is_end or n == len(drafts) or token.token_id != drafts[n]:
            break
    return accepted
