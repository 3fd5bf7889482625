"""The inference service of inference.proto: the semantics of the REST surface, typed.

The methods are plain coroutines, because Ray Serve's gRPC proxy calls them on the ingress deployment by their name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services.engine.request import FinishReason
from services.gateway.errors import ApiError, Refusal, invalid, unexpected
from services.gateway.generation import Generation, Health, Job, Prompt, TextDelta
from services.gateway.text import Chat, ChatMessage

MAX_REQUEST_ID_LEN = 128
SERVICES = ("", "expertmesh.inference.v1.Inference")
ROLES = ("system", "user", "assistant")
FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class GrpcError(Exception):
    """A status for the client: a code and one sentence."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    def __reduce__(self) -> tuple[type[GrpcError], tuple[grpc.StatusCode, str]]:
        return GrpcError, (self.code, self.message)  # it travels from the replica to Serve's proxy


@dataclass(frozen=True)
class _Head:
    """What every message of one answer repeats."""

    request_id: str
    model: str
    created: int

    def fields(self) -> dict[str, Any]:
        return {"request_id": self.request_id, "model": self.model, "created": self.created}


class InferenceApi:
    def __init__(self, generation: Generation, health: Callable[[], Awaitable[Health]]) -> None:
        self._generation, self._health = generation, health

    async def generate(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        with self._errors():
            head, job = await self._prepare(request)
            deltas = [delta async for delta in self._generation.stream([job])]
            choice = _choice("".join(delta.text for delta in deltas), deltas)
            return pb.GenerateResponse(**head.fields(), choices=[choice], usage=_usage(deltas[-1]))

    async def generate_stream(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateChunk, None]:
        with self._errors():
            head, job = await self._prepare(request)
            async with aclosing(self._generation.stream([job])) as deltas:
                async for delta in deltas:
                    usage = _usage(delta) if delta.finish_reason else None
                    yield pb.GenerateChunk(**head.fields(), choice=_choice(delta.text, [delta]), usage=usage)

    async def list_models(self, _: pb.ListModelsRequest) -> pb.ListModelsResponse:
        card = self._generation.card
        model = pb.Model(id=card.id, created=card.created, owned_by=card.owned_by, max_model_len=card.max_model_len)
        return pb.ListModelsResponse(models=[model])

    async def check(self, request: HealthCheckRequest) -> HealthCheckResponse:
        """grpc.health.v1: a degraded server serves."""
        with self._errors():
            if request.service not in SERVICES:
                allowed = " or ".join(map(repr, SERVICES))
                raise ApiError(Refusal.NOT_FOUND, f"service must be {allowed}, not {request.service!r}.")
            is_ready = (await self._health()).is_ready
        return HealthCheckResponse(status=HealthCheckResponse.SERVING if is_ready else HealthCheckResponse.NOT_SERVING)

    async def _prepare(self, request: pb.GenerateRequest) -> tuple[_Head, Job]:
        generation = self._generation
        generation.check_model(request.model)
        head = _Head(_request_id(request), generation.card.id, int(time.time()))
        return head, await generation.prepare(_prompt(request), _sampling(request.sampling))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            known = error if isinstance(error, ApiError) else unexpected(error)
            self._generation.metrics.count_refused(known.refusal.label)
            raise GrpcError(known.refusal.grpc_code, known.message) from error


def _request_id(request: pb.GenerateRequest) -> str:
    if len(request.request_id) > MAX_REQUEST_ID_LEN:
        raise invalid(f"request_id must be at most {MAX_REQUEST_ID_LEN} characters long.", "request_id")
    return request.request_id or f"gen-{uuid.uuid4().hex}"


def _prompt(request: pb.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids":
            return list(request.token_ids.ids)
        case "chat":
            return _chat(request.chat)
    raise invalid("prompt is missing; one of text, token_ids and chat must be set.", "prompt")


def _chat(chat: pb.Chat) -> Chat:
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            name = f"messages[{index}].role"
            raise invalid(f"{name} must be 'system', 'user' or 'assistant', not {message.role!r}.", name)
    return Chat(tuple(ChatMessage(message.role, message.content) for message in chat.messages))


def _sampling(sampling: pb.SamplingParams) -> dict[str, Any]:
    """The fields of SamplingParams that the client set."""
    given = {field.name: value for field, value in sampling.ListFields()}
    return {name: tuple(value) if name in ("stop", "stop_token_ids") else value for name, value in given.items()}


def _choice(text: str, deltas: list[TextDelta]) -> pb.Choice:
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    return pb.Choice(text=text, token_ids=token_ids, finish_reason=FINISH_REASONS[deltas[-1].finish_reason])


def _usage(delta: TextDelta) -> pb.Usage:
    total = delta.num_prompt + delta.num_generated
    return pb.Usage(prompt_tokens=delta.num_prompt, completion_tokens=delta.num_generated, total_tokens=total)
