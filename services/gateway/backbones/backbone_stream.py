"""A `BackboneStream` is one gRPC stream that carries all requests between a gateway and a backbone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import grpc

from protos.expertmesh.engine.v1 import engine_pb2 as pb
from protos.expertmesh.engine.v1 import engine_pb2_grpc
from protos.options import CHANNEL_OPTIONS
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.engine.contract.wire import failure_from_proto, output_from_proto, start_to_proto

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0  # seconds after which an attempt to connect to a backbone fails
# Seconds that the gateway waits after a request's deadline until the gateway fails the request. A backbone checks
# deadlines between its steps, so a backbone that has not failed the request by then hangs.
DEADLINE_GRACE_S = 0.5
INLINE_SCORES = 1024  # outputs with more logprobs of a prompt are read in a thread; reading this many takes about 2 ms


class BackboneLost(Exception):
    """A `BackboneLost` is raised when the stream to a backbone ends before a request on the stream has ended.

    `is_handover` is True if the backbone ended the stream without an error, as every backbone does when it is told to
    stop.
    """

    def __init__(self, reason: str, is_handover: bool = False) -> None:
        super().__init__(reason)
        self.is_handover = is_handover


class BackboneStream:
    """A `BackboneStream` sends requests to one backbone and receives their outputs.

    A stream must be used on the event loop that created the stream. A broken stream is not repaired: `BackbonePool`
    opens a new stream.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.is_open = endpoint, False
        self.silent_s = 0.0  # seconds since the last message from the backbone, counted by `BackbonePool`
        self._commands: asyncio.Queue[pb.Command | None] = asyncio.Queue()  # None comes last, once the stream has ended
        self._inboxes: dict[str, asyncio.Queue[pb.Output | None]] = {}
        self._channel = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        self._task: asyncio.Task[None] | None = None
        self._reason, self._is_handover = "the stream was closed", False

    @property
    def num_requests(self) -> int:
        return len(self._inboxes)

    async def open(self) -> None:
        """Connect to the backbone. Raises TimeoutError if the backbone does not answer within CONNECT_TIMEOUT_S."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await self._channel.channel_ready()
        self.is_open = True
        self._task = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """Close the stream. Requests that have not ended fail with BackboneLost."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()

    def give_up(self, reason: str) -> None:
        """Close the stream without waiting for the backbone, and report `reason` in the log and in BackboneLost.

        If the backbone only hangs and later runs again, the backbone cancels the requests of the stream.
        """
        self._reason, self.is_open = reason, False
        if self._task is not None:
            self._task.cancel()

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None,
        sent_token_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[TokenOutput, None]:
        """Yield the outputs of one request, in the order in which the backbone sends the outputs.

        `sent_token_ids` are the tokens of the answer that earlier backbones have already sent, or None if this is the
        request's first backbone. Raises the exceptions of `Engine.generate`. If the stream ends early, raises
        BackboneLost after all received outputs were yielded.
        """
        start = start_to_proto(request_id, prompt_token_ids, params, timeout, sent_token_ids)
        inbox = self._inboxes[request_id] = asyncio.Queue[pb.Output | None]()
        self._commands.put_nowait(pb.Command(start=start))
        if not self.is_open:
            inbox.put_nowait(None)
        alarm = None if timeout is None else _set_alarm(timeout, inbox)
        is_over = False
        try:
            while not is_over:
                message = await inbox.get()
                if message is None:
                    raise BackboneLost(self._reason, self._is_handover)
                if message.HasField("failure"):
                    raise failure_from_proto(message.failure)
                is_over = bool(message.finish_reason)
                if len(message.prompt_logprobs) > INLINE_SCORES:
                    yield await asyncio.to_thread(output_from_proto, message)
                else:
                    yield output_from_proto(message)
        finally:
            self._inboxes.pop(request_id, None)
            if alarm:
                alarm.cancel()
            if not is_over:
                self._commands.put_nowait(pb.Command(cancel=request_id))

    async def _listen(self) -> None:
        try:
            call = engine_pb2_grpc.EngineStub(self._channel).Converse(self._send())  # type: ignore[no-untyped-call]
            async for message in call:
                self._deliver(message)
            self._reason, self._is_handover = "the backbone ended the stream", True
        except grpc.aio.AioRpcError as error:
            self._reason = str(error.details())
        finally:
            self.is_open = False
            log.warning("The stream to the backbone %s is down: %s.", self.endpoint, self._reason)
            # When a backbone ends a stream, grpc.aio does not cancel the task that waits for the next command. The task
            # would wait for ever, so it is told to end.
            self._commands.put_nowait(None)
            for inbox in self._inboxes.values():
                inbox.put_nowait(None)

    def _deliver(self, message: pb.Outputs) -> None:
        self.silent_s = 0.0
        for output in message.outputs:
            if inbox := self._inboxes.get(output.request_id):  # a request that was cancelled has no inbox any more
                inbox.put_nowait(output)

    async def _send(self) -> AsyncIterator[pb.Command]:
        while (command := await self._commands.get()) is not None:
            yield command


def _set_alarm(timeout: float, inbox: asyncio.Queue[pb.Output | None]) -> asyncio.TimerHandle:
    """Put a failure into the `inbox` of a request DEADLINE_GRACE_S seconds after the request's deadline.

    The deadline is in `timeout` seconds. The caller must cancel the returned timer when the request ends.
    """
    sentence = "The request's deadline passed, and its backbone did not report it."
    failure = pb.Failure(kind=pb.Failure.DEADLINE, message=sentence)
    loop = asyncio.get_running_loop()
    return loop.call_later(timeout + DEADLINE_GRACE_S, inbox.put_nowait, pb.Output(failure=failure))
