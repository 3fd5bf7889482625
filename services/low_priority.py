"""Background work runs on threads of low priority, so that it does not slow down the requests in progress."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache, partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS = 2
# A thread with this niceness gets about a tenth of a core while threads of normal priority keep the core busy, and the
# whole core otherwise.
NICENESS = 10

# True in a task for whose result a request waits.
is_request_waiting: ContextVar[bool] = ContextVar("is_request_waiting", default=False)


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on another thread, of normal priority if a request waits for the result, else of low priority."""
    return await (asyncio.to_thread if is_request_waiting.get() else run_at_low_priority)(function, *args, **kwargs)


async def run_at_low_priority(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` as `asyncio.to_thread` does, but on a thread of low priority if the system has such threads."""
    return await asyncio.get_running_loop().run_in_executor(low_priority_threads(), partial(function, *args, **kwargs))


@cache
def low_priority_threads() -> ThreadPoolExecutor:
    """Return this process's pool of low-priority threads; the first call creates the pool."""
    return ThreadPoolExecutor(NUM_THREADS, "background", initializer=_lower_priority)


def _lower_priority() -> None:
    if sys.platform == "linux":  # on other systems the call would lower the priority of the whole process
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
