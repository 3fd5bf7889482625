"""These tests check the order in which a worker runs jobs, and how the worker reports exceptions of jobs."""

from __future__ import annotations

import asyncio
import socket
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


def test_an_error_in_a_job_or_on_a_socket_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        worker = Worker(max_depth=2, name="test")
        ours, theirs = socket.socketpair()

        def fail(_: int) -> None:
            ours.recv(1)
            raise ZeroDivisionError("socket")

        worker.watch(ours, fail)
        theirs.send(b"x")
        worker.submit(lambda: 1 // 0)
        await worker.idle()
        while "serve a socket" not in caplog.text or worker.depth:
            await asyncio.sleep(0.01)
        assert worker.is_alive
        assert worker.busy_s == 0.0
        worker.close()
        ours.close()
        theirs.close()

    asyncio.run(run())
    assert "A job of the worker failed." in caplog.text
    assert "The worker failed to serve a socket." in caplog.text


def test_what_a_job_raises_reaches_the_caller() -> None:
    async def run() -> None:
        worker = Worker(max_depth=2, name="test")
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
        await worker.idle()
        worker.close()

    asyncio.run(run())
