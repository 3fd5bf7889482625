"""The test checks that a `BoundedThreadPool` refuses calls when its queue is full."""

from __future__ import annotations

import asyncio
import threading

import pytest

from services.engine.contract.errors import EngineOverloaded
from services.gateway.bounded_thread_pool import BoundedThreadPool


def test_beyond_the_most_at_a_time_work_is_refused() -> None:
    async def test() -> None:
        threads, may_finish = BoundedThreadPool(num_threads=1, max_open=2), threading.Event()
        running, waiting = (asyncio.create_task(threads.run(may_finish.wait, 60)) for _ in range(2))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineOverloaded, match="2 requests are being tokenized or checked"):
            await threads.run(sum, [1, 2])
        waiting.cancel()  # the call leaves the queue, so another call may wait
        await asyncio.wait([waiting])
        last = asyncio.create_task(threads.run(sum, [1, 2]))
        await asyncio.sleep(0.05)
        may_finish.set()
        assert await running
        assert await last == 3

    asyncio.run(test())
