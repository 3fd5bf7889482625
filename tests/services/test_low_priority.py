"""These tests check that low-priority work runs on separate threads, and that other threads keep their priority."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import pytest

from services.low_priority import NICENESS, run_at_low_priority

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads differ in priority on Linux only")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_only_the_threads_of_the_background_give_way() -> None:
    async def both() -> tuple[int, int]:
        return await run_at_low_priority(niceness), await asyncio.to_thread(niceness)

    own = niceness()
    assert asyncio.run(both()) == (max(NICENESS, own), own)
    assert niceness() == own
    assert asyncio.run(run_at_low_priority(niceness)) == max(NICENESS, own), "by another loop, too"


def test_what_fails_there_fails_here() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_at_low_priority(lambda: 1 // 0))
