"""The tests check `BackbonePool` over real sockets, with backbones whose answer repeats the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from services.engine.contract.errors import EngineOverloaded
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.engine.server import EngineServer
from services.gateway.backbones import backbone_pool, failover
from services.gateway.backbones.backbone_pool import BackbonePool
from services.gateway.backbones.backbone_stream import BackboneStream
from services.gateway.errors import ApiError, ApiRefusal
from tests.services.gateway.echo import EchoSource

ENDLESS = SamplingParams(ignore_eos=True, max_tokens=900)


class Fleet:
    """A `Fleet` holds backbones that a test starts and kills; the gateway gets their statuses from `ask`."""

    def __init__(self) -> None:
        self.servers: list[tuple[str, EngineServer]] = []

    async def start(self, source: EchoSource) -> EngineServer:
        server = EngineServer(source, "127.0.0.1")
        self.servers.append((await server.start(), server))
        return server

    async def kill(self, server: EngineServer) -> None:
        self.servers = [entry for entry in self.servers if entry[1] is not server]
        await server._server.stop(None)

    async def ask(self) -> list[dict[str, Any]]:
        return [{"endpoint": endpoint, "engine": {"is_healthy": True}} for endpoint, _ in self.servers]


def run(test: Callable[[Fleet, BackbonePool], Awaitable[None]]) -> None:
    async def bounded() -> None:
        fleet = Fleet()
        backbones = BackbonePool(fleet.ask)
        try:
            await asyncio.wait_for(test(fleet, backbones), 60)
        finally:
            await backbones.stop()
            for _, server in fleet.servers:
                await server.stop()

    asyncio.run(bounded())


async def collect(backbones: BackbonePool, name: str, prompt: list[int], params: SamplingParams) -> list[TokenOutput]:
    return [output async for output in backbones.generate(name, prompt, params)]


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0.01)


def test_outputs_arrive_in_order_and_end() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        source = EchoSource(eos_id=0)
        await fleet.start(source)
        answers = await asyncio.gather(
            *(collect(backbones, f"r{n}", [n + 1] * 5, SamplingParams(max_tokens=5, seed=n)) for n in range(20))
        )
        for n, outputs in enumerate(answers):
            assert [output.token_ids for output in outputs] == [(n + 1,)] * 5
            assert [output.finish_reason for output in outputs] == [None] * 4 + ["length"]
        assert {params.seed for params in source.seen} == set(range(20))
        assert not source.active

    run(test)


def test_what_is_made_together_travels_together() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        await fleet.start(EchoSource(eos_id=0))
        num_messages = 0
        await collect(backbones, "first", [1], SamplingParams(max_tokens=1))
        [stream] = backbones._streams.values()
        deliver = stream._deliver

        def count(message: Any) -> None:
            nonlocal num_messages
            num_messages += 1
            deliver(message)

        stream._deliver = count  # type: ignore[method-assign]
        await asyncio.gather(*(collect(backbones, f"r{n}", [1], ENDLESS) for n in range(16)))
        assert num_messages < 16 * 900 / 4

    run(test)


def test_closing_the_generator_or_the_gateway_frees_the_request() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        source = EchoSource(eos_id=0, pause=0.01)
        await fleet.start(source)
        async with aclosing(backbones.generate("r1", [1], ENDLESS)) as outputs:
            await anext(outputs)
            assert source.active == {"r1"}
        await until(lambda: not source.active)
        left = backbones.generate("r2", [1], ENDLESS)
        await anext(left)
        await backbones.stop()
        await until(lambda: not source.active)
        with pytest.raises(ApiError, match="The gateway that answers this request is stopping; try again"):
            await anext(left)

    run(test)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_an_idle_stream_that_its_backbone_ended_leaves_no_task(how: str) -> None:
    async def test(fleet: Fleet, _: BackbonePool) -> None:
        server = await fleet.start(EchoSource(eos_id=0))
        [(endpoint, _)] = fleet.servers
        before = asyncio.all_tasks()
        stream = BackboneStream(endpoint)
        await stream.open()
        assert [output async for output in stream.generate("r1", [1], SamplingParams(max_tokens=1), None)]
        assert asyncio.all_tasks() - before
        if how == "stop":
            await server.stop()
        await fleet.kill(server)
        await until(lambda: not stream.is_open)
        await stream.close()
        async with asyncio.timeout(30):
            await until(lambda: asyncio.all_tasks() <= before)

    run(test)


def test_a_refusal_keeps_its_type() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        await fleet.start(EchoSource(eos_id=0, fails=EngineOverloaded("Full.", 9)))
        with pytest.raises(EngineOverloaded, match="Full") as raised:
            await collect(backbones, "r1", [1], ENDLESS)
        assert raised.value.retry_after == 9

    run(test)


def test_a_deadline_reaches_the_engine() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        source = EchoSource(eos_id=0)
        await fleet.start(source)
        async for _ in backbones.generate("r1", [1], SamplingParams(max_tokens=1), timeout=100.0):
            pass
        [timeout] = source.timeouts
        assert timeout
        assert 50 < timeout <= 100

    run(test)


def test_requests_go_where_fewest_are() -> None:
    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        sources = [EchoSource(eos_id=0, pause=0.01) for _ in range(2)]
        for source in sources:
            await fleet.start(source)
        streams = [backbones.generate(f"r{n}", [1], ENDLESS) for n in range(6)]
        for stream in streams:
            await anext(stream)
        assert [len(source.active) for source in sources] == [3, 3]
        for stream in streams:
            await stream.aclose()

    run(test)


def test_where_no_other_backbone_comes_a_request_fails_in_a_sentence_and_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backbone_pool, "STATUS_TTL_S", 0.05)
    monkeypatch.setattr(failover, "RESUME_WAIT_S", 0.5)

    async def test(fleet: Fleet, backbones: BackbonePool) -> None:
        first = await fleet.start(EchoSource(eos_id=0, pause=0.01))
        doomed = backbones.generate("r1", [1], ENDLESS)
        await anext(doomed)
        await fleet.kill(first)
        with pytest.raises(ApiError, match=r"is gone, and no other backbone was found within 0\.5 s") as raised:
            async for _ in doomed:
                pass
        assert raised.value.refusal is ApiRefusal.UNAVAILABLE
        await asyncio.sleep(0.1)
        with pytest.raises(ApiError, match="No backbone answers"):
            await collect(backbones, "r2", [1], SamplingParams(max_tokens=1))
        await fleet.start(EchoSource(eos_id=0))
        await asyncio.sleep(0.1)
        assert len(await collect(backbones, "r3", [1], SamplingParams(max_tokens=2))) == 2

    run(test)
