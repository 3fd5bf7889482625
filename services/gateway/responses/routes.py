"""A `ResponsesRoutes` offers OpenAI's Responses API over REST."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import count

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from services.gateway.answer import Answer, cache_header, read
from services.gateway.connection import EventStream, run_while_connected, server_event
from services.gateway.errors import ApiError, ApiRefusal, client_errors, invalid
from services.gateway.generation import Generation
from services.gateway.generation_request import GenerationRequest
from services.gateway.responses.body import PARAM_NAMES, ResponsesBody
from services.gateway.responses.items import Item, parse_items, to_messages
from services.gateway.responses.output import Event, OutputBuilder, without_logprobs
from services.gateway.responses.response import ENCODE, ResponseForm, is_complete
from services.gateway.responses.store import ResponseStore, StoredItem, StoredResponse, page
from services.gateway.responses.truncation import fit

MAX_PAGE = 100  # items in one page of a response's input, as in OpenAI's API


@dataclass(frozen=True)
class Turn:
    """A `Turn` is a request with everything that the conversation held before it."""

    body: ResponsesBody
    earlier: tuple[StoredItem, ...]  # items of the previous response and of all responses before it
    items: list[Item]  # the request's own input
    request: GenerationRequest


class ResponsesRoutes:
    """A `ResponsesRoutes` answers requests to `/v1/responses`, and keeps the newest responses in memory."""

    def __init__(self, generation: Generation) -> None:
        self._generation, limits = generation, generation.limits
        self._store = ResponseStore(limits.stored_responses, limits.stored_bytes)
        self._max_bytes = limits.max_body_bytes(generation.card.max_model_len)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to `app`."""
        app.add_api_route("/v1/responses", self.create, methods=["POST"])
        app.add_api_route("/v1/responses/input_tokens", self.count, methods=["POST"])
        app.add_api_route("/v1/responses/{response_id}", self.retrieve, methods=["GET"])
        app.add_api_route("/v1/responses/{response_id}", self.delete, methods=["DELETE"])
        app.add_api_route("/v1/responses/{response_id}/cancel", self.cancel, methods=["POST"])
        app.add_api_route("/v1/responses/{response_id}/input_items", self.input_items, methods=["GET"])

    async def create(self, request: Request) -> Response:
        body = await read(request, ResponsesBody, self._generation)
        return await run_while_connected(request.receive, self._respond(body, request.state.id))

    async def count(self, request: Request) -> Response:
        body = await read(request, ResponsesBody, self._generation)
        self._generation.check_model(body.model)
        with _own_names():
            token_ids = await self._generation.tokenize(self._turn(body).request, add_special_tokens=False)
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
        if not (limit.isdecimal() and 1 <= int(limit) <= MAX_PAGE):
            raise invalid(f"limit must be 1 to {MAX_PAGE}, not {limit!r:.100}.", "limit")
        if order not in ("asc", "desc"):
            raise invalid(f"order must be 'asc' or 'desc', not {order!r:.100}.", "order")
        stored = self._store.get(response_id)
        items, has_more = page(stored.items[: stored.num_input], query.get("after"), int(limit), order == "desc")
        first, last = (items[0]["id"], items[-1]["id"]) if items else ("", "")
        fields = {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more}
        return JSONResponse(fields)

    async def _respond(self, body: ResponsesBody, request_id: str) -> Response:
        generation = self._generation
        generation.check_model(body.model)
        form = ResponseForm(f"resp_{uuid.uuid4().hex}", generation.card.id, body.echo())
        with _own_names():
            turn = self._turn(body)
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
        if turn.body.store is not False:
            items = (*turn.earlier, *map(StoredItem.of, turn.items))
            output = map(StoredItem.of, map(without_logprobs, response["output"]))
            self._store.add(response["id"], StoredResponse(text, (*items, *output), len(items)))
        return text

    def _turn(self, body: ResponsesBody) -> Turn:
        """Return the request of `body`, with the items that it names in the store.

        Raises ApiError or ValueError if the request is invalid.
        """
        earlier = self._earlier(body.previous_response_id)
        num_bytes = sum(len(item.text) for item in earlier)

        def find(item_id: str) -> Item:
            nonlocal num_bytes
            item = self._store.find(item_id)
            num_bytes += len(item.text)
            self._check_size(num_bytes)
            return item.item

        self._check_size(num_bytes)
        if body.input is None and not earlier:
            raise ValueError("input is missing, but required.")
        items = [] if body.input is None else parse_items(body.input, find)
        if not items and not earlier:
            raise ValueError("input must hold at least one message.")
        messages = to_messages([*(item.item for item in earlier), *items], body.instructions, len(earlier))
        return Turn(body, earlier, items, body.request(messages))

    def _earlier(self, response_id: str | None) -> tuple[StoredItem, ...]:
        if response_id is None:
            return ()
        try:
            return self._store.get(response_id).items
        except ApiError as error:
            code = "previous_response_not_found"
            raise ApiError(error.refusal, error.message, "previous_response_id", code) from error

    def _check_size(self, num_bytes: int) -> None:
        """Raise ApiError if the stored items that a request names are larger than the body of a request may be.

        A short request that names one long item many times would otherwise take any amount of memory.
        """
        if num_bytes > self._max_bytes:
            message = f"The stored items that the input names may hold at most {self._max_bytes} bytes, but hold more."
            raise ApiError(ApiRefusal.TOO_LARGE, message, "input")


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
