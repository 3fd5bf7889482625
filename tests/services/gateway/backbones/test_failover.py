"""The tests check over real sockets when a gateway continues a request on another backbone.

The backbones run no model; each answer repeats the prompt.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client import generate_latest

from services.engine import server
from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.engine.server import EngineServer
from services.gateway.backbones import backbone_pool
from services.gateway.backbones.backbone_pool import BackbonePool, unresponsive_endpoints
from services.gateway.backbones.failover import MAX_HANDOVERS, MAX_LOSSES
from services.gateway.errors import ApiError, ApiRefusal
from services.gateway.metrics.request_metrics import RequestMetrics
from tests.services.gateway.backbones.test_backbone_pool import ENDLESS, Fleet, collect, run, until
from tests.services.gateway.echo import EchoSource

PROMPT = [5, 6, 7, 8, 9]
EXPECTED = [PROMPT[n % len(PROMPT)] for n in range(900)]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_pool, "STATUS_TTL_S", 0.05)


def slow(**options: Any) -> EchoSource:
    return EchoSource(eos_id=0, pause=0.002, **options)


async def take(outputs: Any, count: int) -> list[int]:
    return [token for _ in range(count) for token in (await anext(outputs)).token_ids]


async def end(servers: list[EngineServer], fleet: Fleet, how: str) -> None:
    """Stop or kill the only server in `servers`, and remove the server from `fleet`."""
    [one] = servers
    if how == "stop":
        fleet.servers = [entry for entry in fleet.servers if entry[1] is not one]
        await one.stop()
    else:
        await fleet.kill(one)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_it_goes_on_from_what_was_sent(how: str) -> None:
    pauses: list[float | None] = []

    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        backbones._on_resumed = pauses.append
        first, second = slow(cached=(3, "hit")), slow(cached=(1, "no_match"))
        servers = [await fleet.start(first)]
        outputs: list[TokenOutput] = []
        async with aclosing(backbones.generate("r", PROMPT, ENDLESS)) as stream:
            async for output in stream:
                outputs.append(output)
                if len(outputs) == 40:
                    await fleet.start(second)
                    await end(servers, fleet, how)
        assert [token for output in outputs for token in output.token_ids] == EXPECTED
        assert [output.num_generated for output in outputs] == list(range(1, 901))
        assert {(output.request_id, output.num_cached, output.cache_reason) for output in outputs} == {("r", 3, "hit")}
        [sent] = second.resumed
        assert list(sent) == EXPECTED[: len(sent)]
        assert len(sent) >= 40
        assert not first.active | second.active
        [pause] = pauses
        assert pause
        assert pause < 15  # usually 0.02 s; 30 s if the gateway waits for a backbone that it has already

    run(test)


def test_a_seed_is_chosen_before_anything_is_sent_and_kept() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        first, second = slow(), slow()
        servers = [await fleet.start(first)]
        async with aclosing(backbones.generate("r", PROMPT, ENDLESS)) as outputs:
            await take(outputs, 3)
            await fleet.start(second)
            await end(servers, fleet, "kill")
            async for _ in outputs:
                pass
        [before], [after] = first.seen, second.seen
        assert before == after
        assert before.seed is not None

    run(test)


def test_backbones_that_stop_one_after_another_all_hand_over() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        one = await fleet.start(slow())
        outputs, tokens = backbones.generate("r", PROMPT, ENDLESS), list[int]()
        for _ in range(MAX_LOSSES + 3):
            tokens += await take(outputs, 20)
            other = await fleet.start(slow())
            await end([one], fleet, "stop")
            one = other
        tokens += [token async for output in outputs for token in output.token_ids]
        assert tokens == EXPECTED
        assert MAX_LOSSES + 3 < MAX_HANDOVERS

    run(test)


def test_a_request_that_kills_backbones_kills_a_few_only() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        servers = [await fleet.start(slow()) for _ in range(MAX_LOSSES + 1)]
        await backbones._find()
        asked = asyncio.create_task(drained(backbones, "r"))

        def busy() -> list[EngineServer]:
            streams = backbones._streams
            return [one for name, one in fleet.servers if streams[name].is_open and streams[name].num_requests]

        for _ in range(MAX_LOSSES):
            await until(lambda: bool(busy()))
            await fleet.kill(busy()[0])
        with pytest.raises(
            ApiError, match=rf"{MAX_LOSSES} backbones .* are gone; the request is not tried again"
        ) as raised:
            await asked
        assert raised.value.refusal is ApiRefusal.UNAVAILABLE
        assert len(fleet.servers) == len(servers) - MAX_LOSSES == 1

    run(test)


def all_of(backbones: BackbonePool) -> Any:
    return backbones._streams.values()


def test_a_failed_step_is_tried_on_one_other_backbone() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        broken = [EchoSource(eos_id=0, fails=EngineFailed("The step failed."), num_good=2) for _ in range(3)]
        await fleet.start(broken[0])
        with pytest.raises(EngineFailed, match="The step failed"):  # no retry, because there is no other backbone
            await drained(backbones, "alone")
        assert len(broken[0].seen) == 1
        for source in broken[1:]:
            await fleet.start(source)
        await asyncio.sleep(0.1)  # wait until the statuses that the gateway knows are stale
        await backbones._find()
        with pytest.raises(EngineFailed, match="The step failed"):
            await drained(backbones, "everywhere")
        assert sorted(len(source.seen) for source in broken) in ([0, 1, 2], [1, 1, 1])
        await fleet.start(EchoSource(eos_id=0))
        for _, one in fleet.servers[:2]:
            await one.stop()
        del fleet.servers[:2]
        await asyncio.sleep(0.1)
        await backbones._find()
        assert await drained(backbones, "elsewhere") == EXPECTED

    run(test)


async def drained(backbones: BackbonePool, name: str) -> list[int]:
    return [token async for output in backbones.generate(name, PROMPT, ENDLESS) for token in output.token_ids]


@pytest.mark.parametrize(
    "error", [ValueError("The grammar led to a dead end."), EngineOverloaded("Full."), DeadlinePassed("Late.")]
)
def test_what_is_nobodys_failure_is_not_tried_again(error: Exception) -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        sources = [EchoSource(eos_id=0, fails=error, num_good=1) for _ in range(2)]
        for source in sources:
            await fleet.start(source)
        with pytest.raises(type(error), match=str(error)):
            await drained(backbones, "r")
        assert sum(len(source.seen) for source in sources) == 1

    run(test)


def test_the_deadline_holds_while_no_backbone_is_there() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        one = await fleet.start(slow())
        start = time.monotonic()
        outputs = backbones.generate("r", PROMPT, ENDLESS, timeout=4.0)  # no backbone comes for RESUME_WAIT_S = 30
        await take(outputs, 5)
        await end([one], fleet, "kill")
        with pytest.raises(DeadlinePassed, match=r"deadline passed after \d+ generated tokens"):
            async for _ in outputs:
                pass
        assert time.monotonic() - start > 3.9

    run(test)


def test_a_client_that_leaves_while_no_backbone_is_there_leaves_nothing_behind() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        source = slow()
        one = await fleet.start(source)
        outputs = backbones.generate("r", PROMPT, ENDLESS)
        await take(outputs, 5)
        await end([one], fleet, "kill")

        async def rest() -> None:
            async for _ in outputs:
                pass

        left = asyncio.create_task(rest())
        await asyncio.sleep(0.3)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        late = slow()
        await fleet.start(late)
        await backbones._find()
        await asyncio.sleep(0.2)
        assert not source.active | late.active
        assert not late.seen
        assert all(stream.num_requests == 0 for stream in all_of(backbones))

    run(test)


def test_a_silent_backbone_is_given_up_where_another_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEARTBEAT_S", 60.0)  # the backbone is silent, as if its event loop had stopped

    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        hung = EchoSource(eos_id=0, pause=30)
        serving = await fleet.start(hung)
        await backbones._find()
        await until(lambda: bool(serving._service._streams))
        await asyncio.sleep(0.05)
        monkeypatch.setattr(server, "HEARTBEAT_S", 0.2)
        answering = slow()
        asked = asyncio.create_task(drained(backbones, "r"))
        await until(lambda: bool(hung.active))
        await fleet.start(answering)
        await backbones.start()
        assert await asked == EXPECTED
        assert answering.resumed == [()]
        await until(lambda: not hung.active)

    run(test)


def test_who_is_given_up() -> None:
    assert unresponsive_endpoints({}) == []
    assert unresponsive_endpoints({"a": 0.0, "b": 0.9, "c": 1.0, "d": 30.0}) == ["c", "d"]
    assert unresponsive_endpoints({"a": 1.5, "b": 9.9}) == [], "no other backbone could continue the requests"
    assert unresponsive_endpoints({"a": 1.5, "b": 10.0}) == ["b"]


def test_a_busy_backbone_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEARTBEAT_S", 0.05)

    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        await fleet.start(EchoSource(eos_id=0, pause=2.5))  # every step takes 2.5 s
        await fleet.start(EchoSource(eos_id=0, pause=2.5))
        await backbones.start()
        params = SamplingParams(max_tokens=1, seed=1)
        asked = asyncio.create_task(collect(backbones, "r", PROMPT, params))
        silences: dict[str, list[float]] = {endpoint: [] for endpoint, _ in fleet.servers}
        while not asked.done():
            await asyncio.sleep(0.01)
            for stream in all_of(backbones):
                silences[stream.endpoint].append(stream.silent_s)
        assert len(await asked) == 1
        for seen in silences.values():  # each backbone was heard about 50 times
            assert sum(after < before for before, after in pairwise(seen)) >= 5

    run(test)


def test_resumed_requests_are_counted() -> None:
    metrics = RequestMetrics("m")
    for pause in (0.3, None):
        metrics.count_resumed(pause)
    text = generate_latest(metrics.registry).decode()
    assert 'expertmesh:requests_resumed_total{model_name="m"} 2.0' in text
    assert 'expertmesh:request_pause_seconds_sum{model_name="m"} 0.3' in text
    assert 'expertmesh:request_pause_seconds_count{model_name="m"} 1.0' in text
