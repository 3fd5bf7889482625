"""These tests check in virtual time how long a gateway waits for the statuses of backbones that do not answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.simulation import virtual_time
from services import ingress


async def answer(after_s: float, status: Any) -> Any:
    await asyncio.sleep(after_s)
    if isinstance(status, Exception):
        raise status
    return status


@pytest.mark.parametrize(
    ("replicas", "expected", "took_s"),
    [
        ([(0, {"n": 1}), (0.01, {"n": 2})], [1, 2], 0.01),
        ([(0, {"n": 1}), (60, {"n": 2})], [1], 0.2),
        ([(0, RuntimeError("dead")), (0.5, {"n": 2})], [2], 0.5),
        ([(60, {"n": 1})], [], 1.0),
        ([(0, RuntimeError("dead"))], [], 0.0),
        ([], [], 0.0),
    ],
)
def test_those_that_answer_are_heard(
    monkeypatch: pytest.MonkeyPatch, replicas: list[tuple[float, Any]], expected: list[int], took_s: float
) -> None:
    monkeypatch.setattr(ingress, "STATUS_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ingress, "OTHERS_TIMEOUT_S", 0.2)

    async def ask() -> tuple[list[dict[str, Any]], float]:
        answers = await ingress._answers([answer(*replica) for replica in replicas])
        return answers, asyncio.get_running_loop().time()

    answers, ended_at = virtual_time.run(ask())
    assert [status["n"] for status in answers] == expected
    assert ended_at == pytest.approx(took_s)
