"""These tests check the order in which a worker runs jobs, and how the worker reports exceptions of jobs."""

from __future__ import annotations

import asyncio
import threading

import pytest

from services.expert.transport.worker import Worker


def test_jobs_run_in_order_and_are_counted() -> None:
    async def run() -> None:
        worker, gate, seen = Worker(max_depth=2, name="test"), threading.Event(), list[int]()
        worker.submit(lambda: gate.wait() and None)
        worker.submit(lambda: seen.append(1))
        assert (worker.depth, worker.is_full) == (2, True)
        gate.set()
        assert await worker.run(lambda: len(seen)) == 1
        worker.close()
        assert worker.depth == 0

    asyncio.run(run())


def test_what_a_job_raises_reaches_the_caller() -> None:
    async def run() -> None:
        worker = Worker(max_depth=2, name="test")
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
        await worker.idle()
        worker.close()

    asyncio.run(run())
