"""A `ResponseStore` keeps the last responses in the gateway's memory, for `previous_response_id` and `GET`."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.errors import ApiError, ApiRefusal
from services.gateway.responses.items import Item, new_id


@dataclass(slots=True)
class StoredItem:
    """A `StoredItem` is an item as JSON text; the responses of one conversation share their common items."""

    id: str
    text: str
    # True: this server made the id, so nobody can guess it. Only then may a request name the item by its id.
    is_ours: bool
    num_holders: int = 0  # number of stored responses that hold the item

    @property
    def item(self) -> Item:
        item: Item = json.loads(self.text)
        return item


@dataclass(frozen=True)
class StoredResponse:
    """A `StoredResponse` is a complete response, with all items of its conversation up to the end of the response.

    `items[:num_input]` are the response's input, which includes the items of the responses before it.
    """

    text: str  # the response as JSON
    items: tuple[StoredItem, ...]
    num_input: int

    @property
    def num_bytes(self) -> int:
        """Return the bytes of memory that the response takes without its items, which other responses may share."""
        return sys.getsizeof(self.text) + sys.getsizeof(self.items)


class ResponseStore:
    """A `ResponseStore` holds at most `max_responses` responses and `max_bytes` bytes, and drops the oldest first.

    A response counts as new again whenever it is used.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._items: dict[str, StoredItem] = {}  # the items that a request may name, by id
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def add(self, response_id: str, response: StoredResponse) -> None:
        """Store a response, and drop the responses that have not been used for longest until the bounds hold.

        A response that is larger than `max_bytes` by itself is not stored.
        """
        if response.num_bytes + sum(map(_size, response.items)) > self._max_bytes:
            return
        self._responses[response_id] = response
        self.num_bytes += response.num_bytes
        for item in response.items:
            if not item.num_holders:
                self.num_bytes += _size(item)
            item.num_holders += 1
            if item.is_ours:
                self._items[item.id] = item
        while len(self._responses) > self._max_responses or self.num_bytes > self._max_bytes:
            self.delete(next(iter(self._responses)))

    def get(self, response_id: str) -> StoredResponse:
        """Return a stored response. Raises ApiError if the response is not stored here."""
        response = self._responses.get(response_id)
        if response is None:
            raise _not_found("response", response_id)
        self._responses.move_to_end(response_id)
        return response

    def delete(self, response_id: str) -> None:
        """Forget a response, and its items that no other response holds. Raises ApiError if it is not stored here."""
        response = self.get(response_id)
        del self._responses[response_id]
        self.num_bytes -= response.num_bytes
        for item in response.items:
            item.num_holders -= 1
            if not item.num_holders:
                self.num_bytes -= _size(item)
                if item.is_ours:
                    self._items.pop(item.id, None)

    def intern(self, item: Item, is_ours: bool = False) -> StoredItem:
        """Return `item` in the form for the store, shared with the responses that hold the same item already.

        `is_ours` is True if this server made the item's id; an item without an id gets one. The item is stored only
        by `add`. Any thread may call this method.
        """
        if "id" not in item:
            item, is_ours = {"id": new_id(item["type"]), **item}, True
        text, known = json.dumps(item), self._items.get(item["id"])
        return known if known and known.text == text else StoredItem(item["id"], text, is_ours)

    def find(self, item_id: str) -> StoredItem:
        """Return the stored item with an id. Raises ApiError if no stored response holds the item."""
        item = self._items.get(item_id)
        if item is None:
            raise _not_found("item", item_id)
        return item


def _size(item: StoredItem) -> int:
    return sys.getsizeof(item.text) + sys.getsizeof(item.id) + sys.getsizeof(item)


def _not_found(kind: str, name: str) -> ApiError:
    message = (
        f"The {kind} {name!r:.100} is not stored here: a gateway keeps only the newest responses, in its memory, and "
        "knows none that another gateway answered or that it answered before a restart."
    )
    return ApiError(ApiRefusal.NOT_FOUND, message)


def page(items: Sequence[StoredItem], after: str | None, limit: int, is_newest_first: bool) -> tuple[list[Item], bool]:
    """Return at most `limit` items that follow the item with the id `after`, and True if there are more."""
    ordered = list(reversed(items)) if is_newest_first else list(items)
    start = next((n + 1 for n, item in enumerate(ordered) if item.id == after), 0)
    return [item.item for item in ordered[start : start + limit]], len(ordered) > start + limit
