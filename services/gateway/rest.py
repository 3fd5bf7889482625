"""OpenAI's REST surface as a FastAPI application."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from openai.types import CompletionUsage, Model
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from services.gateway import openai_api
from services.gateway.connection import ClientGone, EventStream, read_body, unless_gone
from services.gateway.errors import ApiError, Refusal, unexpected
from services.gateway.generation import Generation, Health, Job, ModelCard, TextDelta
from services.gateway.openai_api import Answer, Body, ChatBody, CompletionBody, Tally

MAX_BODY_BYTES = 4 * 2**20
CLIENT_GONE = 499  # nginx's number for it; nobody is there to read it
DONE = "data: [DONE]\n\n"

HealthCheck = Callable[[], Awaitable[Health]]
MoreMetrics = Callable[[], Awaitable[bytes]]


@dataclass(frozen=True)
class Dialect:
    """What differs between the two ways to ask for text."""

    body: type[CompletionBody] | type[ChatBody]
    id_prefix: str
    whole: Callable[[Answer, list[tuple[str, str]], CompletionUsage], str]
    chunk: Callable[[Answer, TextDelta], str]
    is_chat: bool


COMPLETIONS = Dialect(CompletionBody, "cmpl", openai_api.completion, openai_api.completion_chunk, is_chat=False)
CHAT = Dialect(ChatBody, "chatcmpl", openai_api.chat_completion, openai_api.chat_chunk, is_chat=True)


def build_rest(
    generation: Generation,
    health: HealthCheck,
    more_metrics: MoreMetrics | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The application; `more_metrics` returns further lines in Prometheus' format, such as the engine's."""
    app = FastAPI(title="Expertmesh", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    surface = Rest(generation, max_body_bytes)
    app.add_api_route("/v1/completions", surface.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", surface.chat_completions, methods=["POST"])
    app.add_api_route("/v1/models", surface.models, methods=["GET"])
    app.add_api_route("/v1/models/{model_id:path}", surface.model, methods=["GET"])
    _add_operations(app, generation, health, more_metrics)
    _add_error_handlers(app, generation)
    return app


class Rest:
    def __init__(self, generation: Generation, max_body_bytes: int) -> None:
        self._generation, self._max_body_bytes = generation, max_body_bytes

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, COMPLETIONS)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, CHAT)

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(self._generation.card)]})

    async def model(self, model_id: str) -> JSONResponse:
        self._generation.check_model(model_id)
        return JSONResponse(_model(self._generation.card))

    async def _answer(self, request: Request, dialect: Dialect) -> Response:
        try:
            data = await read_body(request, self._max_body_bytes)
            body = openai_api.parse_body(dialect.body, data)
            return await unless_gone(request.receive, self._respond(body, dialect))
        except ClientGone:
            return Response(status_code=CLIENT_GONE)

    async def _respond(self, body: Body, dialect: Dialect) -> Response:
        generation = self._generation
        generation.check_model(body.model)
        jobs = [await generation.prepare(prompt, body.sampling()) for prompt in body.prompts()]
        answer = Answer(f"{dialect.id_prefix}-{uuid.uuid4().hex}", int(time.time()), generation.card.id)
        if body.stream:
            return await self._stream(answer, jobs, dialect, body.include_usage)
        texts, usage = await _collect(generation.stream(jobs), len(jobs))
        return Response(dialect.whole(answer, texts, usage), media_type="application/json")

    async def _stream(self, answer: Answer, jobs: list[Job], dialect: Dialect, include_usage: bool) -> EventStream:
        deltas = self._generation.stream(jobs)
        # The status line waits for the first token, because a refusal by the engine needs its own.
        first = await anext(deltas)
        return EventStream(self._events(answer, first, deltas, dialect, include_usage))

    async def _events(
        self,
        answer: Answer,
        first: TextDelta,
        deltas: AsyncGenerator[TextDelta, None],
        dialect: Dialect,
        include_usage: bool,
    ) -> AsyncGenerator[str, None]:
        tally = Tally()
        try:
            async with aclosing(deltas):
                if dialect.is_chat:
                    yield _event(openai_api.role_chunk(answer, first.index))
                delta: TextDelta | None = first
                while delta is not None:
                    tally.add(delta)
                    if delta.text or delta.finish_reason:
                        yield _event(dialect.chunk(answer, delta))
                    delta = await anext(deltas, None)
            if include_usage:
                yield _event(openai_api.usage_chunk(answer, tally.usage(), dialect.is_chat))
        except ApiError as error:
            self._generation.metrics.count_refused(error.refusal.label)
            yield _event(json.dumps(error.to_json()))
        yield DONE


async def _collect(
    deltas: AsyncGenerator[TextDelta, None], num_jobs: int
) -> tuple[list[tuple[str, str]], CompletionUsage]:
    pieces: list[list[str]] = [[] for _ in range(num_jobs)]
    reasons = [""] * num_jobs
    tally = Tally()
    async with aclosing(deltas):
        async for delta in deltas:
            tally.add(delta)
            pieces[delta.index].append(delta.text)
            reasons[delta.index] = delta.finish_reason or ""
    return [("".join(text), reason) for text, reason in zip(pieces, reasons, strict=True)], tally.usage()


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _model(card: ModelCard) -> dict[str, Any]:
    model = Model(id=card.id, created=card.created, object="model", owned_by=card.owned_by)
    return {**model.model_dump(), "max_model_len": card.max_model_len}


def _add_operations(
    app: FastAPI, generation: Generation, health: HealthCheck, more_metrics: MoreMetrics | None
) -> None:
    @app.get("/health/live")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        now = await health()
        status = "not_ready" if not now.is_ready else "degraded" if now.is_degraded else "ready"
        return JSONResponse({"status": status, "detail": now.detail}, 200 if now.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        more = await more_metrics() if more_metrics else b""
        return Response(generation.metrics.to_text() + more, media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI, generation: Generation) -> None:
    def refuse(error: ApiError) -> JSONResponse:
        generation.metrics.count_refused(error.refusal.label)
        return JSONResponse(error.to_json(), error.refusal.status, error.headers)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return refuse(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return refuse(_routing_error(request, error))

    @app.exception_handler(Exception)
    async def on_unexpected(_: Request, error: Exception) -> JSONResponse:
        return refuse(unexpected(error))


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    """FastAPI itself raises only for a path or a method that it does not know."""
    path = request.url.path
    if error.status_code == Refusal.METHOD.status:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(Refusal.METHOD, f"{path} must be asked with {allowed}, not {request.method}.")
    return ApiError(Refusal.NOT_FOUND, f"There is no {path} here; /v1/models tells what is served.")
