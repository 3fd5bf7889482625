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
from services.gateway.chat.text_delta import TextDelta
from services.gateway.chat.token_usage import TokenUsage
from services.gateway.connection import EventStream, read_body, run_while_connected, server_event
from services.gateway.errors import ApiError, client_errors
from services.gateway.generation import Generation, ModelCard
from services.gateway.openai import response
from services.gateway.openai.body import Body, ChatBody, CompletionBody
from services.gateway.openai.response import ResponseHead
from services.gateway.openai.tokenizer_bodies import (
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
    parse_tokenize_body,
)
from services.gateway.ports.openapi import takes
from services.gateway.schema.json_text import dump_list, dumps

INLINE_TOKENS = 1024  # longer lists of tokens are written in a thread; writing this many takes less than 1 ms
INLINE_SCORES = 1024  # responses with more logprobs are written in a thread; writing this many takes about 5 ms
INLINE_ITEMS = 256  # more messages are converted in a thread; converting this many takes about 2 ms
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
        body = await self._generation.threads.run_if(len(data) > INLINE_BYTES, parse_tokenize_body, data, limits)
        self._generation.check_model(body.model)
        with client_errors():
            token_ids = await self._generation.tokenize(body.request(), body.adds_special_tokens)
            shown = await self._generation.token_texts(token_ids) if body.return_token_strs else None
        is_long = len(token_ids) > INLINE_TOKENS
        lists = [await self._generation.threads.run_if(is_long, dump_list, values) for values in (token_ids, shown)]
        fields = {"count": len(token_ids), "max_model_len": self._generation.card.max_model_len}
        text = f'{dumps(fields)[:-1]}, "tokens": {lists[0]}, "token_strs": {lists[1]}}}'
        return Response(text, media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        body = await read(request, DetokenizeBody, self._generation)
        self._generation.check_model(body.model)
        with client_errors():
            return JSONResponse({"prompt": await self._generation.detokenize(body.tokens)})

    async def _generate(self, request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        body = await read(request, kind, self._generation)
        return await run_while_connected(request.receive, self._respond(body, request.state.id))

    async def _respond(self, body: Body, request_id: str) -> Response:
        generation = self._generation
        generation.check_model(body.model)
        head = ResponseHead(
            f"{'chatcmpl' if body.is_chat else 'cmpl'}-{request_id}", int(time.time()), generation.card.id
        )
        with client_errors():
            generation_request = await generation.threads.run_if(body.num_items > INLINE_ITEMS, body.request)
        answer = await Answer.begin(generation, generation_request, head.id)
        if body.stream:
            return EventStream(self._events(head, body, answer), cache_header(answer.first))
        choices = await answer.choices()
        usage = TokenUsage(body.n or 1)
        for choice in choices:
            usage.add(choice)
        is_long = sum(choice.num_scores for choice in choices) > INLINE_SCORES
        text = await generation.threads.run_if(is_long, _whole_response, head, body, choices, usage)
        return Response(text, media_type="application/json", headers=cache_header(choices[0]))

    async def _events(self, head: ResponseHead, body: Body, answer: Answer) -> AsyncGenerator[str, None]:
        usage, is_open = TokenUsage(body.n or 1), set[int]()
        try:
            async with aclosing(answer.deltas()) as deltas:
                async for delta in deltas:
                    usage.add(delta)
                    if body.is_chat and delta.index not in is_open:
                        is_open.add(delta.index)
                        yield server_event(response.role_chunk(head, delta, body.return_token_ids is True))
                    if delta.is_shown or (body.return_token_ids and delta.token_ids):
                        is_long = delta.num_scores > INLINE_SCORES
                        chunk = await self._generation.threads.run_if(is_long, _chunk, head, body, delta)
                        yield server_event(chunk)
            if body.include_usage:
                yield server_event(response.usage_chunk(head, usage, body.is_chat))
        except ApiError as error:
            self._generation.metrics.count_refused(error.refusal.label)
            yield server_event(json.dumps(error.to_json()))
        yield DONE


def _whole_response(head: ResponseHead, body: Body, choices: list[TextDelta], usage: TokenUsage) -> str:
    has_prompt_logprobs, has_ids = body.prompt_logprobs is not None, body.return_token_ids is True
    if isinstance(body, ChatBody):
        return response.chat_completion(head, choices, usage, has_prompt_logprobs, has_ids)
    return response.completion(head, choices, usage, body.echoes_logprobs, has_prompt_logprobs, has_ids)


def _chunk(head: ResponseHead, body: Body, delta: TextDelta) -> str:
    if isinstance(body, ChatBody):
        return response.chat_chunk(head, delta, body.return_token_ids is True)
    return response.completion_chunk(head, delta, body.echoes_logprobs, body.return_token_ids is True)


def _model(card: ModelCard) -> dict[str, Any]:
    fields = {"id": card.id, "object": "model", "created": card.created, "owned_by": card.owned_by}
    return fields | {"max_model_len": card.max_model_len}
