"""What earlier requests computed, for those that begin with the same tokens. Touches no tensor.

KV pages are found by a hash of their tokens and of all tokens before them. Recurrent state cannot be cut at a page:
a request can only start where a *checkpoint* saved it. So checkpoints are placed where reuse happens (`_due`), and a
request that finds no checkpoint where its tokens part from an earlier one's leaves one there for the next.

What the cache holds is free memory with a memory: whoever runs may take it. The checkpoint that goes first is the one
of the least value per byte (greedy-dual-size-frequency, Cherkasova 1998): tokens it saves beyond the next shorter one,
times its uses, over its bytes, plus the value of what was last evicted when it was last used.
"""

from __future__ import annotations

import array
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.engine.memory import IdPool, PagePool
from services.engine.request import Request

MAX_REMEMBERED = 1 << 16  # hashes of pages that were seen, and of checkpoints that were evicted
MIN_PAGES_APART = 2  # between checkpoints of one request: recomputing less costs no more than another step
DIGEST_BYTES = 16
ROOT = b""  # the hash of no tokens


@dataclass(frozen=True)
class CacheConfig:
    """Lengths in tokens. `bytes_per_slot` 0: a family without recurrent state, which can start at any kept page.

    `align`: lengths of checkpoints within a prompt are multiples of it. `turn_end_ids`: tokens that end a turn.
    """

    block_size: int
    bytes_per_slot: int = 1
    bytes_per_block: int = 1
    align: int = 1
    interval: int = 1024
    turn_end_ids: frozenset[int] = frozenset()
    is_on: bool = True

    @property
    def has_slots(self) -> bool:
        return self.bytes_per_slot > 0

    @property
    def min_len(self) -> int:
        return MIN_PAGES_APART * self.block_size


@dataclass(eq=False, slots=True)
class StateCheckpoint:
    """The state after `length` tokens: a slot (None: there is no recurrent state) and the pages of these tokens.

    Full pages are found by `page_hashes`; `tail_page` holds the rest, where `length` is no multiple of a page.
    """

    key: bytes
    length: int
    page_hashes: tuple[bytes, ...]
    slot: int | None
    tail_page: int | None
    tail_ids: tuple[int, ...]  # the tokens of `tail_page`
    base: StateCheckpoint | None  # the longest one of fewer tokens on its way
    base_value: float  # of the last evicted, when this was last used
    num_uses: int = 1
    num_above: int = 0  # checkpoints whose base this is


@dataclass(frozen=True)
class Start:
    """Where a request can start: after `length` tokens, whose full pages are `pages`.

    The recurrent state and a page that is not full are the checkpoint's, to be copied.
    """

    length: int = 0
    pages: tuple[int, ...] = ()
    checkpoint: StateCheckpoint | None = None


@dataclass
class _Page:
    page: int
    token_ids: array.array[int]
    num_checkpoints: int = 0


@dataclass
class CacheCounts:
    num_evictions: int = 0
    num_cached_tokens: int = 0  # that requests reused
    by_reason: Counter[str] = field(default_factory=Counter)  # requests, by how their look-up ended


class PrefixCache:
    """Shares `slots` and `pages` with the scheduler, which takes from them for requests."""

    def __init__(self, config: CacheConfig, slots: IdPool, pages: PagePool) -> None:
        self.config, self.slots, self.pages = config, slots, pages
        self.counts = CacheCounts()
        self._checkpoints: dict[bytes, StateCheckpoint] = {}
        self._kept: dict[bytes, _Page] = {}  # full pages of checkpoints
        self._tails: dict[bytes, Counter[int]] = {}  # by hash of the full pages: how many tokens follow, how often
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._value = 0.0  # of the last evicted
        self._num_changes = 0  # of what can be found

    @property
    def num_checkpoints(self) -> int:
        return len(self._checkpoints)

    @property
    def num_slots(self) -> int:
        return len(self._checkpoints) if self.config.has_slots else 0

    # Finding

    def look_up(self, request: Request) -> Start:
        """The longest saved beginning of the request, at most all tokens but the last; changes nothing."""
        if not self._can_reuse(request):
            return Start()
        if request.looked_up is None or request.looked_up[0] != self._num_changes:
            request.looked_up = (self._num_changes, self._look_up(request))
        found: Start = request.looked_up[1]
        return found

    def _look_up(self, request: Request) -> Start:
        checkpoint = self._longest(request, request.num_tokens - 1)
        if not self.config.has_slots:
            hashes = self.hashes(request)[: (request.num_tokens - 1) // self.config.block_size]
            num_kept = _num_leading(hashes, self._kept)
            if num_kept * self.config.block_size > (checkpoint.length if checkpoint else 0):
                return Start(num_kept * self.config.block_size, tuple(self._kept[h].page for h in hashes[:num_kept]))
        if checkpoint is None:
            return Start()
        return Start(checkpoint.length, tuple(self._kept[h].page for h in checkpoint.page_hashes), checkpoint)

    def is_on_its_way(self, request: Request, start: Start, running: Iterable[Request]) -> bool:
        """Whether a running request, served before this one, is about to save a state that it could start from."""
        if not self._can_reuse(request) or not self.can_free_slot():
            return False
        first = start.length + self.config.min_len
        return any(
            first <= length < request.num_tokens and self._key(request, length) == self._key(other, length)
            for other in running
            if other.order < request.order
            for length in other.due_checkpoints
        )

    def begin(self, request: Request, start: Start) -> None:
        """Counts a request that starts there, remembers its way, and sets when its own state is to be saved."""
        request.looked_up = None  # its tokens will become more
        if used := start.checkpoint or self._keeper(request, start):
            used.num_uses += 1
            used.base_value = self._value
        is_first = not request.cache_reason
        num_seen = _num_leading(self.hashes(request), self._seen) if is_first and self.config.is_on else 0
        if is_first:
            request.num_cached = min(start.length, request.num_prompt_tokens)
            request.cache_reason = self._reason(request, start.length, num_seen)
            self.counts.num_cached_tokens += request.num_cached
            self.counts.by_reason[request.cache_reason] += 1
        if self.config.is_on:
            request.due_checkpoints = self._due(request, start.length, num_seen)
            self._remember(request)

    def hashes(self, request: Request) -> list[bytes]:
        """Of the request's full pages, each with all tokens before it."""
        size, hashes = self.config.block_size, request.page_hashes
        for i in range(len(hashes), request.num_tokens // size):
            hashes.append(_digest(hashes[-1] if hashes else ROOT, request.token_ids[i * size : (i + 1) * size]))
        return hashes

    def _key(self, request: Request, length: int) -> bytes:
        num_full = length // self.config.block_size
        parent = self.hashes(request)[num_full - 1] if num_full else ROOT
        tail = request.token_ids[num_full * self.config.block_size : length]
        return _digest(parent, tail) if tail else parent

    def _longest(self, request: Request, limit: int) -> StateCheckpoint | None:
        """The longest checkpoint of at most `limit` tokens that the request begins with."""
        size, hashes = self.config.block_size, self.hashes(request)
        for num_full in range(limit // size, 0, -1):
            parent = hashes[num_full - 1]
            for num_tail in sorted(self._tails.get(parent, ()), reverse=True):
                length = num_full * size + num_tail
                if length <= limit and (found := self._checkpoints.get(self._key(request, length))):
                    return found
            if found := self._checkpoints.get(parent):
                return found
        return None

    def _can_reuse(self, request: Request) -> bool:
        return self.config.is_on and request.params.prompt_logprobs is None

    def _keeper(self, request: Request, start: Start) -> StateCheckpoint | None:
        """A checkpoint that keeps the pages which the request starts with."""
        if not start.pages:
            return None
        i, last = len(start.pages) - 1, self.hashes(request)[len(start.pages) - 1]
        return next((c for c in self._checkpoints.values() if c.page_hashes[i : i + 1] == (last,)), None)

    def _reason(self, request: Request, length: int, num_seen: int) -> str:
        if not self.config.is_on:
            return "disabled"
        if request.params.prompt_logprobs is not None:
            return "prompt_logprobs"
        hashes, seen_len = self.hashes(request), num_seen * self.config.block_size
        if length and 2 * length >= seen_len:
            return "hit"
        if any(h in self._evicted for h in hashes[length // self.config.block_size :]):
            return "evicted"
        if seen_len >= length + self.config.min_len:
            return "no_checkpoint_at_boundary"
        return "no_match" if request.num_tokens > self.config.min_len else "too_short"

    def _due(self, request: Request, start: int, num_seen: int) -> list[int]:
        """Ends of the first and the last turn, where the way of an earlier request ends, and every `interval`."""
        size, interval, align = self.config.block_size, self.config.interval, self.config.align
        limit = min(request.num_prompt_tokens, request.num_tokens - 1)
        branch = min(num_seen, limit // size) * size
        wanted = [*_turn_ends(request, self.config.turn_end_ids), branch, *range(interval, limit + 1, interval)]
        due: list[int] = []
        for length in sorted(length // align * align for length in wanted):
            if (due[-1] if due else start) + self.config.min_len <= length <= limit:
                due.append(length)
        return due

    def _remember(self, request: Request) -> None:
        for page_hash in reversed(self.hashes(request)):  # the beginning is the last to be forgotten
            _remember(self._seen, page_hash)

    # Saving

    def save_copy(self, request: Request) -> StateCheckpoint | None:
        """Saves the request's state as it is now; the slot is to be copied to the checkpoint's. None: not worth it."""
        key, length = self._key(request, request.num_computed_tokens), request.num_computed_tokens
        if not self.config.is_on or length < self.config.min_len or self._is_known(key):
            return None
        base = self._longest(request, length)
        if not self.config.has_slots:
            return self._insert(request, key, None, base)
        if not self.slots.can_take(1):
            worst = min(self._checkpoints.values(), key=self._worth, default=None)
            if worst is None or self._worth(worst) > self._worth_of_new(length, base):
                return None
            self.evict(worst)
            base = base.base if worst is base and base else base
        [slot] = self.slots.take(1)
        return self._insert(request, key, slot, base)

    def take_over(self, request: Request) -> None:
        """Takes the slot and the pages of a request that leaves, whose state is that of its computed tokens."""
        key, length = self._key(request, request.num_computed_tokens), request.num_computed_tokens
        assert request.slot is not None
        if not self.config.is_on or length < self.config.min_len or self._is_known(key):
            self.slots.give_back([request.slot])
        else:
            self._insert(request, key, request.slot if self.config.has_slots else None, self._longest(request, length))
            if not self.config.has_slots:
                self.slots.give_back([request.slot])
            self._remember(request)
        self.pages.give_back(request.block_table)

    def _is_known(self, key: bytes) -> bool:
        if known := self._checkpoints.get(key):
            known.base_value = self._value
        return known is not None

    def _insert(self, request: Request, key: bytes, slot: int | None, base: StateCheckpoint | None) -> StateCheckpoint:
        length, size = request.num_computed_tokens, self.config.block_size
        num_full = length // size
        hashes = tuple(self.hashes(request)[:num_full])
        for i, (page_hash, page) in enumerate(zip(hashes, request.block_table, strict=False)):
            if page_hash not in self._kept:
                ids = array.array("i", request.token_ids[i * size : (i + 1) * size])
                self._kept[page_hash] = _Page(page, ids)
                self.pages.keep(page)
            self._kept[page_hash].num_checkpoints += 1
        tail_page = None
        if length % size:
            tail_page = request.block_table[num_full]
            self.pages.keep(tail_page)
            self._tails.setdefault(hashes[-1], Counter())[length % size] += 1
        tail_ids = tuple(request.token_ids[num_full * size : length])
        new = StateCheckpoint(key, length, hashes, slot, tail_page, tail_ids, base, self._value)
        self._num_changes += 1
        self._put_between(base, new)
        self._checkpoints[key] = new
        self._evicted.pop(hashes[-1], None)
        return new

    def _put_between(self, base: StateCheckpoint | None, new: StateCheckpoint) -> None:
        for other in self._checkpoints.values():
            if other.base is base and self._goes_on(other, new):
                other.base = new
                new.num_above += 1
        if base:
            base.num_above += 1 - new.num_above

    def _goes_on(self, longer: StateCheckpoint, shorter: StateCheckpoint) -> bool:
        num_full = len(shorter.page_hashes)
        last = slice(num_full - 1, num_full)
        if longer.length <= shorter.length or longer.page_hashes[last] != shorter.page_hashes[last]:
            return False
        next_full = longer.page_hashes[num_full : num_full + 1]
        next_ids = self._kept[next_full[0]].token_ids if next_full else longer.tail_ids
        return tuple(next_ids[: len(shorter.tail_ids)]) == shorter.tail_ids

    # Evicting

    def evict(self, checkpoint: StateCheckpoint, is_valid: bool = True) -> None:
        """Frees the checkpoint's slot, and its pages as far as nobody else keeps or uses them.

        `is_valid`: whether it held what it said; one that never did is forgotten without a trace.
        """
        if self._checkpoints.get(checkpoint.key) is not checkpoint:
            return  # gone already
        del self._checkpoints[checkpoint.key]
        self._num_changes += 1
        for other in self._checkpoints.values():
            if other.base is checkpoint:
                other.base = checkpoint.base
        if checkpoint.base:
            checkpoint.base.num_above += checkpoint.num_above - 1
        if is_valid:
            self._value = max(self._value, self._worth(checkpoint))
            self.counts.num_evictions += 1
            _remember(self._evicted, checkpoint.page_hashes[-1])
        if checkpoint.slot is not None:
            self.slots.give_back([checkpoint.slot])
        self._forget_pages(checkpoint)

    def _forget_pages(self, checkpoint: StateCheckpoint) -> None:
        for page_hash in checkpoint.page_hashes:
            kept = self._kept[page_hash]
            kept.num_checkpoints -= 1
            if not kept.num_checkpoints:
                del self._kept[page_hash]
                self.pages.drop(kept.page)
        if checkpoint.tail_page is not None:
            self.pages.drop(checkpoint.tail_page)
            parent = checkpoint.page_hashes[-1]
            self._tails[parent] -= Counter([checkpoint.length % self.config.block_size])
            if not self._tails[parent]:
                del self._tails[parent]

    def can_free_pages(self, count: int) -> bool:
        return self.pages.num_free + self.pages.num_idle >= count

    def free_pages(self, count: int) -> None:
        """Evicts until `count` pages are free."""
        assert self.can_free_pages(count)
        while not self.pages.can_take(count):
            some = [c for c in self._checkpoints.values() if self._frees_last_page(c)]
            self.evict(min(some or self._checkpoints.values(), key=self._worth))

    def can_free_slot(self) -> bool:
        return not self.config.has_slots or self.slots.can_take(1) or self.num_slots > 0

    def free_slot(self, rather_not: StateCheckpoint | None = None) -> None:
        """Evicts a checkpoint unless a slot is free; `rather_not` only if there is no other."""
        assert self.can_free_slot()
        if not self.slots.can_take(1):
            others = [c for c in self._checkpoints.values() if c is not rather_not]
            self.evict(min(others or self._checkpoints.values(), key=self._worth))

    def _frees_last_page(self, checkpoint: StateCheckpoint) -> bool:
        if checkpoint.tail_page is not None and self.pages.is_freed_by_drop(checkpoint.tail_page):
            return True
        kept = self._kept[checkpoint.page_hashes[-1]]
        return kept.num_checkpoints == 1 and self.pages.is_freed_by_drop(kept.page)

    def _worth(self, checkpoint: StateCheckpoint) -> float:
        saved = checkpoint.length - (checkpoint.base.length if checkpoint.base else 0)
        num_pages = 0 if checkpoint.num_above else -(-saved // self.config.block_size)
        num_bytes = self.config.bytes_per_slot + num_pages * self.config.bytes_per_block
        return checkpoint.base_value + checkpoint.num_uses * saved / max(num_bytes, 1)

    def _worth_of_new(self, length: int, base: StateCheckpoint | None) -> float:
        return self._worth(StateCheckpoint(ROOT, length, (), None, None, (), base, self._value))


def _digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array.array("i", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


def _num_leading(hashes: Sequence[bytes], known: dict[bytes, _Page] | OrderedDict[bytes, None]) -> int:
    """How many of the first hashes are known, up to the first that is not."""
    for i, page_hash in enumerate(hashes):
        if page_hash not in known:
            return i
    return len(hashes)


def _turn_ends(request: Request, turn_end_ids: Iterable[int]) -> tuple[int, ...]:
    """Lengths of the prompt up to and with the end of its first and of its last turn."""
    prompt = request.token_ids[: request.num_prompt_tokens]
    present = [token_id for token_id in turn_end_ids if token_id in prompt]
    if not present:
        return ()
    first = min(prompt.index(token_id) for token_id in present)
    prompt.reverse()
    last = len(prompt) - 1 - min(prompt.index(token_id) for token_id in present)
    return first + 1, last + 1


def _remember(memory: OrderedDict[bytes, None], key: bytes) -> None:
    memory[key] = None
    memory.move_to_end(key)
    if len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)
