"""An `OpenAIRoutes` offers completions, chat completions, models and the tokenizer over REST, as OpenAI and vLLM do."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from services.gateway.answer import INLINE_BYTES, Answer, cache_header, read
from services.gateway.chat.token_usage import TokenUsage
from services.gateway.connection import EventStream, read_body, run_while_connected, server_event
from services.gateway.errors import ApiError, client_errors
from services.gateway.generation import Generation, ModelCard
from services.gateway.openai.body import Body, ChatBody, CompletionBody
from services.gateway.openai.response import ChatFormat, CompletionFormat, ResponseHead, usage_fields
from services.gateway.openai.tokenizer_bodies import (
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
    parse_tokenize_body,
)
from services.gateway.ports.openapi import takes
from services.gateway.request_body import parse_body
from services.gateway.request_id import check_request_id
from services.gateway.schema.json_text import dump_list, dumps

INLINE_TOKENS = 1024  # longer lists of tokens are written in a thread; writing this many takes less than 1 ms
INLINE_SCORES = 1024  # responses with more logprobs are written in a thread; writing this many takes about 5 ms
OTHER_COMMAS = 16  # commas in a body for /detokenize that do not stand between token ids
DONE = "data: [DONE]\n\n"


class OpenAIRoutes:
    """An `OpenAIRoutes` handles the requests of OpenAI's API, from parsing the body to formatting the response."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._max_body_bytes = generation.limits.max_body_bytes(generation.card.max_model_len)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to `app`."""
        completion, chat = takes(CompletionBody, streams=True), takes(ChatBody, streams=True)
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], **completion)
        app.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"], **chat)
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/", self.models, methods=["GET"], include_in_schema=False)
        app.add_api_route("/v1/models/{model_id:path}", self.model, methods=["GET"])
        app.add_api_route("/tokenize", self.tokenize, methods=["POST"], **takes(TokenizeBody, TokenizeChatBody))
        app.add_api_route("/detokenize", self.detokenize, methods=["POST"], **takes(DetokenizeBody))

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
        data, limits = await read_body(request, self._max_body_bytes), self._generation.limits
        is_long = len(data) > INLINE_BYTES
        body = await self._generation.threads.run_if(is_long, parse_tokenize_body, data, limits)
        self._generation.check_model(body.model)
        with client_errors():
            asked = await self._generation.threads.run_if(is_long, body.request)
            token_ids = await self._generation.tokenize(asked, body.adds_special_tokens)
            shown = await self._generation.token_texts(token_ids) if body.return_token_strs else None
        has_many = len(token_ids) > INLINE_TOKENS
        lists = [await self._generation.threads.run_if(has_many, dump_list, values) for values in (token_ids, shown)]
        fields = {"count": len(token_ids), "max_model_len": self._generation.card.max_model_len}
        text = f'{dumps(fields)[:-1]}, "tokens": {lists[0]}, "token_strs": {lists[1]}}}'
        return Response(text, media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        data, limits = await read_body(request, self._max_body_bytes), self._generation.limits
        self._generation.check_num_ids(data.count(b",") - OTHER_COMMAS)  # before the ids are parsed
        body = await self._generation.threads.run_if(len(data) > INLINE_BYTES, parse_body, DetokenizeBody, data, limits)
        self._generation.check_model(body.model)
        with client_errors():
            return JSONResponse({"prompt": await self._generation.detokenize(body.tokens)})

    async def _generate(self, request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        body, is_long = await read(request, kind, self._generation)
        return await run_while_connected(request.receive, self._respond(body, is_long, request.state.id))

    async def _respond(self, body: Body, is_long: bool, request_id: str) -> Response:
        generation = self._generation
        generation.check_model(body.model)
        format_ = self._format(body, body.request_id or request_id)
        with client_errors():
            generation_request = await generation.threads.run_if(is_long, body.request)
        answer = await Answer.begin(generation, generation_request, format_.head.id)
        if body.stream:
            return EventStream(self._events(format_, body, answer), cache_header(answer.first))
        choices = await answer.choices()
        usage = TokenUsage(body.n or 1)
        for choice in choices:
            usage.add(choice)
        has_many = sum(choice.num_scores for choice in choices) > INLINE_SCORES
        text = await generation.threads.run_if(has_many, format_.whole, choices, usage)
        return Response(text, media_type="application/json", headers=cache_header(choices[0]))

    def _format(self, body: Body, request_id: str) -> CompletionFormat | ChatFormat:
        check_request_id(request_id, "request_id")
        model, has_scores, has_ids = self._generation.card.id, body.prompt_logprobs is not None, body.returns_token_ids
        created = int(time.time())
        if isinstance(body, CompletionBody):
            head = ResponseHead(f"cmpl-{request_id}", created, model)
            return CompletionFormat(head, body.echoes_logprobs, has_scores, has_ids)
        head = ResponseHead(f"chatcmpl-{request_id}", created, model)
        return ChatFormat(head, has_scores, has_ids, body.include_reasoning is not False, body.calls_functions)

    async def _events(
        self, format_: CompletionFormat | ChatFormat, body: Body, answer: Answer
    ) -> AsyncGenerator[str, None]:
        usage, is_open = TokenUsage(body.n or 1), set[int]()
        try:
            async with aclosing(answer.deltas()) as deltas:
                async for delta in deltas:
                    usage.add(delta)
                    chunk = (delta, delta.index not in is_open, _chunk_usage(body, usage))
                    is_open.add(delta.index)
                    is_long = delta.num_scores > INLINE_SCORES
                    for text in await self._generation.threads.run_if(is_long, format_.chunks, *chunk):
                        yield server_event(text)
            if body.include_usage:
                yield server_event(format_.usage_chunk(usage))
        except ApiError as error:
            self._generation.metrics.count_refused(error.refusal.label)
            yield server_event(json.dumps(error.to_json()))
        yield DONE


def _chunk_usage(body: Body, usage: TokenUsage) -> dict[str, Any]:
    """Return the field `usage` of a chunk with choices: null if the last chunk has the usage, as in OpenAI's API."""
    if body.include_usage_in_chunks:
        return usage_fields(usage)
    return {"usage": None} if body.include_usage else {}


def _model(card: ModelCard) -> dict[str, Any]:
    fields = {"id": card.id, "object": "model", "created": card.created, "owned_by": card.owned_by}
    return fields | {"max_model_len": card.max_model_len}
