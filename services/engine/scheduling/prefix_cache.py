"""The `PrefixCache` lets requests with the same first tokens reuse KV pages and saved states; it touches no tensor.

A KV page is found by a hash that covers the page's tokens and all earlier tokens. A recurrent state cannot be cut at a
page, so a request can start only after a number of tokens at which a checkpoint has saved the state. Checkpoints are
therefore placed at lengths where reuse is likely (`PrefixCache._checkpoint_lens`). If a request and an earlier request
have the same tokens up to a length without a checkpoint, the new request saves a checkpoint there for later requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from services.engine.request import Request
from services.engine.scheduling.memory import IdPool, PagePool
from services.engine.scheduling.state_checkpoints import CheckpointStore, RecentHashes, StateCheckpoint

# Smallest number of pages between two checkpoints of a request. Computing fewer pages again costs at most one step.
MIN_PAGES_APART = 2


@dataclass(frozen=True)
class CacheConfig:
    """A `CacheConfig` holds the settings of a `PrefixCache`; lengths are in tokens.

    - `bytes_per_slot`: 0 for a family without recurrent state. Requests of such a family can start at any kept page.
    - `align`: the lengths of checkpoints within a prompt are multiples of `align`.
    - `interval`: the largest number of tokens between two checkpoints of a prompt.
    - `turn_end_ids`: tokens that end a turn of a conversation.
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
        """Return the smallest number of tokens for which a checkpoint is worth its memory."""
        return MIN_PAGES_APART * self.block_size


@dataclass(frozen=True)
class CachedPrefix:
    """A `CachedPrefix` says where a request can start: after `length` tokens, whose full pages are `pages`.

    `checkpoint` holds the recurrent state and the last page if this page is not full. The request needs copies of the
    state and of this page.
    """

    length: int = 0
    pages: tuple[int, ...] = ()
    checkpoint: StateCheckpoint | None = None


@dataclass
class CacheCounts:
    """A `CacheCounts` counts the tokens that requests reused, and the reasons why requests could not reuse more."""

    num_cached_tokens: int = 0  # prompt tokens that requests reused
    by_reason: Counter[str] = field(default_factory=Counter)  # number of started requests, by `Request.cache_reason`


class PrefixCache:
    """A `PrefixCache` finds the longest saved prefix of a request, and saves states for later requests.

    The prefix cache shares `slots` and `pages` with the running requests.
    """

    def __init__(self, config: CacheConfig, slots: IdPool, pages: PagePool) -> None:
        self.config, self.slots, self.pages = config, slots, pages
        self.checkpoints = CheckpointStore(
            config.block_size, config.bytes_per_slot, config.bytes_per_block, slots, pages
        )
        self.counts = CacheCounts()
        self._seen = RecentHashes()  # hashes of the pages of all requests that have started

    # Finding prefixes

    def look_up(self, request: Request) -> CachedPrefix:
        """Return the longest saved prefix of the request without the request's last token; change no checkpoint."""
        if not self._can_reuse(request):
            return CachedPrefix()
        num_changes = self.checkpoints.num_changes
        if request.looked_up is None or request.looked_up[0] != num_changes:
            request.looked_up = (num_changes, self._look_up(request))
        found: CachedPrefix = request.looked_up[1]
        return found

    def _look_up(self, request: Request) -> CachedPrefix:
        checkpoint = self.checkpoints.longest(request, request.num_tokens - 1)
        size, kept, hashes = self.config.block_size, self.checkpoints.kept, request.hash_pages(self.config.block_size)
        num_full = checkpoint.length // size if checkpoint else 0
        if not self.config.has_slots:
            num_kept = self.checkpoints.num_kept(hashes[: (request.num_tokens - 1) // size])
            if num_kept * size > (checkpoint.length if checkpoint else 0):
                return CachedPrefix(num_kept * size, tuple(kept[h].page for h in hashes[:num_kept]))
        if checkpoint is None:
            return CachedPrefix()
        return CachedPrefix(checkpoint.length, tuple(kept[h].page for h in hashes[:num_full]), checkpoint)

    def will_be_saved(self, request: Request, prefix: CachedPrefix, running: Iterable[Request]) -> bool:
        """Return True if a running request will soon save a prefix of `request` that is longer than `prefix`.

        Consider only running requests that come before `request` in serving order.
        """
        if not self._can_reuse(request) or not self.checkpoints.can_free_slot():
            return False
        first, size = prefix.length + self.config.min_len, self.config.block_size
        return any(
            first <= length < request.num_tokens and request.prefix_key(length, size) == other.prefix_key(length, size)
            for other in running
            if other.order < request.order
            for length in other.due_checkpoints
        )

    def note_start(self, request: Request, prefix: CachedPrefix) -> None:
        """Count a request that starts after `prefix`, and choose the lengths at which to save the request's state."""
        request.looked_up = None  # out of date if the request waits again with more tokens
        hashes = request.hash_pages(self.config.block_size) if self.config.is_on else []
        if used := prefix.checkpoint or self.checkpoints.keeper(hashes[: len(prefix.pages)]):
            self.checkpoints.note_use(used)
        is_first = not request.cache_reason
        num_seen = _num_leading(hashes, self._seen) if is_first else 0
        if is_first:
            request.num_cached = min(prefix.length, request.num_prompt_tokens)
            request.cache_reason = self._reason(request, prefix.length, num_seen)
            self.counts.num_cached_tokens += request.num_cached
            self.counts.by_reason[request.cache_reason] += 1
        if self.config.is_on:
            request.due_checkpoints = self._checkpoint_lens(request, prefix.length, num_seen)
            self._remember(request)

    def _can_reuse(self, request: Request) -> bool:
        return self.config.is_on and request.params.prompt_logprobs is None

    def _reason(self, request: Request, length: int, num_seen: int) -> str:
        """Return the `TokenOutput.cache_reason` of a request that reuses `length` tokens.

        `num_seen` is the number of the request's first pages that earlier requests had, too.
        """
        if not self.config.is_on:
            return "disabled"
        if request.params.prompt_logprobs is not None:
            return "prompt_logprobs"
        hashes, seen_len = request.hash_pages(self.config.block_size), num_seen * self.config.block_size
        if length and 2 * length >= seen_len:
            return "hit"
        if any(h in self.checkpoints.evicted for h in hashes[length // self.config.block_size :]):
            return "evicted"
        if seen_len >= length + self.config.min_len:
            return "no_checkpoint_at_boundary"
        return "no_match" if request.num_tokens > self.config.min_len else "too_short"

    def _checkpoint_lens(self, request: Request, start: int, num_seen: int) -> list[int]:
        """Return the ascending lengths at which to save the state of a request that starts after `start` tokens.

        Such lengths are the end of the prompt's first turn, the end of its last turn, and every multiple of `interval`.
        The end of the first `num_seen` pages is one, too, because earlier requests had these pages.
        """
        size, interval, align = self.config.block_size, self.config.interval, self.config.align
        limit = min(request.num_prompt_tokens, request.num_tokens - 1)
        branch = min(num_seen, limit // size) * size
        candidates = [*_turn_ends(request, self.config.turn_end_ids), branch, *range(interval, limit + 1, interval)]
        due: list[int] = []
        for length in sorted(length // align * align for length in candidates):
            if (due[-1] if due else start) + self.config.min_len <= length <= limit:
                due.append(length)
        return due

    def _remember(self, request: Request) -> None:
        for page_hash in reversed(request.hash_pages(self.config.block_size)):  # so the first page is forgotten last
            self._seen.add(page_hash)

    # Saving states

    def save_copy(self, request: Request) -> StateCheckpoint | None:
        """Return a new checkpoint for a running request; the caller copies the request's slot to the checkpoint's slot.

        Return None if the state covers too few tokens, is saved already, or is worth less than every other checkpoint.
        """
        return self.checkpoints.save_copy(request) if self._is_worth_saving(request) else None

    def take_over(self, request: Request) -> None:
        """Take the slot and the pages of a request that stops running, and keep the state if later requests may use it.

        The slot and the pages must hold the state after the request's computed tokens.
        """
        assert request.slot is not None
        if self._is_worth_saving(request):
            self.checkpoints.take_over(request)
            self._remember(request)
        else:
            self.slots.give_back([request.slot])
        self.pages.give_back(request.block_table)

    def _is_worth_saving(self, request: Request) -> bool:
        length = request.num_computed_tokens
        if not self.config.is_on or length < self.config.min_len:
            return False
        return not self.checkpoints.refresh(request.prefix_key(length, self.config.block_size))


def _num_leading(hashes: Sequence[bytes], known: Container[bytes]) -> int:
    """Return the number of hashes before the first hash that is not in `known`."""
    for i, page_hash in enumerate(hashes):
        if page_hash not in known:
            return i
    return len(hashes)


def _turn_ends(request: Request, turn_end_ids: Iterable[int]) -> tuple[int, ...]:
    """Return the lengths of the prompt up to the end of its first turn and of its last turn, or () if no turn ends."""
    prompt = request.token_ids[: request.num_prompt_tokens]
    present = [token_id for token_id in turn_end_ids if token_id in prompt]
    if not present:
        return ()
    first = min(prompt.index(token_id) for token_id in present)
    prompt.reverse()
    last = len(prompt) - 1 - min(prompt.index(token_id) for token_id in present)
    return first + 1, last + 1
