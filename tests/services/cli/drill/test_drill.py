"""These tests run drills against a small server that misbehaves when a test tells it to."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.cli.drill.drill import Disturbance, Load, under_load
from services.cli.drill.load import RequestOutcome
from services.cli.drill.verdict import compare, longest_gap, num_tokens

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKENS, GAP_S = 8, 0.01
MAX_ATTEMPTS = 10


@dataclass
class Server:
    """A `Server` streams words that depend only on the prompt. If `trouble` is not empty, the server misbehaves.

    If `trouble` is "breaks off", the server ends answers too early. If it is "stalls", the server pauses in the middle
    of answers. If it is "lies", the server sends wrong words. `healing` is the task that ends the trouble.
    """

    trouble: str = ""
    port: int = 0
    is_whole: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    open: set[Any] = field(default_factory=set)
    healing: asyncio.Task[None] | None = None

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", head.lower())
        assert size
        body = json.loads(await reader.readexactly(int(size[1])))
        self.bodies.append(body)
        writer.write(HEAD)
        for number in range(TOKENS):
            await asyncio.sleep(GAP_S)
            if number == TOKENS // 2 and self.trouble:
                if self.trouble == "breaks off":
                    return
                await asyncio.sleep(0.4 if self.trouble == "stalls" else 0)
            word = "else" if self.trouble == "lies" else body["prompt"]
            self._event(writer, {"choices": [{"index": 0, "text": f"{word} {number}"}]})
        self._event(writer, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": TOKENS}})
        writer.write(b"0\r\n\r\n")

    async def guarded(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(asyncio.current_task())
        try:
            await self.answer(reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has closed the connection
        finally:
            writer.close()
            self.open.discard(asyncio.current_task())

    @staticmethod
    def _event(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(body).encode() + b"\n\n"
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    ours = Server()
    async with await asyncio.start_server(ours.guarded, "127.0.0.1", 0) as server:
        ours.port = server.sockets[0].getsockname()[1]
        yield ours
        await asyncio.gather(*ours.open, return_exceptions=True)
        if ours.healing:
            ours.healing.cancel()
        await asyncio.sleep(0.05)  # enough time for the last connections to close


async def watch_stalls(stalls: list[float]) -> None:
    """Add to `stalls` how many seconds late each callback of the event loop is, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_at = loop.time() + 0.01
        await asyncio.sleep(0.01)
        stalls.append(loop.time() - due_at)


def drill(trouble: str, heals_after_s: float = 0.3) -> tuple[Any, float | None, Server]:
    """Run a drill, and run it again if the machine has stalled, because a stall looks like the server's trouble."""
    for _ in range(MAX_ATTEMPTS):
        stalls = [0.0]
        result = drill_once(trouble, heals_after_s, stalls)
        if max(stalls) < 0.1:
            break
    return result


def drill_once(trouble: str, heals_after_s: float, stalls: list[float]) -> tuple[Any, float | None, Server]:
    async def run() -> tuple[Any, float | None, Server]:
        watching = asyncio.create_task(watch_stalls(stalls))
        async with serving() as server:
            load = Load.of_sentences(f"http://127.0.0.1:{server.port}", rate=20, seconds=1.5, max_tokens=TOKENS)

            async def do() -> None:
                server.trouble, server.is_whole = trouble, False

                async def heal() -> None:
                    await asyncio.sleep(heals_after_s)
                    server.is_whole = True

                server.healing = asyncio.create_task(heal())

            async def is_whole() -> bool:
                return server.is_whole

            verdict, whole_s = await under_load(load, Disturbance(do, is_whole, at_s=0.7, timeout_s=1.0))
        watching.cancel()
        return verdict, whole_s, server

    return asyncio.run(run())


def test_a_deed_that_nobody_notices_costs_nothing() -> None:
    verdict, whole_s, server = drill("")
    assert (verdict.num_failed, verdict.num_different, verdict.errors) == (0, 0, {})
    assert len(server.bodies) == 2 * verdict.num_requests > 20
    first, second = server.bodies[: verdict.num_requests], server.bodies[verdict.num_requests :]
    assert first == second
    assert len({body["prompt"] for body in first}) == verdict.num_requests
    assert whole_s == pytest.approx(0.3, abs=0.25)
    assert abs(verdict.dip) < 0.5
    assert 0 < verdict.longest_gap_s < 0.3


def test_answers_that_break_off_are_failures() -> None:
    verdict, _, _ = drill("breaks off")
    assert 0 < verdict.num_failed < verdict.num_requests
    assert sum(verdict.errors.values()) == verdict.num_failed
    assert verdict.num_different == 0
    assert verdict.dip > 0.3


def test_answers_that_are_others_are_counted() -> None:
    verdict, _, _ = drill("lies")
    assert verdict.num_failed == 0
    assert 0 < verdict.num_different < verdict.num_requests


def test_a_stall_is_the_longest_gap() -> None:
    verdict, _, _ = drill("stalls")
    assert verdict.longest_gap_s > 0.35 > verdict.undisturbed_gap_s
    assert verdict.num_different == 0


def test_what_does_not_heal_in_time_is_said_so() -> None:
    _, whole_s, _ = drill("", heals_after_s=5.0)
    assert whole_s is None


def test_a_deed_that_fails_ends_the_drill() -> None:
    async def run() -> None:
        async with serving() as server:
            load = Load.of_sentences(f"http://127.0.0.1:{server.port}", rate=20, seconds=5, max_tokens=TOKENS)

            async def do() -> None:
                raise ProcessLookupError("it was gone before")

            async def is_whole() -> bool:
                return True

            with pytest.raises(ProcessLookupError):
                await under_load(load, Disturbance(do, is_whole, at_s=0.1), undisturbed=[])

    asyncio.run(run())


def outcome(times: tuple[float, ...], text: str = "a", num_generated: int = 4, error: str = "") -> RequestOutcome:
    event = json.dumps({"choices": [{"text": text}]}).encode()
    return RequestOutcome(0.0, 9.0, times, num_generated=num_generated, error=error, events=(event,))


def test_tokens_are_counted_where_their_pieces_came() -> None:
    outcomes = [outcome((1.0, 2.0, 3.0, 4.0)), outcome((2.5,)), outcome(())]
    assert num_tokens(outcomes, 2.0, 4.0) == 2.0 + 4.0
    assert longest_gap([outcome((1.0, 1.5, 4.0)), outcome((1.0,))]) == 2.5


def test_runs_that_cannot_be_compared_are_one_sentence() -> None:
    good = outcome((1.0,))
    with pytest.raises(ValueError, match="The runs cannot be compared: 1 requests were sent, then 2"):
        compare([good], [good, good], 1.0, 30.0)
    with pytest.raises(ValueError, match=r"1 of 2 requests failed even without a disturbance \(HTTP 503\)"):
        compare([good, outcome((), error="HTTP 503")], [good, good], 1.0, 30.0)


def test_an_answer_of_other_length_is_another_answer() -> None:
    verdict = compare([outcome((1.0,))], [outcome((1.0,), num_generated=5)], 0.0, 30.0)
    assert verdict.num_different == 1
    assert verdict.to_dict()["dip"] == pytest.approx(-0.25)
