"""The `StateMemory` manages the memory of running requests: it assigns state slots and KV pages to requests."""

from __future__ import annotations

import array
from collections.abc import Iterable

from services.engine.request import PAGE_NUMBERS, Request
from services.engine.scheduling.memory import IdPool, PagePool
from services.engine.scheduling.prefix_cache import CacheConfig, CachedPrefix, PrefixCache
from services.engine.scheduling.scheduled_batch import BatchBuilder


class StateMemory:
    """A `StateMemory` assigns a state slot and KV pages to each request that runs, and releases the slot and the pages.

    The prefix cache uses the slots and pages that no running request holds. If a running request needs a slot or a
    page, the prefix cache evicts checkpoints.
    """

    def __init__(self, num_slots: int, num_pages: int, config: CacheConfig) -> None:
        self.slots, self.pages = IdPool(num_slots), PagePool(num_pages)
        self.cache = PrefixCache(config, self.slots, self.pages)
        self._page_size = config.block_size

    @property
    def num_slots_taken(self) -> int:
        """Return the number of slots that running requests hold; the prefix cache's slots do not count."""
        return self.slots.num_taken - self.cache.checkpoints.num_slots

    def num_pages_for(self, num_tokens: int) -> int:
        """Return the number of pages that are needed for `num_tokens` tokens."""
        return -(-num_tokens // self._page_size)

    def num_pages_short(self, request: Request, prefix: CachedPrefix) -> int:
        """Return the number of pages that a request lacks to start after `prefix`; below 0 if pages are left over."""
        num_new = self.num_pages_for(request.num_tokens) - len(prefix.pages)
        num_reused = sum(self.pages.is_idle(page) for page in prefix.pages)  # idle, but not to be freed
        return num_new + num_reused - self.pages.num_free - self.pages.num_idle

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Add pages to a request until its pages hold `num_tokens` tokens in total; return False if pages run out."""
        num_missing = max(0, self.num_pages_for(num_tokens) - len(request.block_table))
        if can_take := self.cache.checkpoints.can_free_pages(num_missing):
            self.cache.checkpoints.free_pages(num_missing)
            request.block_table.extend(self.pages.take(num_missing))
        return can_take

    def admit(self, request: Request, prefix: CachedPrefix, batch: BatchBuilder) -> None:
        """Assign a slot and pages to a request that starts after `prefix`; add the necessary copies to `batch`."""
        checkpoint = prefix.checkpoint
        self.pages.share(prefix.pages)
        request.block_table = array.array(PAGE_NUMBERS, prefix.pages)
        self.cache.note_start(request, prefix)
        self.cache.checkpoints.free_slot(spare=checkpoint)
        [request.slot] = self.slots.take(1)
        is_reserved = self.reserve(request, request.num_tokens)
        assert is_reserved
        # If only the checkpoint's slot was left, the request now holds this slot, and no copy is needed.
        if checkpoint and checkpoint.slot not in (None, request.slot):
            batch.slot_copies.append((checkpoint.slot, request.slot))
        if checkpoint and checkpoint.tail_page is not None:
            batch.page_copies.append((checkpoint.tail_page, request.block_table[len(prefix.pages)]))
        request.num_computed_tokens = prefix.length

    def save_due(self, running: Iterable[Request], batch: BatchBuilder) -> None:
        """Save the state of each request that has reached a length in `due_checkpoints`; add copies to `batch`."""
        for request in running:
            if request.due_checkpoints and request.due_checkpoints[0] == request.num_computed_tokens:
                del request.due_checkpoints[0]
                if saved := self.cache.save_copy(request):
                    batch.saved.append(saved)
                    if saved.slot is not None:
                        batch.slot_copies.append((request.slot_id, saved.slot))

    def release(self, request: Request, is_intact: bool = True) -> None:
        """Take back the slot and the pages of a running request.

        `is_intact` is True if the slot and the pages hold the state after the request's computed tokens. Only such a
        state may be kept for later requests.
        """
        if is_intact:
            self.cache.take_over(request)
        else:
            self.slots.give_back([request.slot_id])
            self.pages.give_back(request.block_table)
        request.slot, request.block_table = None, array.array(PAGE_NUMBERS)
