"""Decides which tokens of which requests each step computes, and owns their memory. Touches no tensor.

There is no prefill phase and no decode phase: every request has tokens to catch up with. A step first serves the
requests that lack one token, then fills the token budget with pieces of longer ones, oldest first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from services.engine.memory import IdPool
from services.engine.request import EngineOverloaded, FinishReason, Request, TokenOutput

NewTokens = Sequence[int] | None  # of one request in one step; None: the model gave nothing to choose from


@dataclass(frozen=True)
class SchedulerConfig:
    """Memory and limits. `chunk_align`: a prompt is split only at multiples of it (the model's scan chunk)."""

    num_slots: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_batch_tokens: int = 2048
    max_waiting: int = 256
    chunk_align: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        least = self.num_slots + self.chunk_align
        if self.max_batch_tokens < least:
            raise ValueError(
                f"max_batch_tokens must be at least num_slots + chunk_align = {least}, not {self.max_batch_tokens}: "
                "otherwise running requests could keep a prompt waiting for ever."
            )

    @property
    def max_len(self) -> int:
        """Tokens of the longest request: the model's context, or what all pages hold together."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


@dataclass(frozen=True)
class ScheduledBatch:
    """One step: the next `lens[i]` uncomputed tokens of `requests[i]`. May be empty."""

    requests: tuple[Request, ...]
    lens: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[Request, int]]:
        return zip(self.requests, self.lens, strict=True)


class Scheduler:
    """`schedule` and `postprocess` in turn; `add` and `abort` only between a postprocess and the next schedule."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.slots = IdPool(config.num_slots)
        self.blocks = IdPool(config.num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of admission
        self.num_preemptions = 0
        self._clock = clock
        self._in_flight: ScheduledBatch | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request; EngineOverloaded if `max_waiting` others are queued already."""
        assert self._in_flight is None
        assert request.num_prompt_tokens < request.max_len <= self.config.max_len
        if len(self.waiting) >= self.config.max_waiting:
            raise EngineOverloaded(f"{len(self.waiting)} requests are waiting, which is the most this server queues.")
        self.waiting.append(request)

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
        for request in failed:
            self.abort(request.id)
        return failed

    def schedule(self) -> ScheduledBatch:
        """Chooses the next step's tokens and reserves the memory they need."""
        assert self._in_flight is None
        self._grow_running()
        self._admit_waiting()
        self._in_flight = self._fill_budget()
        return self._in_flight

    def postprocess(self, batch: ScheduledBatch, sampled: Sequence[NewTokens]) -> list[TokenOutput]:
        """Commits a computed step: `sampled[i]` are the new tokens of `batch.requests[i]`, none if it lags behind."""
        assert batch is self._in_flight
        outputs = []
        for (request, length), token_ids in zip(batch, sampled, strict=True):
            request.num_computed_tokens += length
            assert 0 < request.num_computed_tokens <= request.num_tokens
            if token_ids is None:
                outputs.append(self._end(request, FinishReason.FAILED))
            elif token_ids:
                outputs.append(self._commit(request, token_ids))
        outputs += self._expire()
        self._in_flight = None
        return outputs

    # Memory

    def _grow_running(self) -> None:
        for request in list(self.running):
            while request.slot is not None and not self._reserve(request):
                self._preempt(self.running[-1])

    def _reserve(self, request: Request) -> bool:
        missing = self._num_missing_blocks(request)
        if can_take := self.blocks.can_take(missing):
            request.block_table += self.blocks.take(missing)
        return can_take

    def _num_missing_blocks(self, request: Request) -> int:
        return max(0, -(-request.num_tokens // self.config.block_size) - len(request.block_table))

    def _preempt(self, request: Request) -> None:
        """Takes the request's memory; its tokens stay and are computed again once it is admitted again."""
        self._release(request)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        assert request.slot is not None
        self.slots.give_back([request.slot])
        self.blocks.give_back(request.block_table)
        request.slot, request.block_table = None, []
        self.running.remove(request)

    def _drop(self, request: Request) -> None:
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._release(request)

    # Choice

    def _admit_waiting(self) -> None:
        while self.waiting and self._can_admit(self.waiting[0]):
            request = self.waiting.popleft()
            [request.slot] = self.slots.take(1)
            request.block_table = self.blocks.take(self._num_missing_blocks(request))
            self.running.append(request)
        assert self.running or not self.waiting, "memory is free and yet nothing runs"

    def _can_admit(self, request: Request) -> bool:
        # One page for each running request to grow into, or the newcomer would be preempted soon after.
        needed = self._num_missing_blocks(request) + len(self.running)
        return self.slots.can_take(1) and self.blocks.can_take(needed)

    def _fill_budget(self) -> ScheduledBatch:
        budget, requests, lens = self.config.max_batch_tokens, [], []
        for request in sorted(self.running, key=lambda r: r.num_pending > 1):
            if length := self._chunk_len(request, budget):
                requests.append(request)
                lens.append(length)
                budget -= length
        assert requests or not self.running, "every running request lacks a token"
        return ScheduledBatch(tuple(requests), tuple(lens))

    def _chunk_len(self, request: Request, budget: int) -> int:
        if request.num_pending <= budget:
            return request.num_pending
        start = request.num_computed_tokens
        return max(0, (start + budget) // self.config.chunk_align * self.config.chunk_align - start)

    # Ends

    def _commit(self, request: Request, token_ids: Sequence[int]) -> TokenOutput:
        num_before, reason = request.num_tokens, None
        for token_id in token_ids:
            if reason := request.append(token_id):
                self._release(request)
                break
        return _output(request, tuple(request.token_ids[num_before:]), reason)

    def _expire(self) -> list[TokenOutput]:
        now = self._clock()
        expired = [r for r in [*self.running, *self.waiting] if r.deadline <= now]
        return [self._end(request, FinishReason.DEADLINE) for request in expired]

    def _end(self, request: Request, reason: FinishReason) -> TokenOutput:
        self._drop(request)
        return _output(request, (), reason)


def _output(request: Request, token_ids: tuple[int, ...], reason: FinishReason | None) -> TokenOutput:
    return TokenOutput(request.id, token_ids, reason, request.num_prompt_tokens, request.num_generated)
