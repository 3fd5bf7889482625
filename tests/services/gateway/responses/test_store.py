from __future__ import annotations

import random

import pytest

from services.gateway.errors import ApiError
from services.gateway.responses.store import ResponseStore, StoredItem, StoredResponse


def response(*items: StoredItem, size: int = 10) -> StoredResponse:
    return StoredResponse("x" * size, items, 0)


def item(name: str, size: int = 10) -> StoredItem:
    return StoredItem(name, "y" * size, is_ours=True)


def test_bytes_are_counted_once_for_shared_items() -> None:
    store = ResponseStore(100, 1 << 20)
    shared = item("a", 1000)
    store.add("r0", response(shared))
    alone = store.num_bytes
    store.add("r1", response(shared, item("b")))
    assert alone > 1000
    assert store.num_bytes < alone + 500
    store.delete("r0")
    assert store.find("a") is shared
    store.delete("r1")
    assert store.num_bytes == len(store) == 0
    with pytest.raises(ApiError, match="The item 'a' is not stored here"):
        store.find("a")


def test_only_ids_that_nobody_can_guess_name_items() -> None:
    store = ResponseStore(100, 1 << 20)
    message = {"type": "message", "role": "user", "content": []}
    chosen, made = store.intern({"id": "msg_1", **message}), store.intern(message)
    store.add("r0", response(chosen, made))
    assert store.find(made.id) is made
    with pytest.raises(ApiError, match="not stored here"):
        store.find("msg_1")
    # A client that sends an item back shares it, but cannot replace it.
    assert store.intern(made.item) is made
    other = store.intern(made.item | {"role": "assistant"})
    store.add("r1", response(other))
    assert store.find(made.id) is made
    store.delete("r0")
    with pytest.raises(ApiError, match="not stored here"):
        store.find(made.id)


def test_the_bounds_always_hold() -> None:
    max_bytes = 20_000
    store, generator = ResponseStore(20, max_bytes), random.Random(0)
    histories: list[tuple[StoredItem, ...]] = [()]
    for n in range(500):
        history = (*generator.choice(histories), item(f"i{n}", generator.randrange(1000)))
        store.add(f"r{n}", response(*history, size=generator.randrange(100)))
        histories = [(), *histories[-10:], history]
        assert len(store) <= 20
        assert store.num_bytes <= max_bytes
    assert len(store) > 5


def test_a_response_larger_than_the_store_drops_no_other() -> None:
    store = ResponseStore(20, 10_000)
    store.add("small", response())
    store.add("large", response(item("a", 20_000)))
    assert store.get("small")
    with pytest.raises(ApiError, match="not stored here"):
        store.get("large")
