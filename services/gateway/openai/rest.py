"""The REST API is a FastAPI application that offers OpenAI's API."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from services.gateway.chat.text_delta import TextDelta, collect
from services.gateway.chat.token_usage import TokenUsage
from services.gateway.connection import CLIENT_CLOSED_REQUEST, ClientGone, EventStream, read_body, run_while_connected
from services.gateway.errors import ApiError, ApiRefusal, client_errors, unexpected
from services.gateway.generation import Generation, ModelCard
from services.gateway.health import Health
from services.gateway.openai import response
from services.gateway.openai.body import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
    is_chat,
)
from services.gateway.openai.response import ResponseHead
from services.gateway.request_body import parse_body
from services.gateway.request_id import RequestIdMiddleware, check_request_id

MAX_BODY_BYTES = 4 * 2**20
DONE = "data: [DONE]\n\n"

HealthCheck = Callable[[], Awaitable[Health]]
MoreMetrics = Callable[[], Awaitable[bytes]]


def build_rest(
    generation: Generation,
    health: HealthCheck,
    more_metrics: MoreMetrics | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """Return the FastAPI application with all routes for clients.

    `/metrics` shows the request metrics and the result of `more_metrics`, for example the metrics of the engines. The
    result of `more_metrics` must be in Prometheus' text format.
    """
    app = FastAPI(title="Expertmesh", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    surface = Rest(generation, max_body_bytes)
    app.add_middleware(RequestIdMiddleware)
    app.add_api_route("/v1/completions", surface.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", surface.chat_completions, methods=["POST"])
    app.add_api_route("/v1/models", surface.models, methods=["GET"])
    app.add_api_route("/v1/models/{model_id:path}", surface.model, methods=["GET"])
    app.add_api_route("/tokenize", surface.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", surface.detokenize, methods=["POST"])
    _add_operations(app, generation, health, more_metrics)
    _add_error_handlers(app, generation)
    return app


class Rest:
    """A `Rest` handles the requests of the REST API, from parsing the body to formatting the response."""

    def __init__(self, generation: Generation, max_body_bytes: int) -> None:
        self._generation, self._max_body_bytes = generation, max_body_bytes

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionBody)

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, ChatBody)

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(self._generation.card)]})

    async def model(self, model_id: str) -> JSONResponse:
        self._generation.check_model(model_id)
        return JSONResponse(_model(self._generation.card))

    async def tokenize(self, request: Request) -> Response:
        data = await read_body(request, self._max_body_bytes)
        body = parse_body(TokenizeChatBody, data) if is_chat(data) else parse_body(TokenizeBody, data)
        self._generation.check_model(body.model)
        with client_errors():
            token_ids = await self._generation.tokenize(body.request(), body.add_special_tokens)
            shown = await self._generation.token_texts(token_ids) if body.return_token_strs else None
        longest = self._generation.card.max_model_len
        fields = {"count": len(token_ids), "max_model_len": longest, "tokens": token_ids, "token_strs": shown}
        return JSONResponse(fields)

    async def detokenize(self, request: Request) -> Response:
        body = parse_body(DetokenizeBody, await read_body(request, self._max_body_bytes))
        self._generation.check_model(body.model)
        with client_errors():
            return JSONResponse({"prompt": self._generation.detokenize(body.tokens)})

    async def _generate(self, request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        check_request_id(request.state.id, "X-Request-Id")
        body = parse_body(kind, await read_body(request, self._max_body_bytes))
        return await run_while_connected(request.receive, self._respond(body, request.state.id))

    async def _respond(self, body: Body, request_id: str) -> Response:
        generation = self._generation
        generation.check_model(body.model)
        with client_errors():
            choice_requests = await generation.prepare(body.requests())
        head = ResponseHead(
            f"{'chatcmpl' if body.is_chat else 'cmpl'}-{request_id}", int(time.time()), generation.card.id
        )
        deltas = generation.stream(choice_requests, head.id)
        if body.stream:
            # The status line is sent only with the first token. Until then the engine may refuse the request, and a
            # refusal has another status.
            first = await anext(deltas)
            events = self._events(head, body, first, deltas)
            return EventStream(events, response.cache_header(first))
        choices = await collect(deltas, len(choice_requests))
        usage = TokenUsage(body.n or 1)
        for choice in choices:
            usage.add(choice)
        text = _whole_response(head, body, choices, usage)
        return Response(text, media_type="application/json", headers=response.cache_header(choices[0]))

    async def _events(
        self, head: ResponseHead, body: Body, first: TextDelta, deltas: AsyncGenerator[TextDelta, None]
    ) -> AsyncGenerator[str, None]:
        usage, is_open = TokenUsage(body.n or 1), set[int]()
        try:
            async with aclosing(deltas):
                delta: TextDelta | None = first
                while delta is not None:
                    usage.add(delta)
                    if body.is_chat and delta.index not in is_open:
                        is_open.add(delta.index)
                        yield _event(response.role_chunk(head, delta.index))
                    if delta.is_shown:
                        yield _event(_chunk(head, body, delta))
                    delta = await anext(deltas, None)
            if body.include_usage:
                yield _event(response.usage_chunk(head, usage, body.is_chat))
        except ApiError as error:
            self._generation.metrics.count_refused(error.refusal.label)
            yield _event(json.dumps(error.to_json()))
        yield DONE


def _whole_response(head: ResponseHead, body: Body, choices: list[TextDelta], usage: TokenUsage) -> str:
    has_prompt_logprobs = body.prompt_logprobs is not None
    if isinstance(body, ChatBody):
        return response.chat_completion(head, choices, usage, has_prompt_logprobs)
    return response.completion(head, choices, usage, body.echoes_logprobs, has_prompt_logprobs)


def _chunk(head: ResponseHead, body: Body, delta: TextDelta) -> str:
    if isinstance(body, ChatBody):
        return response.chat_chunk(head, delta)
    return response.completion_chunk(head, delta, body.echoes_logprobs)


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _model(card: ModelCard) -> dict[str, Any]:
    fields = {"id": card.id, "object": "model", "created": card.created, "owned_by": card.owned_by}
    return fields | {"max_model_len": card.max_model_len}


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

    @app.exception_handler(ClientGone)
    async def on_client_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return refuse(_routing_error(request, error))

    @app.exception_handler(Exception)
    async def on_unexpected(_: Request, error: Exception) -> JSONResponse:
        return refuse(unexpected(error))


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    """Return the ApiError for an unknown path or method; FastAPI itself reports no other mistakes."""
    path = request.url.path
    if error.status_code == ApiRefusal.METHOD.status:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(ApiRefusal.METHOD, f"{path} must be requested with {allowed}, not {request.method}.")
    return ApiError(ApiRefusal.NOT_FOUND, f"There is no path {path}; /v1/models lists the served models.")
