"""Threads that give way: what is loaded or started for later must not slow down the answers of now."""

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
NICENESS = 10  # a tenth of a core where threads that answer want all of it, and a whole one where they do not


is_awaited: ContextVar[bool] = ContextVar("is_awaited", default=False)  # what this task does, by a call


async def aside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """On another thread, which gives way to those that answer unless a call waits for it."""
    return await (asyncio.to_thread if is_awaited.get() else in_background)(function, *args, **kwargs)


async def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`asyncio.to_thread` on a thread that gives way to others, where the system lets threads differ in that."""
    return await asyncio.get_running_loop().run_in_executor(threads(), partial(function, *args, **kwargs))


@cache
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_THREADS, "background", initializer=_give_way)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
