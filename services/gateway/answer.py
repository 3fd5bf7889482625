"""An `Answer` is the running answer to one request; the REST APIs that generate text share this module.

The routes of an API read a body with `read` and start its answer with `Answer.begin`. Each API adds only its own form
of requests and responses.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request

from services.gateway.chat.text_delta import TextDelta, collect
from services.gateway.connection import read_body
from services.gateway.errors import client_errors
from services.gateway.generation import Generation
from services.gateway.generation_request import GenerationRequest
from services.gateway.request_body import AnyBody, parse_body
from services.gateway.request_id import check_request_id

# Longer bodies, gRPC requests and stored conversations are read in a thread. Parsing this many bytes takes about 2 ms.
INLINE_BYTES = 16_384


async def read(request: Request, kind: type[AnyBody], generation: Generation) -> tuple[AnyBody, bool]:
    """Return the body of `request` as an object of the class `kind`, and True if work on the body needs a thread.

    Raises ApiError if the body or the request's id is invalid, and ClientGone if the client disconnects.
    """
    check_request_id(request.state.id, "X-Request-Id")
    data = await read_body(request, generation.limits.max_body_bytes(generation.card.max_model_len))
    is_long = len(data) > INLINE_BYTES
    return await generation.threads.run_if(is_long, parse_body, kind, data, generation.limits), is_long


@dataclass(frozen=True)
class Answer:
    """An `Answer` yields the text of a request for which the engine has generated the first token.

    Start a stream of events only after `begin` has returned, because every earlier refusal has its own HTTP status.
    """

    first: TextDelta
    rest: AsyncGenerator[TextDelta, None]  # all deltas after `first`
    num_choices: int

    @classmethod
    async def begin(cls, generation: Generation, request: GenerationRequest, answer_id: str) -> Answer:
        """Send `request` to the engine, and return its answer as soon as the engine has generated the first token.

        Raises ApiError if the request is invalid, or if the engine refuses it.
        """
        with client_errors():
            choices = await generation.prepare(request)
        deltas = generation.stream(choices, answer_id)
        return cls(await anext(deltas), deltas, len(choices))

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Yield all deltas of all choices, including the first. Raises ApiError if the generation fails."""
        async with aclosing(self.rest):
            yield self.first
            async for delta in self.rest:
                yield delta

    async def choices(self) -> list[TextDelta]:
        """Return one delta for each choice, which holds the whole choice. Raises ApiError if the generation fails."""
        return await collect(self.deltas(), self.num_choices)


def cache_header(delta: TextDelta) -> dict[str, str]:
    """Return the HTTP header that says how many prompt tokens came from the prefix cache, and why not more did."""
    return {"X-Expertmesh-Cache": delta.cache_report}
