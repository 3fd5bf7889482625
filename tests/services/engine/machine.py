"""A `Machine` runs the scheduler's batches without a model, and fails if a request reads another request's state.

Slots and pages hold the tokens themselves instead of tensors. The next token depends only on the tokens of the
sequence. A draft is right with a probability that the test chooses.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from services.engine.contract.token_output import TokenOutput
from services.engine.request import Request
from services.engine.sampling.sampler import SampledToken
from services.engine.scheduling.scheduled_batch import ScheduledBatch, StepResult
from services.engine.scheduling.scheduler import Scheduler

VOCAB_SIZE = 1000
STOP = 0
GARBAGE = -1


def next_token(token_ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(repr(list(token_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def naive(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return up to `num_tokens` tokens of an answer; the result includes STOP if the answer reaches STOP."""
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + num_tokens and token_ids[len(prompt) :][-1:] != [STOP]:
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


class Machine:
    """A `Machine` runs steps, and checks that the slot and pages of each request hold the request's own tokens."""

    def __init__(self, scheduler: Scheduler, draft_accuracy: float = 0.7, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.draft_accuracy = draft_accuracy
        self.random = random.Random(seed)
        self.slots: dict[int, list[int]] = {}
        self.pages: dict[int, list[int]] = {}
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.num_computed = 0

    def step(self) -> ScheduledBatch:
        batch = self.scheduler.schedule()
        for output in self.scheduler.postprocess(batch, self.run(batch)):
            self.outputs.setdefault(output.request_id, []).append(output)
        return batch

    def finish(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps")

    def answer(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def run(self, batch: ScheduledBatch) -> list[StepResult]:
        for source, target in batch.slot_copies:
            self.slots[target] = list(self.slots[source])
        for source, target in batch.page_copies:
            self.pages[target] = list(self.pages[source])
        assert len({request.slot for request in batch.requests}) == len(batch.requests)
        return [self._run_one(batch, i) for i in range(len(batch.requests))]

    def _run_one(self, batch: ScheduledBatch, i: int) -> StepResult:
        request, length, num_drafts = batch.requests[i], batch.lens[i], batch.num_drafts[i]
        context_len = request.num_computed_tokens
        self._check_state(request)
        guessed = [*request.token_ids, *request.draft_ids[:num_drafts]]
        self._write(request, context_len, guessed[context_len : context_len + length])
        self.num_computed += length
        accepted: list[int] = []
        tokens: list[int] = []
        if batch.catches_up(i):
            token_ids = list(request.token_ids)
            while True:
                tokens.append(next_token(token_ids))
                token_ids.append(tokens[-1])
                is_end = tokens[-1] in request.stop_ids or len(token_ids) == request.max_len
                if is_end or len(accepted) == num_drafts or request.draft_ids[len(accepted)] != tokens[-1]:
                    break
                accepted.append(tokens[-1])
        assert request.slot is not None
        num_right = context_len + length - num_drafts + len(accepted)
        self.slots[request.slot] = [*request.token_ids, *accepted][:num_right]
        drafts = self._draft(request, tokens, batch.draft_depths[i]) if tokens else ()
        return StepResult(tuple(SampledToken(token, None) for token in tokens), drafts)

    def _check_state(self, request: Request) -> None:
        assert request.slot is not None
        computed = request.token_ids[: request.num_computed_tokens]
        if computed:
            assert self.slots[request.slot] == computed
        size = self.scheduler.config.block_size
        for start in range(0, len(computed), size):
            page = self.pages[request.block_table[start // size]]
            assert page[: len(computed) - start] == computed[start : start + size]

    def _write(self, request: Request, position: int, token_ids: Sequence[int]) -> None:
        size = self.scheduler.config.block_size
        for token_id in token_ids:
            page = self.pages.setdefault(request.block_table[position // size], [GARBAGE] * size)
            page[position % size] = token_id
            position += 1

    def _draft(self, request: Request, tokens: Sequence[int], depth: int) -> tuple[int, ...]:
        token_ids, drafts = [*request.token_ids, *tokens], list[int]()
        # A real draft module writes its own KV into the request's pages, at the position before each drafted token.
        self._write(request, len(token_ids) - 1, [GARBAGE] * max(0, depth - 1))
        for _ in range(depth):
            is_right = self.random.random() < self.draft_accuracy
            drafts.append(next_token([*token_ids, *drafts]) if is_right else self.random.randrange(VOCAB_SIZE))
        return tuple(drafts)
