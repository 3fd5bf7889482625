"""An `EngineServer` serves an engine over gRPC; each gateway opens one stream for all its requests.

The cost of a message hardly depends on its size: in grpc.aio, even a small message takes about 150 µs of a core at the
sender and at the receiver. Therefore the server sends the outputs of one step for all requests of a gateway in one
message. The server does not delay a message in order to fill the message.
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
MAX_OUTPUTS_BYTES = MAX_MESSAGE_BYTES // 4  # bytes after which a message of outputs is full; one output may be larger
MAX_UNSENT_OUTPUTS = 1 << 16  # if more outputs wait for a gateway, the gateway's requests are cancelled
HEARTBEAT_S = 0.2  # seconds between two heartbeats, which are sent even if the engine has no outputs
STOP_GRACE_S = 0.2  # seconds that streams have for their last outputs when the server stops


class TokenGenerator(Protocol):
    """A `TokenGenerator` generates tokens for a server; it is an `Engine`, or a simpler generator in tests."""

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None = None,
        sent_token_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[TokenOutput, None]:
        """Yield the tokens of a request; `services.engine.engine.Engine.generate` documents arguments and errors."""


class _GatewayStream:
    """A `_GatewayStream` holds the requests of one gateway, and the outputs that were not sent to the gateway yet."""

    def __init__(self, engine: TokenGenerator) -> None:
        self._engine = engine
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._outbox: deque[pb.Output] = deque()
        self._wake = asyncio.Event()
        self.is_over = False

    async def read(self, commands: AsyncIterator[pb.Command]) -> None:
        """Carry out the gateway's commands until the gateway ends the stream."""
        try:
            async for command in commands:
                if self.is_over:
                    return
                self._carry_out(command)
        finally:
            self.end()

    async def beat(self) -> None:
        """Cause a message every HEARTBEAT_S seconds, because a gateway treats a backbone without messages as dead."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._wake.set()

    def end(self) -> None:
        """End the stream after the current message; the gateway then continues the requests at other backbones."""
        self.is_over = True
        self._wake.set()

    def _carry_out(self, command: pb.Command) -> None:
        if command.HasField("start"):
            request_id = command.start.request_id
            self._tasks[request_id] = asyncio.create_task(self._run(command.start))
        elif task := self._tasks.get(command.cancel):
            task.cancel()

    async def outputs(self) -> pb.Outputs:
        """Wait for outputs or a heartbeat, and return a message with as many unsent outputs as one message may hold.

        After a heartbeat without outputs, the message is empty.
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
        """Cancel the gateway's requests and wait until all of them have ended."""
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
            log.warning("A gateway does not read its outputs; its %d requests are cancelled.", len(self._tasks))
            self.is_over = True
            self._outbox.clear()
            for task in self._tasks.values():
                task.cancel()
        self._wake.set()


class EngineService(engine_pb2_grpc.EngineServicer):
    """An `EngineService` implements the gRPC service `Engine`, with one `_GatewayStream` per call."""

    def __init__(self, engine: TokenGenerator) -> None:
        self._engine = engine
        self._streams: set[_GatewayStream] = set()

    def end(self) -> None:
        """End the stream of every gateway after the current message of the stream."""
        for stream in self._streams:
            stream.end()

    async def Converse(self, requests: AsyncIterator[pb.Command], context: Context) -> AsyncIterator[pb.Outputs]:
        """Serve one gateway until the gateway or the server ends the stream."""
        stream = _GatewayStream(self._engine)
        self._streams.add(stream)
        tasks = [asyncio.create_task(work) for work in (stream.read(requests), stream.beat())]
        try:
            while not stream.is_over:
                yield await stream.outputs()
        finally:
            self._streams.discard(stream)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await stream.close()


class EngineServer:
    """An `EngineServer` serves one engine to all gateways; `start` and `stop` must be called on the same event loop."""

    def __init__(self, engine: TokenGenerator, host: str) -> None:
        self._engine, self._host = engine, host

    async def start(self) -> str:
        """Start the gRPC server on a free port and return its address as host:port."""
        self._server, self._service = grpc.aio.server(options=SERVER_OPTIONS), EngineService(self._engine)
        engine_pb2_grpc.add_EngineServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
        port = self._server.add_insecure_port(f"{self._host}:0")
        await self._server.start()
        return f"{self._host}:{port}"

    async def stop(self) -> None:
        """Stop serving, so that gateways continue their requests with other backbones."""
        stopping = asyncio.create_task(self._server.stop(STOP_GRACE_S))
        await asyncio.sleep(0)  # the server must refuse new streams before the open streams end
        self._service.end()
        await stopping
