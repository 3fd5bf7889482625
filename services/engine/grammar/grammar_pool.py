"""A `GrammarPool` compiles grammars before their requests are queued, with limits on threads, requests and time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar

NUM_THREADS = 2  # number of threads that compile; few, because the engine's steps need the processor, too


class GrammarPool:
    """A `GrammarPool` runs `compile_grammar` on separate threads, for at most `max_requests` requests at a time.

    Any event loop may call `compile`.
    """

    def __init__(self, compile_grammar: Callable[[Grammar], Any], max_requests: int) -> None:
        self._compile, self._max_requests = compile_grammar, max_requests
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammars")
        self._places = threading.BoundedSemaphore(max_requests)

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
        work = self._submit(grammar, has_place=retry_after is not None)
        try:
            async with asyncio.timeout(None) as limit:
                if deadline < float("inf"):
                    limit.reschedule(asyncio.get_running_loop().time() + deadline - time.monotonic())
                return await asyncio.wrap_future(work)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlinePassed("The request's deadline passed before its grammar was compiled.") from error

    def _submit(self, grammar: Grammar, has_place: bool) -> Future[Any]:
        def leave_place(_: object) -> None:
            if has_place:
                self._places.release()

        try:
            work = self._threads.submit(self._compile, grammar)
        except RuntimeError as error:  # the pool was closed
            leave_place(error)
            raise EngineFailed("The engine is not running.") from error
        # The request counts among `max_requests` until the work ends, even if the caller gives up: until then the work
        # occupies a thread.
        work.add_done_callback(leave_place)
        return work

    def close(self) -> None:
        """Accept no more grammars, and let the threads finish the grammars that were submitted."""
        self._threads.shutdown(wait=False)
