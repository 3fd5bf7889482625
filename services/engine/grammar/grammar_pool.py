"""A `GrammarPool` compiles grammars before their requests are queued, with limits on threads, requests and time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar
from services.engine.grammar.waiting_grammars import WaitingGrammars

NUM_FAST = 2  # grammars that are compiled at a time; few, because the engine's steps need the processor, too
NUM_SMALL = 1  # further small grammars that are compiled at a time; large grammars never take their place
NUM_SLOW = 2  # further grammars that are compiled at a time after they turned out to be slow
SLOW_SECONDS = 0.25  # a grammar that takes more seconds is slow
MAX_KNOWN = 1024  # number of slow grammars that are remembered


class GrammarPool:
    """A `GrammarPool` runs `compile_grammar` on separate threads, for at most `max_requests` requests at a time.

    Slow grammars delay only slow grammars: a grammar that has been compiled for `SLOW_SECONDS` gives its place to the
    next grammar, and from then on takes one of the places for slow grammars. A grammar that was slow before waits for
    such a place from the beginning. Grammars wait in the order of `WaitingGrammars`, and while large grammars hold all
    other places, small grammars have a place that only small grammars take. Any event loop may call `compile`.
    """

    def __init__(self, compile_grammar: Callable[[Grammar], Any], max_requests: int) -> None:
        self._compile, self._max_requests = compile_grammar, max_requests
        self._threads = ThreadPoolExecutor(NUM_FAST + NUM_SMALL + NUM_SLOW, thread_name_prefix="grammars")
        self._places = threading.BoundedSemaphore(max_requests)
        self._lock = threading.Lock()
        self._fast: WaitingGrammars[_Job] = WaitingGrammars()  # jobs that wait, by lane
        self._slow: WaitingGrammars[_Job] = WaitingGrammars()
        self._running: list[_Job] = []
        self._known_slow: OrderedDict[int, None] = OrderedDict()  # hashes of grammars
        self._is_closed = False

    async def compile(self, grammar: Grammar, deadline: float, retry_after: int | None) -> Any:
        """Return the result of `compile_grammar` for the grammar; `deadline` is in seconds of `time.monotonic`.

        `retry_after` is the number of seconds after which a refused client may retry, or None for a resumed request. A
        resumed request is never refused, because another engine had accepted it. A resumed request does not count among
        the `max_requests` requests.

        Errors:

        - ValueError: the grammar cannot be used.
        - EngineOverloaded: too many grammars are being compiled. The error has the given `retry_after`.
        - DeadlinePassed: the deadline passed before the grammar was compiled.
        - EngineFailed: the pool was closed.
        """
        if retry_after is not None and not self._places.acquire(blocking=False):
            sentence = f"The grammars of {self._max_requests} requests are being compiled, which is the most at a time."
            raise EngineOverloaded(sentence, retry_after)
        job = self._submit(grammar, has_place=retry_after is not None)
        try:
            async with asyncio.timeout(None) as limit:
                if deadline < float("inf"):
                    limit.reschedule(asyncio.get_running_loop().time() + deadline - time.monotonic())
                return await asyncio.wrap_future(job.result)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlinePassed("The request's deadline passed before its grammar was compiled.") from error

    def _submit(self, grammar: Grammar, has_place: bool) -> _Job:
        job = _Job(grammar, hash(grammar))
        if has_place:
            # A running job counts among `max_requests` until the job ends, even if the caller gives up, because the
            # job occupies a thread.
            job.result.add_done_callback(lambda _: self._places.release())
        with self._lock:
            is_closed = self._is_closed
            job.is_slow = job.digest in self._known_slow
            if not is_closed:
                (self._slow if job.is_slow else self._fast).add(job, len(grammar.text), time.monotonic())
        if is_closed:
            job.result.set_exception(EngineFailed("The engine is not running."))
        self._start_more()
        return job

    def _start_more(self) -> None:
        """Start all jobs for which there is a place, and move the jobs that turned out to be slow."""
        with self._lock:
            num_slow = sum(job.is_slow for job in self._running)
            for job in self._running:
                if not job.is_slow and job.seconds >= SLOW_SECONDS and num_slow < NUM_SLOW:
                    job.is_slow = True
                    num_slow += 1
            num_small = sum(job.is_in_small_place and not job.is_slow for job in self._running)
            num_fast = len(self._running) - num_slow - num_small
            while num_fast < NUM_FAST and (waiting := self._fast.pop()):
                num_fast += self._start(waiting)
            while num_small < NUM_SMALL and (waiting := self._fast.pop_small()):
                waiting.is_in_small_place = True
                num_small += self._start(waiting)
            while num_slow < NUM_SLOW and (waiting := self._slow.pop()):
                num_slow += self._start(waiting)

    def _start(self, job: _Job) -> bool:
        """Start `job`, and return False if its caller has given up."""
        if not job.result.set_running_or_notify_cancel():
            return False
        job.start = time.monotonic()
        self._running.append(job)
        self._threads.submit(self._run, job)
        return True

    def _run(self, job: _Job) -> None:
        timer = threading.Timer(SLOW_SECONDS, self._start_more)
        timer.start()
        try:
            found, wrong = self._compile(job.grammar), None
        except BaseException as error:  # errors of the library's Rust code (panics) do not derive from Exception
            found, wrong = None, error
        timer.cancel()
        with self._lock:
            self._running.remove(job)
            if job.seconds >= SLOW_SECONDS:
                self._known_slow[job.digest] = None
                if len(self._known_slow) > MAX_KNOWN:
                    self._known_slow.popitem(last=False)
        if wrong is None:
            job.result.set_result(found)
        else:
            job.result.set_exception(wrong)
        self._start_more()

    def close(self) -> None:
        """Accept no more grammars, and let the threads finish the grammars that they compile."""
        with self._lock:
            self._is_closed = True
            waiting = [*self._fast.pop_all(), *self._slow.pop_all()]
        for job in waiting:
            if job.result.set_running_or_notify_cancel():
                job.result.set_exception(EngineFailed("The engine is not running."))
        self._threads.shutdown(wait=False)


@dataclass(eq=False)
class _Job:
    """A `_Job` is one grammar that waits or is being compiled."""

    grammar: Grammar
    digest: int
    result: Future[Any] = field(default_factory=Future)
    is_slow: bool = False  # True: the job waits for, or has, a place for slow grammars
    is_in_small_place: bool = False  # True: the job took the place for small grammars
    start: float = 0.0  # time of `time.monotonic` at which the job started

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start
