"""The gRPC end of an engine: one stream per gateway, on which all of its requests travel.

Messages cost, bytes do not (reference: a message of grpc.aio takes some 150 µs of a core on either side, however
small). So what one step made for all requests of a gateway leaves in one message, and nothing waits to fill it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Protocol

import grpc

from protos.expertmesh.engine.v1 import engine_pb2 as pb
from protos.expertmesh.engine.v1 import engine_pb2_grpc
from protos.options import MAX_MESSAGE_BYTES, SERVER_OPTIONS
from services.engine.contract.errors import EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.engine.contract.wire import failure_to_proto, output_to_proto, params_from_proto

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[object, object]
MAX_OUTPUTS_BYTES = MAX_MESSAGE_BYTES // 4  # of one message, as far as it holds more than one output
MAX_UNSENT_OUTPUTS = 1 << 16  # a gateway that takes none for so long is given up
HEARTBEAT_S = 0.2  # from one sign of life to the next, whatever the engine does meanwhile
STOP_GRACE_S = 0.2  # for the last outputs on streams


class Generator(Protocol):
    """The engine. Closing the generator frees what the request holds."""

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None = None,
        sent_token_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[TokenOutput, None]: ...


class _GatewayStream:
    """One gateway's requests, and their outputs that have not left yet."""

    def __init__(self, engine: Generator) -> None:
        self._engine = engine
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._outbox: deque[pb.Output] = deque()
        self._wake = asyncio.Event()
        self.is_over = False

    async def read(self, commands: AsyncIterator[pb.Command]) -> None:
        try:
            async for command in commands:
                if self.is_over:
                    return
                self._obey(command)
        finally:
            self.end()

    async def beat(self) -> None:
        """An empty message now and then: a gateway takes silence for the end."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._wake.set()

    def end(self) -> None:
        """What was made leaves, and then the stream ends; so others know that they may go on with its requests."""
        self.is_over = True
        self._wake.set()

    def _obey(self, command: pb.Command) -> None:
        if command.HasField("start"):
            request_id = command.start.request_id
            self._tasks[request_id] = asyncio.create_task(self._run(command.start))
        elif task := self._tasks.get(command.cancel):
            task.cancel()

    async def outputs(self) -> pb.Outputs:
        """What was made since the last call, or what of it a message has room for, as soon as there is something.

        Nothing at times, as a sign of life.
        """
        await self._wake.wait()
        taken, num_bytes = pb.Outputs(), 0
        while self._outbox and num_bytes < MAX_OUTPUTS_BYTES:
            output = self._outbox.popleft()
            num_bytes += output.ByteSize()
            taken.outputs.append(output)
        if not self._outbox:
            self._wake.clear()
        return taken

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, start: pb.Start) -> None:
        timeout_s = start.timeout_s if start.HasField("timeout_s") else None
        try:
            params = params_from_proto(start.params)
            sent = list(start.resume.token_ids) if start.HasField("resume") else None
            stream = self._engine.generate(start.request_id, list(start.prompt_token_ids), params, timeout_s, sent)
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    self._send(output_to_proto(output))
        except Exception as error:
            if not isinstance(error, (ValueError, TimeoutError, EngineOverloaded, EngineFailed)):
                log.exception("Request %s failed.", start.request_id, extra={"request_id": start.request_id})
            self._send(pb.Output(request_id=start.request_id, failure=failure_to_proto(error)))
        finally:
            self._tasks.pop(start.request_id, None)

    def _send(self, output: pb.Output) -> None:
        if output.prompt_logprobs and output.ByteSize() > MAX_MESSAGE_BYTES // 2:
            raise ValueError("prompt_logprobs of this prompt are too many to send; ask for fewer, or for none.")
        self._outbox.append(output)
        if len(self._outbox) > MAX_UNSENT_OUTPUTS:
            log.warning("A gateway takes no outputs: its %d requests are given up.", len(self._tasks))
            self.is_over = True
            self._outbox.clear()
            for task in self._tasks.values():
                task.cancel()
        self._wake.set()


class EngineService(engine_pb2_grpc.EngineServicer):
    def __init__(self, engine: Generator) -> None:
        self._engine = engine
        self._conversations: set[_GatewayStream] = set()

    def end(self) -> None:
        """Ends every stream in good order."""
        for conversation in self._conversations:
            conversation.end()

    async def Converse(self, requests: AsyncIterator[pb.Command], context: Context) -> AsyncIterator[pb.Outputs]:
        conversation = _GatewayStream(self._engine)
        self._conversations.add(conversation)
        tasks = [asyncio.create_task(work) for work in (conversation.read(requests), conversation.beat())]
        try:
            while not conversation.is_over:
                yield await conversation.outputs()
        finally:
            self._conversations.discard(conversation)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await conversation.close()


class EngineServer:
    """Serves one engine; `start` and `stop` belong to one event loop."""

    def __init__(self, engine: Generator, host: str) -> None:
        self._engine, self._host = engine, host

    async def start(self) -> str:
        """Listens on a free port; returns host:port."""
        self._server, self._service = grpc.aio.server(options=SERVER_OPTIONS), EngineService(self._engine)
        engine_pb2_grpc.add_EngineServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
        port = self._server.add_insecure_port(f"{self._host}:0")
        await self._server.start()
        return f"{self._host}:{port}"

    async def stop(self) -> None:
        """Hands its requests over: gateways go on with them elsewhere."""
        stopping = asyncio.create_task(self._server.stop(STOP_GRACE_S))
        await asyncio.sleep(0)  # it accepts no more streams by then
        self._service.end()
        await stopping
