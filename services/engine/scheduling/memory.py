"""A `MemoryPlan` says how much state fits into memory; an `IdPool` and a `PagePool` count the taken slots and pages.

`model.state.State` holds the tensors of the slots and pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from model.configs.state_spec import StateSpec

MAX_CHECKPOINTS_PER_REQUEST = 8  # slots for saved states per running request; more slots are not worth their bytes


class IdPool:
    """An `IdPool` hands out the ids 0 to `size - 1`; each id has at most one owner at a time."""

    def __init__(self, size: int) -> None:
        assert size > 0
        self.size = size
        self._free = list(reversed(range(size)))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_taken(self) -> int:
        return len(self._taken)

    def can_take(self, count: int) -> bool:
        return count <= self.num_free

    def take(self, count: int) -> list[int]:
        """Take `count` free ids out of the pool and return the ids."""
        assert 0 <= count <= self.num_free
        ids = [self._free.pop() for _ in range(count)]
        self._taken.update(ids)
        assert self.num_free + self.num_taken == self.size
        return ids

    def give_back(self, ids: Sequence[int]) -> None:
        """Return ids that `take` has handed out; the ids are free again."""
        assert self._taken.issuperset(ids), "an id came back that was not taken"
        self._taken.difference_update(ids)
        self._free.extend(reversed(ids))
        assert self.num_free + self.num_taken == self.size, "an id came back twice"


class PagePool:
    """A `PagePool` counts the owners of the pages 0 to `size - 1`: requests *use* pages, and checkpoints *keep* pages.

    A page that nobody uses or keeps is free. A page that a checkpoint keeps and no request uses is idle: the page
    becomes free when the checkpoints that keep the page are evicted.
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        self.size = size
        self._free = list(reversed(range(size)))
        self._num_users = [0] * size
        self._num_keepers = [0] * size
        self.num_taken = 0  # number of pages that a request uses
        self.num_idle = 0  # number of pages that a checkpoint keeps and no request uses

    @property
    def num_free(self) -> int:
        return len(self._free)

    def can_take(self, count: int) -> bool:
        return count <= self.num_free

    def take(self, count: int) -> list[int]:
        """Take `count` free pages out of the pool and return the pages; one request then uses each page."""
        assert 0 <= count <= self.num_free
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._num_users[page] = 1
        self.num_taken += count
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Record that one more request uses each of these pages, none of which may be free."""
        for page in pages:
            assert self._num_users[page] or self._num_keepers[page], "a free page cannot be shared"
            if not self._num_users[page]:
                self.num_idle -= 1
                self.num_taken += 1
            self._num_users[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Record that one request no longer uses these pages; a page is then free if nobody uses or keeps it."""
        for page in pages:
            assert self._num_users[page] > 0, "a page came back that no request used"
            self._num_users[page] -= 1
            if not self._num_users[page]:
                self.num_taken -= 1
                if self._num_keepers[page]:
                    self.num_idle += 1
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """Record that one more checkpoint keeps the page, which must not be free."""
        assert self._num_users[page] or self._num_keepers[page], "a free page cannot be kept"
        self._num_keepers[page] += 1

    def drop(self, page: int) -> None:
        """Record that one checkpoint no longer keeps the page; the page is then free if nobody uses or keeps it."""
        assert self._num_keepers[page] > 0, "a page was dropped that no checkpoint kept"
        self._num_keepers[page] -= 1
        if not self._num_keepers[page] and not self._num_users[page]:
            self.num_idle -= 1
            self._free.append(page)

    def num_users(self, page: int) -> int:
        return self._num_users[page]

    def is_idle(self, page: int) -> bool:
        """Return True if a checkpoint keeps the page and no request uses it."""
        return self._num_keepers[page] > 0 and not self._num_users[page]

    def is_freed_by_drop(self, page: int) -> bool:
        """Return True if one checkpoint keeps the page and no request uses it, so that `drop` would free the page."""
        return self._num_keepers[page] == 1 and not self._num_users[page]


@dataclass(frozen=True)
class MemoryPlan:
    """A `MemoryPlan` says what fits a budget of bytes: `num_slots` requests at once, which share `num_blocks` KV pages.

    In addition, `num_checkpoint_slots` slots hold saved recurrent states, from which later prompts can start.
    """

    num_slots: int
    num_blocks: int
    block_size: int
    nbytes: int
    num_checkpoint_slots: int = 0
    bytes_per_slot: int = 1
    bytes_per_block: int = 1

    @property
    def num_state_slots(self) -> int:
        """Return the number of slots that `model.state.State` allocates."""
        return self.num_slots + self.num_checkpoint_slots

    def __str__(self) -> str:
        tokens = self.num_blocks * self.block_size
        return (
            f"{self.num_slots} requests at once, {tokens:,} tokens of context between them, "
            f"{self.num_checkpoint_slots} saved states for shared prefixes, {self.nbytes:,} bytes"
        )


def plan_memory(
    spec: StateSpec,
    dtype: torch.dtype,
    budget: int,
    max_model_len: int,
    max_requests: int,
    expected_len: int = 1024,
    checkpoint_share: float = 0.25,
    bytes_per_request: int = 0,
) -> MemoryPlan:
    """Divide `budget` bytes between slots and pages, before anything is allocated.

    - Requests: as many requests as fit with `expected_len` tokens each, up to `max_requests`.
    - Slots for saved states: up to `checkpoint_share` of the budget. One request of `max_model_len` tokens must still
      fit beside these slots.
    - Pages: the rest of the budget, up to `max_model_len` tokens for each request.

    `bytes_per_request` is the number of bytes that drafting needs for each request, in addition to the request's state.
    Raise ValueError if the budget does not hold one request of `max_model_len` tokens.
    """
    if not 0 <= checkpoint_share < 1:
        raise ValueError(f"checkpoint_share must be at least 0 and below 1, not {checkpoint_share}.")
    slot, block = spec.bytes_per_slot(dtype), spec.bytes_per_block(dtype)
    full = spec.num_blocks(max_model_len)
    one = slot + bytes_per_request
    needed = one + full * block
    if budget < needed:
        raise ValueError(
            f"The state of one request of max_model_len {max_model_len} takes {needed:,} bytes, but the state budget "
            f"is {budget:,} bytes; raise the budget or lower max_model_len."
        )
    for_requests = max(needed, int(budget * (1 - checkpoint_share)))
    expected = one + spec.num_blocks(min(expected_len, max_model_len)) * block
    num_slots = min(max_requests, for_requests // max(expected, 1))
    if one:
        num_slots = min(num_slots, (for_requests - full * block) // one)
    num_checkpoint_slots = 0
    if slot and checkpoint_share:
        num_checkpoint_slots = min(MAX_CHECKPOINTS_PER_REQUEST * num_slots, (budget - for_requests) // slot)
    num_state_slots = num_slots + num_checkpoint_slots
    beside_pages = num_state_slots * slot + num_slots * bytes_per_request
    num_blocks = num_slots * full
    if block:
        num_blocks = min(num_blocks, (budget - beside_pages) // block)
    assert num_slots >= 1
    assert num_blocks >= full
    nbytes = beside_pages + num_blocks * block
    return MemoryPlan(num_slots, num_blocks, spec.block_size, nbytes, num_checkpoint_slots, slot, block)
