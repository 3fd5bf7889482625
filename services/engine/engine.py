"""The engine: one thread that steps, and an asynchronous stream of tokens for each request."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar, SamplingParams
from services.engine.contract.token_output import FinishReason, TokenOutput
from services.engine.grammar.grammar_pool import GrammarPool
from services.engine.request import Request
from services.engine.runner import Runner
from services.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

UNHEALTHY_AFTER = 3  # failed steps in a row
Item = TokenOutput | Exception


@dataclass(frozen=True)
class TokenStream:
    """Where a request's items go; the queue belongs to `loop`'s thread."""

    request: Request
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item]


@dataclass(frozen=True)
class EngineStats:
    """Slots and pages "taken" are running requests'; "cached" ones are the prefix cache's, to be had on demand."""

    num_running: int
    num_waiting: int
    num_slots: int
    num_blocks: int
    num_slots_taken: int
    num_blocks_taken: int
    num_slots_cached: int
    num_blocks_cached: int
    num_preemptions: int
    num_steps: int
    num_failed_steps: int
    num_refused: int  # because too many were waiting
    num_prompt_tokens: int  # of requests that got their first token
    num_generated_tokens: int
    num_cached_tokens: int
    num_checkpoints: int
    num_evictions: int
    cache_reasons: dict[str, int]  # started requests by the reason of TokenOutput.cache_reason
    drafted_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    is_healthy: bool


class Engine:
    """Continuous batching over one model. `generate` may be called from any event loop once `start` was called.

    Steps that fail with one of `outages` are the fault of something else that a restart of the engine would not mend:
    their requests fail with the error's text, the engine stays healthy. Any other error's text is for the log alone.
    `compile_grammar` makes of a grammar what the sampler needs, on a thread of its own, and raises ValueError for one
    that cannot be used.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        outages: tuple[type[Exception], ...] = (),
        compile_grammar: Callable[[Grammar], Any] | None = None,
    ) -> None:
        self.runner, self.scheduler, self.outages = runner, scheduler, outages
        self._compiling = compile_grammar and GrammarPool(compile_grammar, scheduler.config.max_waiting)
        self.vocab_size, self.eos_token_ids = vocab_size, frozenset(eos_token_ids)
        self._streams: dict[str, TokenStream] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._is_stopping = False
        self._num_steps = self._num_failed_steps = self._num_failed_in_a_row = 0
        self._num_refused = 0

    def step(self) -> list[TokenOutput]:
        batch = self.scheduler.schedule()
        results = self.runner.run(batch)
        return self.scheduler.postprocess(batch, results)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step it is in; open streams end with EngineFailed."""
        self._is_stopping = True
        self._inbox.put(lambda: None)  # wakes it
        if self._compiling:
            self._compiling.close()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and self._num_failed_in_a_row < UNHEALTHY_AFTER

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_slots=scheduler.memory.slots.size,
            num_blocks=scheduler.memory.pages.size,
            num_slots_taken=scheduler.memory.num_slots_taken,
            num_blocks_taken=scheduler.memory.pages.num_taken,
            num_slots_cached=scheduler.memory.cache.checkpoints.num_slots,
            num_blocks_cached=scheduler.memory.pages.num_idle,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            num_refused=self._num_refused,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            num_cached_tokens=scheduler.memory.cache.counts.num_cached_tokens,
            num_checkpoints=len(scheduler.memory.cache.checkpoints),
            num_evictions=scheduler.memory.cache.checkpoints.num_evictions,
            cache_reasons=dict(scheduler.memory.cache.counts.by_reason),
            drafted_by_position=scheduler.drafting.drafted,
            accepted_by_position=scheduler.drafting.accepted,
            is_healthy=self.is_healthy,
        )

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None = None,
        sent_token_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[TokenOutput, None]:
        """Yields the request's tokens as they are made; closing the generator frees what the request holds.

        `sent_token_ids`: another engine accepted the request, generated these, and is gone. What follows them is what
        would have followed there, counts included; `prompt_logprobs` come only where there are none of these.

        Raises ValueError (bad prompt, lengths or grammar), EngineOverloaded, EngineFailed, or DeadlinePassed after
        `timeout` seconds; the first two before anything was yielded, but for a grammar that leads to where nothing may
        follow, or becomes too complex to follow.
        """
        request = self._new_request(request_id, prompt_token_ids, params, timeout, sent_token_ids)
        if (overload := self.scheduler.waiting.overload) and not request.is_resumed:
            self._inbox.put(self._count_refusal)
            raise overload
        if params.grammar is not None:
            request.compiled_grammar = await self._compile(params.grammar, request)
        stream = self._open(request)
        try:
            while True:
                item = await stream.items.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            self._inbox.put(lambda: self._forget(request_id, stream))

    # The client's side

    def _new_request(
        self,
        request_id: str,
        token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None,
        sent_token_ids: Sequence[int] | None,
    ) -> Request:
        self._check_ids("prompt", token_ids)
        self._check_ids("sent_token_ids", sent_token_ids or ())
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", [token_id for token_id, _ in params.logit_bias])
        # Where a grammar can only end, it needs a token to end with.
        eos_ids = frozenset() if params.ignore_eos and params.grammar is None else self.eos_token_ids
        now = time.monotonic()
        max_len = self._max_len(len(token_ids), params)
        if sent_token_ids and len(token_ids) + len(sent_token_ids) >= max_len:
            raise EngineFailed(f"The answer of {len(sent_token_ids)} tokens leaves no room here for the next one.")
        return Request(
            id=request_id,
            token_ids=[*token_ids, *(sent_token_ids or ())],
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            max_len=max_len,
            stop_ids=frozenset(params.stop_token_ids) | eos_ids,
            deadline=math.inf if timeout is None else now + timeout,
            num_sent=None if sent_token_ids is None else len(sent_token_ids),
            arrived_at=now,
        )

    async def _compile(self, grammar: Grammar, request: Request) -> Any:
        if self._compiling is None:
            raise ValueError("grammar cannot be used: this server has no tokenizer to read it with.")
        retry_after = None if request.is_resumed else self.scheduler.waiting.retry_after
        try:
            return await self._compiling.compile(grammar, request.deadline, retry_after)
        except EngineOverloaded:
            self._inbox.put(self._count_refusal)
            raise

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{name} holds the token id {token_id}; allowed are 0 to {self.vocab_size - 1}.")

    def _max_len(self, num_prompt: int, params: SamplingParams) -> int:
        if num_prompt == 0:
            raise ValueError("prompt must hold at least one token.")
        longest = self.scheduler.config.max_len
        num_asked = max(params.max_tokens or 0, params.min_tokens, 1)
        if num_prompt + num_asked > longest:
            is_context = longest == self.scheduler.config.max_model_len
            why = "the model's context" if is_context else "which is all that memory holds"
            raise ValueError(
                f"The prompt of {num_prompt} tokens and an answer of {num_asked} make {num_prompt + num_asked} tokens; "
                f"at most {longest} are allowed, {why}."
            )
        return min(longest, num_prompt + params.max_tokens) if params.max_tokens else longest

    def _open(self, request: Request) -> TokenStream:
        if request.id in self._streams:
            raise ValueError(f"request_id {request.id!r} is in use by a request that has not ended; choose another.")
        stream = self._streams[request.id] = TokenStream(request, asyncio.get_running_loop(), asyncio.Queue())
        # Asked after the stream is known: a thread that ends from here on will find it and tell it.
        if self._is_stopping or not self._thread.is_alive():
            stream.items.put_nowait(EngineFailed("The engine is not running."))
        self._inbox.put(lambda: self._add(request))
        return stream

    # The engine's thread: from here on, nothing runs in the client's

    def _loop(self) -> None:
        try:
            while not self._is_stopping:
                self._take_inbox()
                if self.scheduler.has_work:
                    self._deliver(self._guarded_step())
        finally:
            self._is_stopping = True
            self._deliver([(request_id, EngineFailed("The engine was stopped.")) for request_id in list(self._streams)])

    def _take_inbox(self) -> None:
        if not self.scheduler.has_work:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _add(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
        except EngineOverloaded as error:
            self._count_refusal()
            self._deliver([(request.id, error)])

    def _count_refusal(self) -> None:
        self._num_refused += 1

    def _forget(self, request_id: str, stream: TokenStream) -> None:
        if self._streams.get(request_id) is stream:  # else it has ended, and the id may be another's by now
            del self._streams[request_id]
            self.scheduler.abort(request_id)
            self._end(stream.request, "cancelled")

    def _end(self, request: Request, reason: str) -> None:
        self.runner.release(request)
        logger.info(
            "Request %s ended: %s after %d of %d tokens.",
            *(request.id, reason, request.num_generated, request.max_len - request.num_prompt_tokens),
            extra=_report(request, reason),
        )

    def _guarded_step(self) -> list[tuple[str, Item]]:
        self._num_steps += 1
        try:
            outputs = self.step()
        except Exception as error:
            logger.exception("A step failed.")
            return self._fail_step(error)
        self._num_failed_in_a_row = 0
        return [(output.request_id, self._to_item(output)) for output in outputs]

    def _fail_step(self, error: Exception) -> list[tuple[str, Item]]:
        self._num_failed_steps += 1
        self._num_failed_in_a_row += not isinstance(error, self.outages)
        why = f": {error}" if isinstance(error, self.outages) else "; the server's log says more."
        sentence = f"The step that computed this request failed{why}"
        return [(request.id, EngineFailed(sentence)) for request in self.scheduler.abort_step()]

    def _to_item(self, output: TokenOutput) -> Item:
        if output.finish_reason is FinishReason.DEADLINE:
            return DeadlinePassed(f"The request's deadline passed after {output.num_generated} generated tokens.")
        if output.finish_reason is FinishReason.FAILED:
            why = self.runner.sampler.explain(self._streams[output.request_id].request)
            level = logging.ERROR if isinstance(why, EngineFailed) else logging.INFO
            logger.log(level, "Request %s failed: %s", output.request_id, why)
            return why
        return output

    def _deliver(self, items: list[tuple[str, Item]]) -> None:
        # One wake-up per event loop and step, not one per token: a wake-up is a system call.
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, Item]]] = {}
        for request_id, item in items:
            stream = self._streams[request_id]
            if reason := _end_reason(item):
                del self._streams[request_id]
                self._end(stream.request, reason)
            by_loop.setdefault(stream.loop, []).append((stream, item))
        for loop, group in by_loop.items():
            with suppress(RuntimeError):  # a loop that closed in the meantime has no reader left
                loop.call_soon_threadsafe(_put_all, group)


def _end_reason(item: Item) -> str | None:
    """Why this is a request's last item; None: it is not."""
    if isinstance(item, Exception):
        return _REASONS.get(type(item), "failed")
    return item.finish_reason


_REASONS: dict[type[Exception], str] = {
    EngineOverloaded: "overloaded",
    DeadlinePassed: "deadline",
    ValueError: "invalid",
}


def _report(request: Request, reason: str) -> dict[str, Any]:
    """What the log says of a request that has ended, in tokens and seconds."""

    def since_arrival(at: float | None) -> float | None:
        return None if at is None else round(at - request.arrived_at, 6)

    return {
        "request_id": request.id,
        "finish_reason": reason,
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_generated_tokens": request.num_generated,
        "num_cached_tokens": request.num_cached,
        "cache_reason": request.cache_reason,
        "queued_s": since_arrival(request.first_scheduled_at),
        "first_token_s": since_arrival(request.first_token_at),
        "total_s": since_arrival(time.monotonic()),
    }


def _put_all(group: list[tuple[TokenStream, Item]]) -> None:
    for stream, item in group:
        stream.items.put_nowait(item)
