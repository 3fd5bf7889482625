"""Decides which tokens of which requests each step computes, and owns their memory. Touches no tensor.

There is no prefill phase and no decode phase: every request has tokens to catch up with, drafts included. A step first
serves the requests that lack one token, then their drafts, then fills the token budget with pieces of longer ones and
with requests that wait: lowest level first (priority, less what waiting gained), then oldest. The first prompt has half
of that budget, so that it ends whatever comes; requests that wait and shorter prompts have the rest, so that none waits
for a long one. A request that has to make room keeps its tokens: the last of those that run where their own pages are
not enough, and those of lower priority than one that waits.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence

from services.engine.contract.errors import EngineOverloaded
from services.engine.contract.token_output import FinishReason, TokenLogprob, TokenOutput
from services.engine.drafting.draft_depth import REQUEST_KEPT, DraftingState
from services.engine.memory import IdPool, PagePool
from services.engine.preemption import Shortage, lower_ones, make_way
from services.engine.prefix_cache import PrefixCache, Start
from services.engine.request import Request
from services.engine.scheduler_config import SchedulerConfig
from services.engine.step import ScheduledBatch, StepPlan, StepResult
from services.engine.waiting import StartRate, age, begin_to_wait, end_to_wait

HEAD_START = 1 << 62  # more than requests ever arrive


class Scheduler:
    """`schedule` and `postprocess` in turn; `add` and `abort` only between a postprocess and the next schedule."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.slots = IdPool(config.num_slots + config.num_checkpoint_slots)
        self.blocks = PagePool(config.num_blocks)
        self.cache = PrefixCache(config.cache, self.slots, self.blocks)
        self.waiting: list[Request] = []  # both in the order in which they are served
        self.running: list[Request] = []
        self.drafting = DraftingState(config.max_draft_tokens)
        self.num_preemptions = self.num_prompt_tokens = self.num_generated_tokens = 0
        self._clock = clock
        self._num_added = 0
        self._start_rate = StartRate()
        self._in_flight: ScheduledBatch | None = None
        self._plan = StepPlan(0)
        self._began_at = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_slots_taken(self) -> int:
        """By requests; the prefix cache's come on top and are theirs to take."""
        return self.slots.num_taken - self.cache.num_slots

    def add(self, request: Request) -> None:
        """Queues a request; EngineOverloaded if `max_waiting` others are queued already.

        One that is resumed was accepted before: it is not refused, and it is served like those that run already. So
        what may wait beyond the bound is what the engines that are gone had accepted, each within its own.
        """
        assert self._in_flight is None
        assert request.num_tokens < request.max_len <= self.config.max_len
        if (overload := self.overload) and not request.is_resumed:
            raise overload
        self._num_added += 1
        request.arrival = self._num_added - (HEAD_START if request.is_resumed else 0)
        begin_to_wait(request, self._clock())
        insort(self.waiting, request, key=_order)

    @property
    def overload(self) -> EngineOverloaded | None:
        """What `add` would refuse another request with."""
        if len(self.waiting) < self.config.max_waiting:
            return None
        sentence = f"{len(self.waiting)} requests are waiting, which is the most this server queues."
        return EngineOverloaded(sentence, self.retry_after)

    @property
    def retry_after(self) -> int:
        """Seconds in which half of those that wait will have started, at the rate of late."""
        return self._start_rate.retry_after(len(self.waiting))

    def abort(self, request_id: str) -> None:
        """Forgets a request and frees its memory; one that has already ended is left alone."""
        assert self._in_flight is None
        for request in [*self.running, *self.waiting]:
            if request.id == request_id:
                self._drop(request)

    def abort_step(self) -> list[Request]:
        """Forgets the requests of the step in flight, or every request if the step failed before it had any."""
        batch, self._in_flight = self._in_flight, None
        failed = list(batch.requests) if batch else [*self.running, *self.waiting]
        for checkpoint in self._plan.saved:
            self.cache.evict(checkpoint, is_valid=False)  # perhaps it was never copied
        for request in failed:
            self._drop(request, is_intact=False)
        return failed

    def schedule(self) -> ScheduledBatch:
        """Chooses the next step's tokens and reserves the memory they need."""
        assert self._in_flight is None
        self._began_at = self._clock()
        self._plan = StepPlan(self.config.max_batch_tokens)
        age(self.waiting, self._began_at)
        self.waiting.sort(key=_order)
        self._save_due()
        self._grow_running()
        self._fill_budget()
        self._in_flight = self._batch()
        return self._in_flight

    def postprocess(self, batch: ScheduledBatch, results: Sequence[StepResult]) -> list[TokenOutput]:
        """Commits a computed step: `results[i]` is that of `batch.requests[i]`."""
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

    # Memory

    def _save_due(self) -> None:
        for request in self.running:
            if request.due_checkpoints and request.due_checkpoints[0] == request.num_computed_tokens:
                del request.due_checkpoints[0]
                if saved := self.cache.save_copy(request):
                    self._plan.saved.append(saved)
                    if saved.slot is not None:
                        self._plan.slot_copies.append((request.slot_id, saved.slot))

    def _grow_running(self) -> None:
        for request in list(self.running):
            while request.slot is not None and not self._reserve(request, request.num_tokens):
                self._preempt(self.running[-1])

    def _reserve(self, request: Request, num_tokens: int) -> bool:
        missing = max(0, -(-num_tokens // self.config.block_size) - len(request.block_table))
        if can_take := self.cache.can_free_pages(missing):
            self.cache.free_pages(missing)
            request.block_table += self.blocks.take(missing)
        return can_take

    def _preempt(self, request: Request) -> None:
        """Takes the request's memory; its tokens stay and are computed again once it is admitted again."""
        self._plan.remove(request)
        self._plan.preempted.append(request)
        self._release(request)
        request.num_computed_tokens, request.draft_ids, request.num_unread = 0, (), 0
        if not request.num_generated:
            request.prompt_logprobs.clear()
        begin_to_wait(request, self._began_at)
        insort(self.waiting, request, key=_order)
        self.num_preemptions += 1

    def _release(self, request: Request, is_intact: bool = True) -> None:
        """`is_intact`: the state is that of the computed tokens, and worth keeping."""
        if is_intact:
            self.cache.take_over(request)
        else:
            self.slots.give_back([request.slot_id])
            self.blocks.give_back(request.block_table)
        request.slot, request.block_table = None, []
        self.running.remove(request)

    def _drop(self, request: Request, is_intact: bool = True) -> None:
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._release(request, is_intact)

    # Choice

    def _fill_budget(self) -> None:
        lagging = self._lagging()
        current = [request for request in self.running if request.num_pending == 1]
        for request in current:
            self._plan.add(request, 1)
        spare = self._plan.budget - (self.config.chunk_align if lagging or self.waiting else 0)
        for request in current:
            spare -= self._add_drafts(request, spare)
        if lagging:
            self._compute_more(lagging[0], self._share(lagging[0]))
        self._admit_waiting()
        for request in sorted(self._lagging(), key=lambda request: (request.level, request.num_pending)):
            self._compute_more(request, self._plan.budget)
        assert self._plan.lens or not self.has_work, "there is work and yet nothing runs"

    def _add_drafts(self, request: Request, spare: int) -> int:
        most = min(len(request.draft_ids), spare, self._num_more(request))
        num_drafts = most if most > 0 and self._reserve(request, request.num_tokens + most) else 0
        if num_drafts:
            self._plan.add(request, num_drafts, num_drafts)
        return num_drafts

    def _num_more(self, request: Request) -> int:
        """Tokens that may follow the next one."""
        return request.max_len - 1 - request.num_tokens

    def _lagging(self) -> list[Request]:
        """Running requests with more to compute than a token, and than this step does so far."""
        planned = self._plan.lens
        return [request for request in self.running if request.num_pending > max(1, planned.get(request, 0))]

    def _share(self, request: Request) -> int:
        """Of the budget that is left: half, while others of this level or a lower one are to be computed too."""
        others = [other for other in (*self.waiting, *self._lagging()) if other is not request]
        is_shared = any(other.level <= request.level for other in others)
        return max(self._plan.budget // 2, self.config.chunk_align) if is_shared else self._plan.budget

    def _compute_more(self, request: Request, most: int) -> None:
        most = min(most, self._plan.budget)
        start = request.num_computed_tokens + self._plan.lens.get(request, 0)
        end = request.due_checkpoints[0] if request.due_checkpoints else request.num_tokens
        align = self.config.chunk_align
        length = end - start if end - start <= most else (start + most) // align * align - start
        if length > 0:
            self._plan.add(request, length)

    def _admit_waiting(self) -> None:
        num_held = 0
        while num_held < len(self.waiting):
            request = self.waiting[num_held]
            lower = lower_ones(request, self.running)
            is_full = self._plan.budget < 1 or len(self.running) + num_held >= self.config.num_slots
            if is_full and not lower:
                break
            start = self.cache.look_up(request)
            if self.cache.is_on_its_way(request, start, self.running):
                num_held += 1
                continue
            lack = self._lack(request, start, num_held)
            if not lack.is_over:
                preempted = make_way(lower, lack, self._plan.lens, self.blocks.num_users, set(start.pages))
                if not preempted:
                    break
                for other in preempted:
                    self._preempt(other)
                start = self.cache.look_up(request)  # what they leave behind may be of use
            self._start(request, start)

    def _lack(self, request: Request, start: Start, num_held: int) -> Shortage:
        # One page for each running request to grow into, or the newcomer would be preempted soon after.
        num_missing = -(-request.num_tokens // self.config.block_size) - len(start.pages) + len(self.running)
        num_woken = sum(self.blocks.is_idle(page) for page in start.pages)
        return Shortage(
            len(self.running) + num_held + 1 - self.config.num_slots,
            num_missing + num_woken - self.blocks.num_free - self.blocks.num_idle,
            min(self.config.chunk_align, request.num_tokens - start.length) - self._plan.budget,
        )

    def _start(self, request: Request, start: Start) -> None:
        self.waiting.remove(request)
        insort(self.running, request, key=_order)
        self.blocks.share(start.pages)
        request.block_table = list(start.pages)
        self.cache.begin(request, start)
        self.cache.free_slot(rather_not=start.checkpoint)
        [request.slot] = self.slots.take(1)
        is_reserved = self._reserve(request, request.num_tokens)
        assert is_reserved
        if start.checkpoint and start.checkpoint.slot not in (None, request.slot):
            self._plan.slot_copies.append((start.checkpoint.slot, request.slot))
        if start.checkpoint and start.checkpoint.tail_page is not None:
            self._plan.page_copies.append((start.checkpoint.tail_page, request.block_table[len(start.pages)]))
        request.num_computed_tokens = start.length
        end_to_wait(request, self._began_at)
        if request.first_scheduled_at is None:
            request.first_scheduled_at = self._began_at
        self._plan.num_started += 1
        self._compute_more(request, self._share(request))

    def _batch(self) -> ScheduledBatch:
        plan = self._plan
        requests = tuple(plan.lens)
        num_drafts = tuple(plan.num_drafts[request] for request in requests)
        return ScheduledBatch(
            requests,
            tuple(plan.lens.values()),
            num_drafts,
            self._depths(requests, num_drafts),
            tuple(plan.slot_copies),
            tuple(plan.page_copies),
            tuple(plan.preempted),
        )

    def _depths(self, requests: Sequence[Request], num_drafts: Sequence[int]) -> tuple[int, ...]:
        """Of those that catch up in this step; drafting writes KV beyond the drafts that are being verified."""
        lens = self._plan.lens
        places = [i for i, request in enumerate(requests) if lens[request] - num_drafts[i] == request.num_pending]
        if not self.config.max_draft_tokens or not places:
            return (0,) * len(requests)
        num_other_rows = sum(lens[request] for i, request in enumerate(requests) if i not in places)
        allowed = [max(0, self._num_more(requests[i]) - 1) for i in places]
        depths = [0] * len(requests)
        acceptances = [requests[i].acceptance for i in places]
        for i, depth in zip(places, self.drafting.depths(acceptances, num_other_rows, allowed), strict=True):
            if depth and self._reserve(requests[i], requests[i].num_tokens + num_drafts[i] + depth):
                depths[i] = depth
        self.drafting = self.drafting.chosen(depths)
        return tuple(depths)

    # Ends

    def _commit(self, request: Request, result: StepResult) -> TokenOutput:
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
        self._start_rate = self._start_rate.after_step(self._plan.num_started, seconds)
        if batch.requests:
            self.drafting = self.drafting.timed(batch.shape, seconds)


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _output(
    request: Request, num_before: int, reason: FinishReason | None, logprobs: Sequence[TokenLogprob]
) -> TokenOutput:
    is_first = num_before == request.num_prompt_tokens and request.num_generated > 0
    wants_prompt = is_first and request.params.prompt_logprobs is not None
    return TokenOutput(
        request.id,
        tuple(request.token_ids[num_before:]),
        reason,
        request.num_prompt_tokens,
        request.num_generated,
        tuple(logprobs),
        (None, *request.prompt_logprobs) if wants_prompt else (),
        request.num_cached,
        request.cache_reason,
        request.queued_s,
    )
