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
# While threads of normal priority keep a core busy, a thread with this niceness gets about a tenth of the core. On an
# idle core, the thread gets the whole core.
NICENESS = 10

# The value is True in a task if a request waits for the task's result.
is_request_waiting: ContextVar[bool] = ContextVar("is_request_waiting", default=False)


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on another thread and return the result.

    The thread has normal priority if a request waits for the result, and low priority otherwise.
    """
    return await (asyncio.to_thread if is_request_waiting.get() else run_at_low_priority)(function, *args, **kwargs)


async def run_at_low_priority(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on a low-priority thread and return the result.

    On systems other than Linux, the thread has normal priority.
    """
    return await asyncio.get_running_loop().run_in_executor(low_priority_threads(), partial(function, *args, **kwargs))


@cache
def low_priority_threads() -> ThreadPoolExecutor:
    """Return this process's pool of low-priority threads; the first call creates the pool."""
    return ThreadPoolExecutor(NUM_THREADS, "background", initializer=_lower_priority)


def _lower_priority() -> None:
    if sys.platform == "linux":  # on other systems, `setpriority` changes the priority of the whole process
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
