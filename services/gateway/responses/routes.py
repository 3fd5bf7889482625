"""A `ResponsesRoutes` offers OpenAI's Responses API over REST."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from itertools import count

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from services.gateway.answer import Answer, cache_header, read
from services.gateway.connection import EventStream, run_while_connected, server_event
from services.gateway.errors import ApiError, client_errors, invalid
from services.gateway.generation import Generation
from services.gateway.ports.openapi import takes
from services.gateway.responses.body import PARAM_NAMES, ResponsesBody
from services.gateway.responses.items import Item, parse_items
from services.gateway.responses.output import Event, OutputBuilder
from services.gateway.responses.response import ENCODE, ResponseForm, is_complete
from services.gateway.responses.store import ResponseStore, StoredResponse, page
from services.gateway.responses.truncation import fit
from services.gateway.responses.turn import Turn, TurnReader

MAX_PAGE = 100  # items in one page of a response's input, as in OpenAI's API
MAX_DIGITS = 20  # a number in a URL may not be longer; Python refuses to read a number of thousands of digits


class ResponsesRoutes:
    """A `ResponsesRoutes` answers requests to `/v1/responses`, and keeps the newest responses in memory."""

    def __init__(self, generation: Generation) -> None:
        self._generation, limits = generation, generation.limits
        self._store = ResponseStore(limits.stored_responses, limits.stored_bytes)
        self._reader = TurnReader(generation, self._store)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to `app`."""
        app.add_api_route("/v1/responses", self.create, methods=["POST"], **takes(ResponsesBody, streams=True))
        app.add_api_route("/v1/responses/input_tokens", self.count, methods=["POST"], **takes(ResponsesBody))
        app.add_api_route("/v1/responses/{response_id}", self.retrieve, methods=["GET"])
        app.add_api_route("/v1/responses/{response_id}", self.delete, methods=["DELETE"])
        app.add_api_route("/v1/responses/{response_id}/cancel", self.cancel, methods=["POST"])
        app.add_api_route("/v1/responses/{response_id}/input_items", self.input_items, methods=["GET"])

    async def create(self, request: Request) -> Response:
        body, is_long = await read(request, ResponsesBody, self._generation)
        return await run_while_connected(request.receive, self._respond(body, is_long, request.state.id))

    async def count(self, request: Request) -> Response:
        body, is_long = await read(request, ResponsesBody, self._generation)
        self._generation.check_model(body.model)
        with _own_names():
            turn = await self._reader.read(body, is_long)
            token_ids = await self._generation.tokenize(turn.request, add_special_tokens=False)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(token_ids)})

    async def retrieve(self, request: Request, response_id: str) -> Response:
        if request.query_params.get("stream") == "true":
            raise invalid("stream may not be true, because the events of a stored response are not kept.", "stream")
        return Response(self._store.get(response_id).text, media_type="application/json")

    async def delete(self, response_id: str) -> Response:
        self._store.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, response_id: str) -> Response:
        self._store.get(response_id)
        message = "Only a response with background=true can be cancelled; to stop any other, close its connection."
        raise invalid(message, "response_id")

    async def input_items(self, request: Request, response_id: str) -> Response:
        query = request.query_params
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not (limit.isdecimal() and len(limit) <= MAX_DIGITS and 1 <= int(limit) <= MAX_PAGE):
            raise invalid(f"limit must be 1 to {MAX_PAGE}, not {limit!r:.100}.", "limit")
        if order not in ("asc", "desc"):
            raise invalid(f"order must be 'asc' or 'desc', not {order!r:.100}.", "order")
        stored = self._store.get(response_id)
        items, has_more = page(stored.items[: stored.num_input], query.get("after"), int(limit), order == "desc")
        first, last = (items[0]["id"], items[-1]["id"]) if items else ("", "")
        fields = {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more}
        return JSONResponse(fields)

    async def _respond(self, body: ResponsesBody, is_long: bool, request_id: str) -> Response:
        generation = self._generation
        generation.check_model(body.model)
        form = ResponseForm(f"resp_{uuid.uuid4().hex}", generation.card.id, body.echo())
        with _own_names():
            turn = await self._reader.read(body, is_long)
            request = turn.request
            if body.truncation == "auto":
                request = await fit(generation, request, body.max_output_tokens)
            answer = await Answer.begin(generation, request, f"resp-{request_id}")
        if body.stream:
            return EventStream(self._events(form, turn, answer), cache_header(answer.first))
        builder, last = OutputBuilder(body.has_encrypted), answer.first
        async with aclosing(answer.deltas()) as deltas:
            async for last in deltas:
                list(builder.push(last))
        list(builder.finish(is_complete(last)))
        text = self._end(turn, form.ended(builder.items, last))
        return Response(text, media_type="application/json", headers=cache_header(answer.first))

    async def _events(self, form: ResponseForm, turn: Turn, answer: Answer) -> AsyncGenerator[str, None]:
        builder, last, numbers = OutputBuilder(turn.body.has_encrypted), answer.first, count()
        begun = [{"type": f"response.{name}", "response": form.in_progress()} for name in ("created", "in_progress")]
        yield _encode(begun, numbers)
        try:
            async with aclosing(answer.deltas()) as deltas:
                async for last in deltas:
                    if events := _encode(builder.push(last), numbers):
                        yield events
            yield _encode(builder.finish(is_complete(last)), numbers)
            response = form.ended(builder.items, last)
            self._end(turn, response)
            yield _encode([{"type": f"response.{response['status']}", "response": response}], numbers)
        except ApiError as error:
            self._generation.metrics.count_refused(error.refusal.label)
            yield _encode(form.failure(builder.items, error), numbers)

    def _end(self, turn: Turn, response: Item) -> str:
        """Return the complete `response` as JSON, and store it if the client wants so."""
        text = ENCODE(response)
        if turn.body.is_stored:
            output = (self._store.intern(item, is_ours=True) for item in parse_items(response["output"]))
            self._store.add(response["id"], StoredResponse(text, (*turn.items, *output), len(turn.items)))
        return text


@contextmanager
def _own_names() -> Iterator[None]:
    """Turn every exception that the `with` block raises into an ApiError with this API's names of parameters."""
    try:
        with client_errors():
            yield
    except ApiError as error:
        raise error.renamed(PARAM_NAMES) from error


def _encode(events: Iterable[Event], numbers: Iterator[int]) -> str:
    """Return `events` as server-sent events, numbered with the next of `numbers`."""
    return "".join(server_event(ENCODE(event | {"sequence_number": next(numbers)}), event["type"]) for event in events)
