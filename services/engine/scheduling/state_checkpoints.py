"""The `CheckpointStore` keeps saved states, called checkpoints, from which later requests can start.

A checkpoint keeps KV pages and, in families with recurrent state, a slot. This memory counts as free: when a running
request needs a slot or a page, the store evicts checkpoints. The checkpoint of the lowest value is evicted first
(greedy-dual-size-frequency, Cherkasova 1998). The value of a checkpoint is the sum of two terms:

- the number of tokens that the checkpoint holds beyond its base, times its number of uses, divided by its bytes;
- the highest value of any checkpoint that was evicted before this checkpoint was last used.

The base of a checkpoint is the longest other checkpoint that holds a prefix of the checkpoint's tokens. A checkpoint
records only the pages that its base does not have. So saving and evicting a checkpoint take time for these pages alone,
although a checkpoint of a million tokens needs the pages of all checkpoints below it.
"""

from __future__ import annotations

import array
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from services.engine.request import HASH_OF_NOTHING, Request
from services.engine.scheduling.memory import IdPool, PagePool

MAX_REMEMBERED = 1 << 16  # hashes in a `RecentHashes`; hashes of 16 bytes take a few megabytes together


@dataclass(eq=False, slots=True)
class StateCheckpoint:
    """A `StateCheckpoint` is the saved state after `length` tokens: a slot, and the KV pages of these tokens.

    - `last_hash`: the hash of the last full page.
    - `page_hashes`: the hashes of the full pages after those of `base`; `CheckpointStore.kept` has the pages by hash.
    - `slot`: the slot of the recurrent state; None in families without recurrent state.
    - `tail_page`: the page of the tokens after the last full page; None without such tokens.
    """

    key: bytes  # the hash of all `length` tokens
    length: int
    last_hash: bytes
    page_hashes: tuple[bytes, ...]
    slot: int | None
    tail_page: int | None
    tail_ids: tuple[int, ...]  # the tokens of `tail_page`
    base: StateCheckpoint | None  # the longest checkpoint of a shorter prefix of the tokens
    value_at_use: float  # the highest value of any checkpoint evicted before this checkpoint was last used
    num_uses: int = 1
    num_above: int = 0  # number of checkpoints whose base is this checkpoint


@dataclass
class KeptPage:
    """A `KeptPage` is a full KV page that is in the `page_hashes` of `num_checkpoints` checkpoints."""

    page: int
    token_ids: array.array[int]
    num_checkpoints: int = 0


class RecentHashes:
    """A `RecentHashes` remembers at most MAX_REMEMBERED hashes, and forgets the hash that was added longest ago."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, page_hash: object) -> bool:
        return page_hash in self._hashes

    def add(self, page_hash: bytes) -> None:
        """Add a hash, or mark a known hash as the most recent hash."""
        self._hashes[page_hash] = None
        self._hashes.move_to_end(page_hash)
        if len(self._hashes) > MAX_REMEMBERED:
            self._hashes.popitem(last=False)

    def discard(self, page_hash: bytes) -> None:
        """Remove a hash; do nothing if the hash is not known."""
        self._hashes.pop(page_hash, None)


class CheckpointStore:
    """A `CheckpointStore` finds checkpoints by a request's tokens, and evicts the least valuable checkpoint if needed.

    - `page_size`: tokens per KV page.
    - `bytes_per_slot`: bytes of a slot; 0 if the family has no recurrent state, so that checkpoints need no slots.
    - `bytes_per_page`: bytes of a KV page.
    - `slots`, `pages`: the pools that checkpoints share with the running requests.
    """

    def __init__(
        self, page_size: int, bytes_per_slot: int, bytes_per_page: int, slots: IdPool, pages: PagePool
    ) -> None:
        self.page_size, self.bytes_per_slot, self.bytes_per_page = page_size, bytes_per_slot, bytes_per_page
        self.slots, self.pages = slots, pages
        self.kept: dict[bytes, KeptPage] = {}  # full pages of checkpoints, by hash
        self.evicted = RecentHashes()  # hashes of the last full page of each evicted checkpoint
        self.num_evictions = 0
        # Number of changes to the set of checkpoints. After a change `longest` may find another checkpoint.
        self.num_changes = 0
        self._by_key: dict[bytes, StateCheckpoint] = {}
        # By the hash of a last full page: how many checkpoints have 1, 2, 3, ... tokens after this page.
        self._tail_lens: dict[bytes, Counter[int]] = {}
        self._evicted_value = 0.0  # the highest value that any evicted checkpoint had

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[StateCheckpoint]:
        return iter(self._by_key.values())

    @property
    def has_slots(self) -> bool:
        """Return True if a checkpoint needs a slot for its recurrent state."""
        return self.bytes_per_slot > 0

    @property
    def num_slots(self) -> int:
        """Return the number of slots that checkpoints hold."""
        return len(self._by_key) if self.has_slots else 0

    # Finding checkpoints

    def longest(self, request: Request, limit: int) -> StateCheckpoint | None:
        """Return the longest checkpoint of at most `limit` tokens whose tokens are a prefix of the request, or None."""
        size, hashes = self.page_size, request.hash_pages(self.page_size)
        for num_full in range(self.num_kept(hashes[: limit // size]), 0, -1):
            parent = hashes[num_full - 1]
            for num_tail in sorted(self._tail_lens.get(parent, ()), reverse=True):
                length = num_full * size + num_tail
                if length <= limit and (found := self._by_key.get(request.prefix_key(length, size))):
                    return found
            if found := self._by_key.get(parent):
                return found
        return None

    def num_kept(self, hashes: Sequence[bytes]) -> int:
        """Return how many of a request's first pages are kept; `hashes` are the hashes of its pages in order.

        The search is binary, because whoever keeps a page keeps all pages before it, too.
        """
        return bisect_left(hashes, True, key=lambda page_hash: page_hash not in self.kept)

    def keeper(self, page_hashes: Sequence[bytes]) -> StateCheckpoint | None:
        """Return a checkpoint that keeps the last of the pages with these hashes, or None if `page_hashes` is empty."""
        if not page_hashes:
            return None
        i, last = len(page_hashes) - 1, page_hashes[-1]
        for checkpoint in self._by_key.values():
            place = i - self._num_full(checkpoint.base)
            if place >= 0 and checkpoint.page_hashes[place : place + 1] == (last,):
                return checkpoint
        return None

    def note_use(self, checkpoint: StateCheckpoint) -> None:
        """Count one more request that starts from the checkpoint, which makes the checkpoint more valuable."""
        checkpoint.num_uses += 1
        checkpoint.value_at_use = self._evicted_value

    def refresh(self, key: bytes) -> bool:
        """Return True if a checkpoint has this key; if so, treat this moment as the checkpoint's last use."""
        if known := self._by_key.get(key):
            known.value_at_use = self._evicted_value
        return known is not None

    # Saving states

    def save_copy(self, request: Request) -> StateCheckpoint | None:
        """Insert a checkpoint of the request's computed tokens with a free slot; the caller copies the state into it.

        If no slot is free, evict the least valuable checkpoint. Return None if there is no checkpoint to evict, or if
        even the least valuable checkpoint is worth more than the new checkpoint would be.
        """
        length = request.num_computed_tokens
        base = self.longest(request, length)
        if not self.has_slots:
            return self._insert(request, None, base)
        if not self.slots.can_take(1):
            worst = min(self._by_key.values(), key=self._value, default=None)
            if worst is None or self._value(worst) > self._value_of_new(length, base):
                return None
            self.evict(worst)
            base = base.base if worst is base and base else base
        [slot] = self.slots.take(1)
        return self._insert(request, slot, base)

    def take_over(self, request: Request) -> None:
        """Insert a checkpoint of the request's computed tokens; the checkpoint takes over the request's slot."""
        assert request.slot is not None
        base = self.longest(request, request.num_computed_tokens)
        self._insert(request, request.slot if self.has_slots else None, base)
        if not self.has_slots:
            self.slots.give_back([request.slot])

    def _insert(self, request: Request, slot: int | None, base: StateCheckpoint | None) -> StateCheckpoint:
        length, size = request.num_computed_tokens, self.page_size
        key, num_full, num_shared = request.prefix_key(length, size), length // size, self._num_full(base)
        hashes = request.hash_pages(size)
        for i in range(num_shared, num_full):
            if hashes[i] not in self.kept:
                ids = array.array("i", request.token_ids[i * size : (i + 1) * size])
                self.kept[hashes[i]] = KeptPage(request.block_table[i], ids)
                self.pages.keep(request.block_table[i])
            self.kept[hashes[i]].num_checkpoints += 1
        tail_page, last_hash = None, hashes[num_full - 1]
        if length % size:
            tail_page = request.block_table[num_full]
            self.pages.keep(tail_page)
            self._tail_lens.setdefault(last_hash, Counter())[length % size] += 1
        tail_ids, own = tuple(request.token_ids[num_full * size : length]), tuple(hashes[num_shared:num_full])
        new = StateCheckpoint(key, length, last_hash, own, slot, tail_page, tail_ids, base, self._evicted_value)
        self.num_changes += 1
        self._put_between(base, new)
        self._by_key[key] = new
        self.evicted.discard(last_hash)
        return new

    def _num_full(self, checkpoint: StateCheckpoint | None) -> int:
        """Return the number of full pages that a checkpoint and the checkpoints below it have together."""
        return checkpoint.length // self.page_size if checkpoint else 0

    def _put_between(self, base: StateCheckpoint | None, new: StateCheckpoint) -> None:
        """Make `new` the base of each checkpoint whose base is `base` and whose tokens begin with those of `new`."""
        for other in self._by_key.values():
            if other.base is base and self._continues(other, new):
                other.base, other.page_hashes = new, other.page_hashes[len(new.page_hashes) :]
                self._count(new.page_hashes, -1)
                new.num_above += 1
        if base:
            base.num_above += 1 - new.num_above

    def _continues(self, longer: StateCheckpoint, shorter: StateCheckpoint) -> bool:
        """Return True if the tokens of `longer` begin with all tokens of `shorter`; both have the same base."""
        num_own = len(shorter.page_hashes)
        if longer.length <= shorter.length or longer.page_hashes[:num_own][-1:] != shorter.page_hashes[-1:]:
            return False
        next_full = longer.page_hashes[num_own : num_own + 1]
        next_ids = self.kept[next_full[0]].token_ids if next_full else longer.tail_ids
        return tuple(next_ids[: len(shorter.tail_ids)]) == shorter.tail_ids

    # Evicting checkpoints

    def evict(self, checkpoint: StateCheckpoint, is_valid: bool = True) -> None:
        """Remove a checkpoint and free its slot; free each of its pages that no checkpoint and no request needs.

        `is_valid` is False for a checkpoint whose state was never copied. Such a checkpoint does not count as evicted.
        """
        if self._by_key.get(checkpoint.key) is not checkpoint:
            return  # the checkpoint was evicted earlier
        del self._by_key[checkpoint.key]
        self.num_changes += 1
        for other in self._by_key.values():
            if other.base is checkpoint:
                other.base, other.page_hashes = checkpoint.base, checkpoint.page_hashes + other.page_hashes
        if checkpoint.base:
            checkpoint.base.num_above += checkpoint.num_above - 1
        if is_valid:
            self._evicted_value = max(self._evicted_value, self._value(checkpoint))
            self.num_evictions += 1
            self.evicted.add(checkpoint.last_hash)
        if checkpoint.slot is not None:
            self.slots.give_back([checkpoint.slot])
        self._drop_pages(checkpoint)

    def _drop_pages(self, checkpoint: StateCheckpoint) -> None:
        self._count(checkpoint.page_hashes, checkpoint.num_above - 1)
        if checkpoint.tail_page is not None:
            self.pages.drop(checkpoint.tail_page)
            parent = checkpoint.last_hash
            self._tail_lens[parent] -= Counter([checkpoint.length % self.page_size])
            if not self._tail_lens[parent]:
                del self._tail_lens[parent]

    def _count(self, page_hashes: Iterable[bytes], change: int) -> None:
        """Change the number of checkpoints that record these pages; drop each page that no checkpoint records."""
        for page_hash in page_hashes if change else ():
            kept = self.kept[page_hash]
            kept.num_checkpoints += change
            if not kept.num_checkpoints:
                del self.kept[page_hash]
                self.pages.drop(kept.page)

    def can_free_pages(self, count: int) -> bool:
        """Return True if `count` pages are free or can be freed by evicting checkpoints."""
        return self.pages.num_free + self.pages.num_idle >= count

    def free_pages(self, count: int) -> None:
        """Evict checkpoints until `count` pages are free."""
        assert self.can_free_pages(count)
        while not self.pages.can_take(count):
            some = [c for c in self._by_key.values() if self._frees_last_page(c)]
            self.evict(min(some or self._by_key.values(), key=self._value))

    def can_free_slot(self) -> bool:
        """Return True if a slot is free or can be freed by evicting a checkpoint."""
        return not self.has_slots or self.slots.can_take(1) or self.num_slots > 0

    def free_slot(self, spare: StateCheckpoint | None = None) -> None:
        """Evict a checkpoint if no slot is free; evict the checkpoint `spare` only if there is no other checkpoint."""
        assert self.can_free_slot()
        if not self.slots.can_take(1):
            others = [c for c in self._by_key.values() if c is not spare]
            self.evict(min(others or self._by_key.values(), key=self._value))

    def _frees_last_page(self, checkpoint: StateCheckpoint) -> bool:
        if checkpoint.tail_page is not None and self.pages.is_freed_by_drop(checkpoint.tail_page):
            return True
        if checkpoint.num_above or not checkpoint.page_hashes:
            return False  # a checkpoint above or below this checkpoint needs the last full page
        kept = self.kept[checkpoint.last_hash]
        return kept.num_checkpoints == 1 and self.pages.is_freed_by_drop(kept.page)

    def _value(self, checkpoint: StateCheckpoint) -> float:
        """Return the value of a checkpoint as the module's docstring defines it."""
        saved = checkpoint.length - (checkpoint.base.length if checkpoint.base else 0)
        num_pages = 0 if checkpoint.num_above else -(-saved // self.page_size)
        num_bytes = self.bytes_per_slot + num_pages * self.bytes_per_page
        return checkpoint.value_at_use + checkpoint.num_uses * saved / max(num_bytes, 1)

    def _value_of_new(self, length: int, base: StateCheckpoint | None) -> float:
        return self._value(
            StateCheckpoint(HASH_OF_NOTHING, length, HASH_OF_NOTHING, (), None, None, (), base, self._evicted_value)
        )
