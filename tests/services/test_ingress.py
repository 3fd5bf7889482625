"""These tests check that a gateway gets the statuses of backbones quickly, even if some backbones do not answer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from services import ingress


async def answer(after_s: float, status: Any) -> Any:
    await asyncio.sleep(after_s)
    if isinstance(status, Exception):
        raise status
    return status


@pytest.mark.parametrize(
    ("replicas", "expected", "longest_s"),
    [
        ([(0, {"n": 1}), (0.01, {"n": 2})], [1, 2], 0.1),
        ([(0, {"n": 1}), (60, {"n": 2})], [1], 0.4),  # a replica that hangs delays the result by at most 0.4 s
        ([(0, RuntimeError("dead")), (0.5, {"n": 2})], [2], 0.7),
        ([(60, {"n": 1})], [], 1.2),
        ([(0, RuntimeError("dead"))], [], 0.1),
        ([], [], 0.1),
    ],
)
def test_those_that_answer_are_heard(
    monkeypatch: pytest.MonkeyPatch, replicas: list[tuple[float, Any]], expected: list[int], longest_s: float
) -> None:
    monkeypatch.setattr(ingress, "STATUS_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ingress, "OTHERS_TIMEOUT_S", 0.2)
    start = time.monotonic()

    async def ask() -> list[dict[str, Any]]:
        return await ingress._answers([answer(*replica) for replica in replicas])

    assert [status["n"] for status in asyncio.run(ask())] == expected
    assert time.monotonic() - start < longest_s + 0.2
