"""The `Engine` computes steps on one thread, and gives each request an asynchronous stream of tokens."""

from __future__ import annotations

import asyncio
import logging
import queue
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
from services.engine.request import Request, RequestFactory
from services.engine.runner import Runner
from services.engine.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

UNHEALTHY_AFTER = 3  # consecutive failed steps after which the engine reports that it is unhealthy
StreamItem = TokenOutput | Exception
# The reason that is logged when an exception ends a request. For all other exceptions the reason is "failed".
END_REASONS: dict[type[Exception], str] = {
    EngineOverloaded: "overloaded",
    DeadlinePassed: "deadline",
    ValueError: "invalid",
}


@dataclass(frozen=True)
class TokenStream:
    """A `TokenStream` carries the outputs or the error of a request to its client; only `loop` may use `items`."""

    request: Request
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[StreamItem]


@dataclass(frozen=True)
class EngineStats:
    """An `EngineStats` holds the engine's counts for status and metrics.

    Running requests hold the slots and pages that are counted as "taken". Only the prefix cache holds the slots and
    pages that are counted as "cached"; running requests may take the prefix cache's slots and pages.
    """

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
    num_refused: int  # requests that were refused because too many requests were waiting
    num_prompt_tokens: int  # prompt tokens of all requests that got their first token
    num_generated_tokens: int
    num_cached_tokens: int
    num_checkpoints: int
    num_evictions: int
    cache_reasons: dict[str, int]  # number of started requests, by `TokenOutput.cache_reason`
    drafted_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    is_healthy: bool


class Engine:
    """An `Engine` serves all clients with one model by continuous batching: requests come and go between steps.

    `generate` may be called from any event loop after `start` was called.

    - `outages`: types of errors that the engine does not cause and that a restart of the engine would not repair. If
      such an error ends a step, the step's requests fail with the error's text, and the engine stays healthy. The text
      of any other error is only logged.
    - `compile_grammar`: compiles a grammar for the sampler, or raises ValueError for a grammar that cannot be used. The
      engine calls this function on separate threads. If the function is None, requests with a grammar are refused.
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
        config = scheduler.config
        self.runner, self.scheduler, self.outages = runner, scheduler, outages
        self._requests = RequestFactory(vocab_size, eos_token_ids, config.max_len, config.max_model_len)
        self._grammar_pool = compile_grammar and GrammarPool(compile_grammar, config.max_waiting)
        self._streams: dict[str, TokenStream] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # functions for the engine's thread
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._is_stopping = False
        self._num_steps = self._num_failed_steps = self._num_failed_in_a_row = 0
        self._num_refused = 0

    def step(self) -> list[TokenOutput]:
        """Compute one step and return its outputs."""
        batch = self.scheduler.schedule()
        results = self.runner.run(batch)
        return self.scheduler.postprocess(batch, results)

    def start(self) -> None:
        """Start the thread that computes the steps."""
        self._thread.start()

    def stop(self) -> None:
        """End the engine's thread after its current step; open streams end with EngineFailed."""
        self._is_stopping = True
        self._inbox.put(lambda: None)  # wakes the thread
        if self._grammar_pool:
            self._grammar_pool.close()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and self._num_failed_in_a_row < UNHEALTHY_AFTER

    def stats(self) -> EngineStats:
        """Return the engine's counts since the engine was created."""
        scheduler, memory = self.scheduler, self.scheduler.memory
        checkpoints, cache_counts = memory.cache.checkpoints, memory.cache.counts
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_slots=memory.slots.size,
            num_blocks=memory.pages.size,
            num_slots_taken=memory.num_slots_taken,
            num_blocks_taken=memory.pages.num_taken,
            num_slots_cached=checkpoints.num_slots,
            num_blocks_cached=memory.pages.num_idle,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            num_refused=self._num_refused,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            num_cached_tokens=cache_counts.num_cached_tokens,
            num_checkpoints=len(checkpoints),
            num_evictions=checkpoints.num_evictions,
            cache_reasons=dict(cache_counts.by_reason),
            drafted_by_position=scheduler.drafting.drafted,
            accepted_by_position=scheduler.drafting.accepted,
            is_healthy=self.is_healthy,
        )

    # Called by clients, from any thread

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None = None,
        sent_token_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[TokenOutput, None]:
        """Yield the request's tokens as they are generated; closing the generator frees the request's slot and pages.

        `timeout` is in seconds. `sent_token_ids` is None for a new request. If an engine that is now lost had accepted
        the request, `sent_token_ids` holds the tokens that the lost engine had generated. This engine continues with
        the tokens that the lost engine would have generated. The counts in the outputs include the sent tokens. The
        outputs have `prompt_logprobs` only if no tokens were sent.

        Errors:

        - ValueError: the prompt, the lengths or the grammar are not allowed. This error is raised before the first
          output, except if the grammar later allows no next token or becomes too complex to follow.
        - EngineOverloaded: too many requests are waiting. This error is raised before the first output.
        - EngineFailed: a step failed or the engine was stopped.
        - DeadlinePassed: the request did not end within `timeout` seconds.
        """
        now = time.monotonic()
        request = self._requests.make(request_id, prompt_token_ids, params, timeout, sent_token_ids, now)
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

    async def _compile(self, grammar: Grammar, request: Request) -> Any:
        if self._grammar_pool is None:
            raise ValueError("grammar cannot be used: this server has no tokenizer to read it with.")
        retry_after = None if request.is_resumed else self.scheduler.waiting.retry_after
        try:
            return await self._grammar_pool.compile(grammar, request.deadline, retry_after)
        except EngineOverloaded:
            self._inbox.put(self._count_refusal)
            raise

    def _open(self, request: Request) -> TokenStream:
        if request.id in self._streams:
            raise ValueError(f"request_id {request.id!r} is in use by a request that has not ended; choose another.")
        stream = self._streams[request.id] = TokenStream(request, asyncio.get_running_loop(), asyncio.Queue())
        # Check the thread only after the stream is registered: a thread that ends later finds and ends the stream.
        if self._is_stopping or not self._thread.is_alive():
            stream.items.put_nowait(EngineFailed("The engine is not running."))
        self._inbox.put(lambda: self._add(request))
        return stream

    # Called only by the engine's thread

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
        """Call the functions that clients put into the inbox; if there is no work, wait for the next function."""
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
        # A stream that is not registered has ended, and a new request may already use the same id.
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self.scheduler.abort(request_id)
            self._end(stream.request, "cancelled")

    def _end(self, request: Request, reason: str) -> None:
        self.runner.release(request)
        logger.info(
            "Request %s ended: %s after %d of %d tokens.",
            *(request.id, reason, request.num_generated, request.max_len - request.num_prompt_tokens),
            extra=request.log_fields(reason, time.monotonic()),
        )

    def _guarded_step(self) -> list[tuple[str, StreamItem]]:
        """Compute a step and return the outputs by request id; if the step fails, return an error for each request."""
        self._num_steps += 1
        try:
            outputs = self.step()
        except Exception as error:
            logger.exception("A step failed.")
            return self._fail_step(error)
        self._num_failed_in_a_row = 0
        return [(output.request_id, self._to_item(output)) for output in outputs]

    def _fail_step(self, error: Exception) -> list[tuple[str, StreamItem]]:
        self._num_failed_steps += 1
        self._num_failed_in_a_row += not isinstance(error, self.outages)
        why = f": {error}" if isinstance(error, self.outages) else "; the server's log says more."
        sentence = f"The step that computed this request failed{why}"
        return [(request.id, EngineFailed(sentence)) for request in self.scheduler.abort_step()]

    def _to_item(self, output: TokenOutput) -> StreamItem:
        """Return the output, or an exception if the output's finish reason is DEADLINE or FAILED."""
        if output.finish_reason is FinishReason.DEADLINE:
            return DeadlinePassed(f"The request's deadline passed after {output.num_generated} generated tokens.")
        if output.finish_reason is FinishReason.FAILED:
            why = self.runner.sampler.explain(self._streams[output.request_id].request)
            level = logging.ERROR if isinstance(why, EngineFailed) else logging.INFO
            logger.log(level, "Request %s failed: %s", output.request_id, why)
            return why
        return output

    def _deliver(self, items: list[tuple[str, StreamItem]]) -> None:
        # Wake each event loop once per step and not once per token, because waking a loop is a system call.
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, StreamItem]]] = {}
        for request_id, item in items:
            stream = self._streams[request_id]
            if reason := _end_reason(item):
                del self._streams[request_id]
                self._end(stream.request, reason)
            by_loop.setdefault(stream.loop, []).append((stream, item))
        for loop, group in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed, so nobody reads its streams
                loop.call_soon_threadsafe(_put_all, group)


def _end_reason(item: StreamItem) -> str | None:
    """Return why a request ends with this output or error, or None if the request goes on."""
    if isinstance(item, Exception):
        return END_REASONS.get(type(item), "failed")
    return item.finish_reason


def _put_all(group: list[tuple[TokenStream, StreamItem]]) -> None:
    for stream, item in group:
        stream.items.put_nowait(item)
