"""A `Turn` is one request with the conversation before it; a `TurnReader` makes a `Turn` from a body and the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.gateway.answer import INLINE_BYTES
from services.gateway.errors import ApiError, ApiRefusal
from services.gateway.generation import Generation
from services.gateway.generation_request import GenerationRequest
from services.gateway.responses.body import ResponsesBody
from services.gateway.responses.items import Item, parse_items, to_messages
from services.gateway.responses.store import ResponseStore, StoredItem


@dataclass(frozen=True)
class Turn:
    """A `Turn` holds a request and, for the store, the items of its conversation.

    `items` are empty if the response will not be stored.
    """

    body: ResponsesBody
    request: GenerationRequest
    items: tuple[StoredItem, ...]


class TurnReader:
    """A `TurnReader` reads the input of requests, which may name items and responses in the store.

    A short request may name long items many times, so the stored items of one request count towards the limits of a
    body and of the number of items.
    """

    def __init__(self, generation: Generation, store: ResponseStore) -> None:
        self._limits, self._threads, self._store = generation.limits, generation.threads, store
        self._max_bytes = self._limits.max_body_bytes(generation.card.max_model_len)

    async def read(self, body: ResponsesBody, is_long: bool) -> Turn:
        """Return the request of `body`. Raises ApiError or ValueError if the request is invalid.

        If `is_long` is True, or if the request names stored items that are long, the request is read in a thread.
        """
        earlier = self._earlier(body.previous_response_id)
        num_items = len(earlier) + _num_items(body.input)
        if num_items > self._limits.input_items:
            most = self._limits.input_items
            raise ValueError(
                f"input must hold at most {most} items and parts, with those of earlier responses, not {num_items}."
            )
        return await self._threads.run_if(is_long or self._names_much(body, earlier), self._read, body, earlier)

    def _read(self, body: ResponsesBody, earlier: Sequence[StoredItem]) -> Turn:
        budget = _Budget(self._max_bytes)
        for item in earlier:
            budget.spend(item)

        def find(item_id: str) -> Item:
            item = self._store.find(item_id)
            budget.spend(item)
            return item.item

        if body.input is None and not earlier:
            raise ValueError("input is missing, but required.")
        items = [] if body.input is None else parse_items(body.input, find)
        if not items and not earlier:
            raise ValueError("input must hold at least one message.")
        messages = to_messages([*(item.item for item in earlier), *items], body.instructions, len(earlier))
        stored = (*earlier, *map(self._store.intern, items)) if body.is_stored else ()
        return Turn(body, body.request(messages), stored)

    def _names_much(self, body: ResponsesBody, earlier: Sequence[StoredItem]) -> bool:
        """Return True if the stored items that `body` names may be long."""
        items = body.input if isinstance(body.input, list) else []
        has_references = any(isinstance(item, dict) and item.get("type") == "item_reference" for item in items)
        return has_references or sum(len(item.text) for item in earlier) > INLINE_BYTES

    def _earlier(self, response_id: str | None) -> tuple[StoredItem, ...]:
        if response_id is None:
            return ()
        try:
            return self._store.get(response_id).items
        except ApiError as error:
            code = "previous_response_not_found"
            raise ApiError(error.refusal, error.message, "previous_response_id", code) from error


@dataclass
class _Budget:
    """A `_Budget` counts the bytes of the stored items that one request names."""

    max_bytes: int
    num_bytes: int = 0

    def spend(self, item: StoredItem) -> None:
        """Count `item`. Raises ApiError if the request names more than `max_bytes`."""
        self.num_bytes += len(item.text)
        if self.num_bytes > self.max_bytes:
            message = f"The stored items that the input names may hold at most {self.max_bytes} bytes, but hold more."
            raise ApiError(ApiRefusal.TOO_LARGE, message, "input")


def _num_items(value: Any) -> int:
    """Return the number of items of a request's `input` and of the parts of their contents."""
    if not isinstance(value, list):
        return 1
    parts = (item.get(name) for item in value if isinstance(item, dict) for name in ("content", "output"))
    return len(value) + sum(len(part) for part in parts if isinstance(part, list))
