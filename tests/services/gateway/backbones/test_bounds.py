"""The tests check the limits of the stream between gateway and backbone.

The cases are a gateway that reads no outputs, outputs that are too large, and a host that disappears.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc
import pytest

from protos.expertmesh.engine.v1 import engine_pb2 as pb
from protos.expertmesh.engine.v1 import engine_pb2_grpc
from protos.options import CHANNEL_OPTIONS, KEEPALIVE, SERVER_OPTIONS
from services.engine import server
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import FinishReason, TokenLogprob, TokenOutput
from services.engine.contract.wire import start_to_proto
from services.engine.server import EngineServer
from services.gateway.backbones import backbone_stream
from services.gateway.backbones.backbone_stream import BackboneLost, BackboneStream

PARAMS = SamplingParams(max_tokens=1000)
IDS = tuple(range(500, 1500))


class Flood:
    """A `Flood` generates `num_outputs` large outputs for each request.

    If `num_outputs` is None, the outputs of a request never end.
    """

    def __init__(self, num_outputs: int | None = None) -> None:
        self.num_outputs, self.active, self.num_made = num_outputs, set[str](), 0
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    async def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, *_: object
    ) -> AsyncGenerator[TokenOutput, None]:
        self.active.add(request_id)
        try:
            for n in itertools.count(1) if self.num_outputs is None else range(1, self.num_outputs + 1):
                self.num_made += 1
                reason = FinishReason.LENGTH if n == self.num_outputs else None
                yield TokenOutput(request_id, IDS, reason, 1, n, prompt_logprobs=self.prompt_logprobs)
                await asyncio.sleep(0)
        finally:
            self.active.discard(request_id)


def run(test: Callable[[str, Flood], Awaitable[None]], flood: Flood) -> None:
    async def bounded() -> None:
        serving = EngineServer(flood, "127.0.0.1")
        try:
            await asyncio.wait_for(test(await serving.start(), flood), 60)
        finally:
            await serving.stop()

    asyncio.run(bounded())


async def opened(endpoint: str) -> BackboneStream:
    stream = BackboneStream(endpoint)
    await stream.open()
    return stream


async def collect(stream: BackboneStream, request_id: str) -> list[TokenOutput]:
    return [output async for output in stream.generate(request_id, [1], PARAMS, None)]


def test_a_gateway_that_takes_no_outputs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "MAX_UNSENT_OUTPUTS", 300)

    async def test(endpoint: str, flood: Flood) -> None:
        async with grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
            call = engine_pb2_grpc.EngineStub(channel).Converse()  # type: ignore[no-untyped-call]
            for name in ("r1", "r2"):
                await call.write(pb.Command(start=start_to_proto(name, [1], PARAMS, None)))
            while not flood.num_made:
                await asyncio.sleep(0.01)
            while flood.active:
                await asyncio.sleep(0.01)
            num_made = flood.num_made
            await asyncio.sleep(0.1)
            assert flood.num_made == num_made
            call.cancel()
        flood.num_outputs = 3
        healthy = await opened(endpoint)
        assert len(await collect(healthy, "r3")) == 3
        await healthy.close()

    run(test, Flood())
    assert "A gateway does not read its outputs; its 2 requests are cancelled." in caplog.text


def test_what_is_made_at_once_leaves_in_messages_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_OUTPUTS_BYTES", 10_000)
    sizes: list[int] = []

    async def test(endpoint: str, _: Flood) -> None:
        stream = await opened(endpoint)
        deliver = stream._deliver

        def measure(message: pb.Outputs) -> None:
            sizes.append(message.ByteSize())
            deliver(message)

        stream._deliver = measure  # type: ignore[method-assign]
        answers = await asyncio.gather(*(collect(stream, f"r{n}") for n in range(20)))
        for outputs in answers:
            assert [output.num_generated for output in outputs] == list(range(1, 31))
            assert {output.token_ids for output in outputs} == {IDS}
        await stream.close()

    run(test, Flood(30))
    assert max(sizes) <= 10_000 + 2 * len(IDS) + 100, "a message exceeds the bound by at most one output"
    assert len(sizes) < 20 * 30, "several outputs share a message"


def test_prompt_logprobs_beyond_a_message_end_their_own_request_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_MESSAGE_BYTES", 100_000)

    async def test(endpoint: str, flood: Flood) -> None:
        stream = await opened(endpoint)
        other = asyncio.create_task(collect(stream, "other"))
        await asyncio.sleep(0)
        flood.prompt_logprobs = (None, *[TokenLogprob(7, -0.1, 2, ((8, -0.05), (7, -0.1)))] * 5000)
        with pytest.raises(ValueError, match="prompt_logprobs of this prompt are too many to send"):
            await collect(stream, "large")
        flood.prompt_logprobs = ()
        with suppress(ValueError):  # the outputs of `other` may also have had the long prompt_logprobs
            await other
        assert len(await collect(stream, "after")) == 3
        assert stream.is_open
        await stream.close()

    run(test, Flood(3))


class Cable:
    """A `Cable` is a TCP proxy that stands for the network cable between two hosts.

    After a test has set `is_pulled`, the proxy drops all bytes and closes no connection.
    """

    def __init__(self, endpoint: str) -> None:
        self._host, _, port = endpoint.rpartition(":")
        self._port, self._tasks = int(port), set[asyncio.Task[None]]()
        self._ends: list[asyncio.StreamWriter] = []
        self.is_pulled = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._ends += [writer, far_writer]
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._carry(source, target))
            self._tasks.add(task)

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            if not self.is_pulled:
                target.write(data)
        target.close()

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for end in self._ends:
            end.close()
        await asyncio.gather(*self._tasks, *(end.wait_closed() for end in self._ends), return_exceptions=True)


@pytest.mark.parametrize("quick", ["gateway", "backbone"])
def test_either_end_finds_out_that_the_others_host_is_gone(monkeypatch: pytest.MonkeyPatch, quick: str) -> None:
    def faster(options: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
        assert set(KEEPALIVE) <= set(options)
        sooner = {name: value // 10 for name, value in KEEPALIVE if name.endswith("_ms")}
        return tuple((dict(options) | sooner).items())

    if quick == "gateway":
        monkeypatch.setattr(backbone_stream, "CHANNEL_OPTIONS", faster(CHANNEL_OPTIONS))
    else:
        monkeypatch.setattr(server, "SERVER_OPTIONS", faster(SERVER_OPTIONS))

    class Slow(Flood):
        async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[TokenOutput, None]:
            async for output in super().generate(*args, **kwargs):
                yield output
                await asyncio.sleep(60)

    async def test(endpoint: str, flood: Flood) -> None:
        cable = Cable(endpoint)
        stream = await opened(await cable.start())
        outputs = stream.generate("r", [1], PARAMS, None)
        await anext(outputs)
        cable.is_pulled = True
        if quick == "gateway":
            with pytest.raises(BackboneLost):
                await asyncio.wait_for(anext(outputs), 15)
            assert not stream.is_open
        else:
            async with asyncio.timeout(15):
                while flood.active:
                    await asyncio.sleep(0.05)
        await stream.close()
        await cable.stop()

    run(test, Slow())
