"""Compiles the grammars of requests before they are queued: on few threads, only so many, none past its deadline."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar

NUM_THREADS = 2  # the steps need the processor too


class GrammarPool:
    """`compile_grammar` on threads of its own, for at most `max_requests` at a time. Any event loop may call it."""

    def __init__(self, compile_grammar: Callable[[Grammar], Any], max_requests: int) -> None:
        self._compile, self._max_requests = compile_grammar, max_requests
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammars")
        self._room = threading.BoundedSemaphore(max_requests)

    async def compile(self, grammar: Grammar, deadline: float, retry_after: int | None) -> Any:
        """What `compile_grammar` makes of it, or its ValueError; `deadline` in seconds of `time.monotonic`.

        Raises EngineOverloaded if too many are being compiled, EngineFailed after `close`, and DeadlinePassed.
        `retry_after` None: it was accepted elsewhere, and waits for a thread without taking others' room.
        """
        if retry_after is not None and not self._room.acquire(blocking=False):
            sentence = f"The grammars of {self._max_requests} requests are being compiled, which is the most at a time."
            raise EngineOverloaded(sentence, retry_after)
        work = self._submit(grammar, has_room=retry_after is not None)
        try:
            async with asyncio.timeout(None) as limit:
                if deadline < float("inf"):
                    limit.reschedule(asyncio.get_running_loop().time() + deadline - time.monotonic())
                return await asyncio.wrap_future(work)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlinePassed("The request's deadline passed before its grammar was compiled.") from error

    def _submit(self, grammar: Grammar, has_room: bool) -> Future[Any]:
        def leave_room(_: object) -> None:
            if has_room:
                self._room.release()

        try:
            work = self._threads.submit(self._compile, grammar)
        except RuntimeError as error:  # it was closed
            leave_room(error)
            raise EngineFailed("The engine is not running.") from error
        # By the work, not by who waits for it: what was given up on still takes a thread.
        work.add_done_callback(leave_room)
        return work

    def close(self) -> None:
        """What is being compiled goes on to its end."""
        self._threads.shutdown(wait=False)
