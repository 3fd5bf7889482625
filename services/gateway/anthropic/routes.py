"""A `MessagesRoutes` offers Anthropic's Messages API over REST."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from services.gateway.answer import Answer, cache_header, read
from services.gateway.anthropic.message_events import MessageEvents, whole_message
from services.gateway.anthropic.messages_body import CountTokensBody, MessagesBody
from services.gateway.anthropic.refusals import refusal_json
from services.gateway.connection import EventStream, run_while_connected, server_event
from services.gateway.errors import ApiError, client_errors
from services.gateway.generation import Generation
from services.gateway.generation_request import GenerationRequest
from services.gateway.ports.openapi import takes


class MessagesRoutes:
    """A `MessagesRoutes` handles the requests of Anthropic's API, from parsing the body to formatting the response."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to `app`."""
        app.add_api_route("/v1/messages", self.messages, methods=["POST"], **takes(MessagesBody, streams=True))
        app.add_api_route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"], **takes(CountTokensBody))

    async def messages(self, request: Request) -> Response:
        body, is_long = await read(request, MessagesBody, self._generation)
        return await run_while_connected(request.receive, self._respond(body, is_long, request.state.id))

    async def count_tokens(self, request: Request) -> Response:
        body, is_long = await read(request, CountTokensBody, self._generation)
        self._generation.check_model(body.model)
        with client_errors():
            asked = await self._request(body, is_long)
            token_ids = await self._generation.tokenize(asked, add_special_tokens=False)
        return JSONResponse({"input_tokens": len(token_ids)}, headers={"request-id": request.state.id})

    async def _request(self, body: CountTokensBody, is_long: bool) -> GenerationRequest:
        """Return the request of `body`; a long body is read in a thread. Raises ApiError or ValueError."""
        most, num_parts = self._generation.limits.input_items, body.num_parts
        if num_parts > most:
            raise ValueError(f"messages must hold at most {most} messages and content blocks, not {num_parts}.")
        return await self._generation.threads.run_if(is_long, body.request)

    async def _respond(self, body: MessagesBody, is_long: bool, request_id: str) -> Response:
        generation, message_id = self._generation, f"msg_{request_id}"
        generation.check_model(body.model)
        with client_errors():
            request = await self._request(body, is_long)
        answer = await Answer.begin(generation, request, message_id)
        headers = {"request-id": request_id, **cache_header(answer.first)}
        if body.stream:
            events = MessageEvents(message_id, generation.card.id, body.hides_thinking)
            return EventStream(self._events(events, answer, request_id), headers)
        [delta] = await answer.choices()
        text = whole_message(message_id, generation.card.id, delta, body.hides_thinking)
        return Response(text, media_type="application/json", headers=headers)

    async def _events(self, events: MessageEvents, answer: Answer, request_id: str) -> AsyncGenerator[str, None]:
        try:
            for event in events.start(answer.first):
                yield event
            async with aclosing(answer.deltas()) as deltas:
                async for delta in deltas:
                    for event in events.push(delta):
                        yield event
            for event in events.finish(delta):
                yield event
        except ApiError as error:
            self._generation.metrics.count_refused(error.refusal.label)
            yield server_event(refusal_json(error, request_id), "error")
