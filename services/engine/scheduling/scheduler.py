"""The `Scheduler` decides which tokens of which requests each step computes; it touches no tensor.

The scheduler also decides which requests hold memory. There is no prefill phase and no decode phase: every request
has pending tokens and perhaps drafts, and a step computes some of these tokens. A step fills its token budget in this
order:

1. Requests with one pending token: first the pending token of each request, then the drafts of these requests.
2. The first prompt: up to half of the remaining budget, so that the prompt advances even if many requests arrive.
3. Waiting requests and shorter prompts, so that short requests need not wait for a long prompt.

Requests with the lowest level are served first. Of requests with the same level, the oldest request is served first.
The level of a request is its priority number, lowered by the time that the request has waited.

A preempted request keeps its tokens, and its state is computed again later. If the running requests need more memory
than there is, the last request in serving order is preempted. Requests of lower priority are also preempted so that a
waiting request can start.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.engine.contract.token_output import FinishReason, TokenLogprob, TokenOutput
from services.engine.drafting.draft_depth import REQUEST_KEPT, DraftingState
from services.engine.request import Request, serving_order
from services.engine.scheduling.preemption import Shortage, choose_preempted, preemption_candidates
from services.engine.scheduling.prefix_cache import CacheConfig, CachedPrefix
from services.engine.scheduling.scheduled_batch import BatchBuilder, ScheduledBatch, StepResult
from services.engine.scheduling.state_memory import StateMemory
from services.engine.scheduling.waiting_queue import WaitingQueue


@dataclass(frozen=True)
class SchedulerConfig:
    """A `SchedulerConfig` holds the scheduler's limits and the size of the memory for requests; lengths are in tokens.

    - `chunk_align`: a prompt is split only at multiples of `chunk_align`, which is the chunk of the model's scan.
    - `max_scored_tokens`: number of prompt tokens whose logprobs a step may compute while other requests need the step.
      One chunk of `chunk_align` tokens is always allowed. 0 means no limit.
    - `num_checkpoint_slots`: number of slots for saved states, in addition to the slots of running requests.
    - `checkpoint_align`: states within a prompt are saved only at multiples of `checkpoint_align`.
    - `checkpoint_interval`: the largest number of tokens between two saved states of a prompt.
    - `bytes_per_slot`, `bytes_per_block`: the size of a slot and of a KV page, from which the prefix cache computes the
      value of saved states. `bytes_per_slot` is 0 for a model without recurrent state.
    """

    num_slots: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_batch_tokens: int = 2048
    max_waiting: int = 256
    chunk_align: int = 1
    max_scored_tokens: int = 0
    checkpoint_align: int = 1
    checkpoint_interval: int = 1024
    num_checkpoint_slots: int = 0
    bytes_per_slot: int = 1
    bytes_per_block: int = 1
    has_prefix_cache: bool = True
    turn_end_ids: frozenset[int] = frozenset()
    max_draft_tokens: int = 0

    def __post_init__(self) -> None:
        can_be_0 = {"num_checkpoint_slots", "bytes_per_slot", "bytes_per_block", "max_draft_tokens"}
        can_be_0 |= {"has_prefix_cache", "max_scored_tokens"}
        for name, value in vars(self).items():
            least = 0 if name in can_be_0 else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}.")
        least = self.num_slots + self.chunk_align
        if self.max_batch_tokens < least:
            raise ValueError(
                f"max_batch_tokens must be at least num_slots + chunk_align = {least}, not {self.max_batch_tokens}: "
                "otherwise running requests could keep a prompt waiting for ever."
            )

    @property
    def max_len(self) -> int:
        """Return the largest length of a request: the model's context, or fewer tokens if the pages hold fewer."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def cache(self) -> CacheConfig:
        """Return the settings of the prefix cache."""
        return CacheConfig(
            self.block_size,
            self.bytes_per_slot,
            self.bytes_per_block,
            self.checkpoint_align,
            self.checkpoint_interval,
            self.turn_end_ids,
            self.has_prefix_cache,
        )


class Scheduler:
    """A `Scheduler` plans the steps of one engine: `schedule` chooses a batch, and `postprocess` commits its results.

    The caller calls `schedule` and `postprocess` alternately. `add` and `abort` may be called only after a call of
    `postprocess` and before the next call of `schedule`.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.memory = StateMemory(config.num_slots + config.num_checkpoint_slots, config.num_blocks, config.cache)
        self.waiting = WaitingQueue(config.max_waiting)
        self.running: list[Request] = []  # running requests, in serving order like the waiting queue
        self.drafting = DraftingState(config.max_draft_tokens)
        self.num_preemptions = self.num_prompt_tokens = self.num_generated_tokens = 0
        self._clock = clock
        self._in_flight: ScheduledBatch | None = None
        self._batch = BatchBuilder(0)
        self._began_at = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request; raise EngineOverloaded if the queue is full and the request is not resumed."""
        assert self._in_flight is None
        assert request.num_tokens < request.max_len <= self.config.max_len
        self.waiting.add(request, self._clock())

    def abort(self, request_id: str) -> None:
        """Remove a request and free its slot and pages; do nothing if the request has already ended."""
        assert self._in_flight is None
        for request in [*self.running, *self.waiting]:
            if request.id == request_id:
                self._drop(request)

    def abort_step(self) -> list[Request]:
        """Remove and return the requests of the step in flight, or all requests if `schedule` made no batch."""
        batch, self._in_flight = self._in_flight, None
        failed = list(batch.requests) if batch else [*self.running, *self.waiting]
        for checkpoint in self._batch.saved:
            self.memory.cache.checkpoints.evict(checkpoint, is_valid=False)  # the state may not have been copied
        for request in failed:
            self._drop(request, is_intact=False)
        return failed

    def schedule(self) -> ScheduledBatch:
        """Choose the tokens of the next step, and reserve slots and pages for the tokens."""
        assert self._in_flight is None
        self._began_at = self._clock()
        self._batch = BatchBuilder(self.config.max_batch_tokens, self._scored_budget())
        self.waiting.age(self._began_at)
        self.memory.save_due(self.running, self._batch)
        self._grow_running()
        self._fill_budget()
        self._choose_draft_depths()
        self._in_flight = self._batch.build()
        return self._in_flight

    def postprocess(self, batch: ScheduledBatch, results: Sequence[StepResult]) -> list[TokenOutput]:
        """Commit the results of a step and return the step's outputs; `results[i]` belongs to `batch.requests[i]`."""
        assert batch is self._in_flight
        self._note_time(batch)
        outputs = []
        for i, (request, result) in enumerate(zip(batch.requests, results, strict=True)):
            if result.failed:
                outputs.append(self._end(request, FinishReason.FAILED))
                continue
            assert batch.catches_up(i) == bool(result.tokens)
            num_drafts, num_accepted = batch.num_drafts[i], max(0, len(result.tokens) - 1)
            num_new = batch.lens[i] - num_drafts + num_accepted
            request.num_computed_tokens += num_new
            request.num_unread = 0 if batch.draft_depths[i] and result.tokens else request.num_unread + num_new
            self._note_drafts(request, num_drafts, num_accepted)
            if not request.num_generated:
                request.prompt_logprobs += result.prompt_logprobs
            if result.tokens:
                outputs.append(self._commit(request, result))
        outputs += self._expire()
        self._in_flight = None
        return outputs

    # Memory of running requests

    def _grow_running(self) -> None:
        """Reserve pages for the pending tokens of running requests; if pages are lacking, preempt the last requests."""
        for request in list(self.running):
            while request.slot is not None and not self.memory.reserve(request, request.num_tokens):
                self._preempt(self.running[-1])

    def _preempt(self, request: Request) -> None:
        """Take a request's slot and pages, and put the request back into the queue.

        The request keeps its tokens. The tokens are computed again after the request has been admitted again.
        """
        self._batch.remove(request)
        self._batch.preempted.append(request)
        self._release(request)
        request.num_computed_tokens, request.draft_ids, request.num_unread = 0, (), 0
        if not request.num_generated:
            request.prompt_logprobs.clear()
        self.waiting.put_back(request, self._began_at)
        self.num_preemptions += 1

    def _release(self, request: Request, is_intact: bool = True) -> None:
        self.memory.release(request, is_intact)
        self.running.remove(request)

    def _drop(self, request: Request, is_intact: bool = True) -> None:
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._release(request, is_intact)

    # Choice of tokens

    def _fill_budget(self) -> None:
        lagging = self._lagging()
        current = [request for request in self.running if request.num_pending == 1]
        for request in current:
            self._batch.add(request, 1)
        spare = self._batch.budget - (self.config.chunk_align if lagging or self.waiting else 0)
        for request in current:
            spare -= self._add_drafts(request, spare)
        if lagging:
            self._compute_more(lagging[0], self._share(lagging[0]))
        self._admit_waiting()
        for request in sorted(self._lagging(), key=lambda request: (request.level, request.num_pending)):
            self._compute_more(request, self._batch.budget)
        assert self._batch.lens or not self.has_work, "requests have work to do, but the batch is empty"

    def _add_drafts(self, request: Request, spare: int) -> int:
        """Add up to `spare` drafts of a request to the batch, and return the number of added drafts."""
        most = min(len(request.draft_ids), spare, request.num_after_next)
        num_drafts = most if most > 0 and self.memory.reserve(request, request.num_tokens + most) else 0
        if num_drafts:
            self._batch.add(request, num_drafts, num_drafts)
        return num_drafts

    def _lagging(self) -> list[Request]:
        """Return the running requests with several pending tokens that are not all in the batch yet."""
        planned = self._batch.lens
        return [request for request in self.running if request.num_pending > max(1, planned.get(request, 0))]

    def _share(self, request: Request) -> int:
        """Return the number of tokens of the remaining budget that the request may use.

        If another request of the same or a lower level has tokens to compute, the number is half of the remaining
        budget, but at least `chunk_align`. Otherwise the number is the whole remaining budget.
        """
        others = [other for other in (*self.waiting, *self._lagging()) if other is not request]
        is_shared = any(other.level <= request.level for other in others)
        return max(self._batch.budget // 2, self.config.chunk_align) if is_shared else self._batch.budget

    def _scored_budget(self) -> int:
        """Return the number of prompt tokens whose logprobs the next step may compute.

        There is no limit if all requests want such logprobs: larger chunks are faster, and delay no other request.
        """
        most = self.config.max_scored_tokens
        others = any(not request.scores_prompt for request in (*self.running, *self.waiting))
        return max(most, self.config.chunk_align) if most and others else self.config.max_batch_tokens

    def _compute_more(self, request: Request, most: int) -> None:
        """Add up to `most` tokens of a prompt; end at its next checkpoint, its end or a multiple of `chunk_align`."""
        most = min(most, self._batch.budget_of(request))
        start = request.num_computed_tokens + self._batch.lens.get(request, 0)
        end = request.due_checkpoints[0] if request.due_checkpoints else request.num_tokens
        align = self.config.chunk_align
        length = end - start if end - start <= most else (start + most) // align * align - start
        if length > 0:
            self._batch.add(request, length)

    def _choose_draft_depths(self) -> None:
        """Choose how many tokens to draft for each request whose pending tokens are all in the batch; reserve pages.

        Drafting needs pages, because the draft module writes KV at the positions of the new drafts.
        """
        batch, requests = self._batch, self._batch.catching_up
        if not self.config.max_draft_tokens or not requests:
            return
        num_other_rows = sum(batch.lens.values()) - sum(batch.lens[request] for request in requests)
        allowed = [max(0, request.num_after_next - 1) for request in requests]
        depths = self.drafting.depths([request.acceptance for request in requests], num_other_rows, allowed)
        for request, depth in zip(requests, depths, strict=True):
            num_tokens = request.num_tokens + batch.num_drafts[request] + depth
            if depth and self.memory.reserve(request, num_tokens):
                batch.draft_depths[request] = depth
        self.drafting = self.drafting.chosen(list(batch.draft_depths.values()))

    # Admission of waiting requests

    def _admit_waiting(self) -> None:
        num_held = 0  # requests at the front of the queue that wait until a state is saved
        while num_held < len(self.waiting):
            request = self.waiting[num_held]
            candidates = preemption_candidates(request, self.running)
            is_full = self._batch.budget < 1 or len(self.running) + num_held >= self.config.num_slots
            if is_full and not candidates:
                break
            prefix = self.memory.cache.look_up(request)
            if self.memory.cache.will_be_saved(request, prefix, self.running):
                num_held += 1
                continue
            shortage = self._shortage(request, prefix, num_held)
            if not shortage.is_over:
                num_users, reused = self.memory.pages.num_users, set(prefix.pages)
                preempted = choose_preempted(candidates, shortage, self._batch.lens, num_users, reused)
                if not preempted:
                    break
                for other in preempted:
                    self._preempt(other)
                prefix = self.memory.cache.look_up(request)  # states of preempted requests may be reusable
            self._start(request, prefix)

    def _shortage(self, request: Request, prefix: CachedPrefix, num_held: int) -> Shortage:
        return Shortage(
            len(self.running) + num_held + 1 - self.config.num_slots,
            # Leave one page for each running request to grow into. Otherwise the newcomer would soon be preempted.
            self.memory.num_pages_short(request, prefix) + len(self.running),
            min(self.config.chunk_align, request.num_tokens - prefix.length) - self._batch.budget,
        )

    def _start(self, request: Request, prefix: CachedPrefix) -> None:
        self.waiting.start(request, self._began_at)
        insort(self.running, request, key=serving_order)
        self.memory.admit(request, prefix, self._batch)
        if request.first_scheduled_at is None:
            request.first_scheduled_at = self._began_at
        self._batch.num_started += 1
        self._compute_more(request, self._share(request))

    # End of requests

    def _commit(self, request: Request, result: StepResult) -> TokenOutput:
        """Append the sampled tokens to a request; if the request ends with these tokens, release its slot and pages."""
        num_before, reason = request.num_tokens, None
        for sampled in result.tokens:
            assert reason is None, "tokens were sampled beyond the request's end"
            reason = request.append(sampled.token_id)
        request.draft_ids = () if reason else result.draft_ids
        if request.first_token_at is None:
            request.first_token_at = self._clock()
            self.num_prompt_tokens += request.num_prompt_tokens
        self.num_generated_tokens += len(result.tokens)
        if reason:
            self._release(request)
        return _output(request, num_before, reason, [s.logprob for s in result.tokens if s.logprob is not None])

    def _expire(self) -> list[TokenOutput]:
        now = self._clock()
        expired = [r for r in [*self.running, *self.waiting] if r.deadline <= now]
        return [self._end(request, FinishReason.DEADLINE) for request in expired]

    def _end(self, request: Request, reason: FinishReason) -> TokenOutput:
        self._drop(request, is_intact=reason is not FinishReason.FAILED)
        return _output(request, request.num_tokens, reason, ())

    # Measurements

    def _note_drafts(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        if num_drafts:
            request.acceptance = request.acceptance.observe(num_drafts, num_accepted, REQUEST_KEPT)
            self.drafting = self.drafting.verified(num_drafts, num_accepted)

    def _note_time(self, batch: ScheduledBatch) -> None:
        seconds = self._clock() - self._began_at
        self.waiting.note_step(self._batch.num_started, seconds)
        if batch.requests:
            self.drafting = self.drafting.timed(batch.shape, seconds)


def _output(
    request: Request, num_before: int, reason: FinishReason | None, logprobs: Sequence[TokenLogprob]
) -> TokenOutput:
    """Return the output with all tokens of the request after the first `num_before` tokens."""
    is_first = num_before == request.num_prompt_tokens and request.num_generated > 0
    has_prompt_logprobs = is_first and request.params.prompt_logprobs is not None
    return TokenOutput(
        request.id,
        tuple(request.token_ids[num_before:]),
        reason,
        request.num_prompt_tokens,
        request.num_generated,
        tuple(logprobs),
        (None, *request.prompt_logprobs) if has_prompt_logprobs else (),
        request.num_cached,
        request.cache_reason,
        request.queued_s,
    )
