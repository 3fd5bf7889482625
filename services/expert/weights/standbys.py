"""`StandbyStore` keeps standbys in host memory as long as they fit into a budget; all other standbys stay on disk."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.configs.expert_memory import PINNED_SLAB, pinned_bytes, slot_offsets
from model.stored_matrix import StoredMatrix
from services.expert.weights.load_order import Key
from services.expert.weights.weights import Weights

HOT_PROMOTIONS = 3  # promotions after which an expert is hot; hot experts are evicted last


def page_locked(num_bytes: int) -> Tensor:
    """Return page-locked memory, which can be copied to a GPU without another copy in between: uint8 (num_bytes,)."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


@dataclass
class _Slab:
    """A `_Slab` is one allocation of page-locked memory, which is cut into slots of one size."""

    memory: Tensor
    slot_bytes: int = 0
    free: deque[int] = field(default_factory=deque)  # the first bytes of the free slots

    def cut(self, slot_bytes: int) -> None:
        """Cut the slab into slots of another size; no slot may be in use."""
        self.slot_bytes = slot_bytes
        self.free = deque(range(0, len(self.memory) - slot_bytes + 1, slot_bytes))

    @property
    def is_unused(self) -> bool:
        return not self.slot_bytes or len(self.free) == len(self.memory) // self.slot_bytes


class PinnedMemory:
    """`PinnedMemory` holds copies of weights in page-locked host memory, up to a budget in bytes.

    The memory comes in slabs, which are allocated when they are needed and kept. A slab is a power of two, because
    torch's allocator rounds page-locked memory up to a power of two. So no more than the budget is page-locked. Any
    thread may call the methods.
    """

    def __init__(self, budget: int, allocate: Callable[[int], Tensor] = page_locked) -> None:
        self.budget, self.allocated_bytes = budget, 0
        self._allocate = allocate
        self._slabs: list[_Slab] = []
        self._lock = threading.Lock()

    def copy(self, weights: Weights) -> Weights | None:
        """Return a copy of `weights` in page-locked memory, or None if no slot is free.

        The slot becomes free again when nobody uses the copy any more.
        """
        offsets = slot_offsets(weights.part_sizes)
        if (found := self._take(offsets[-1])) is None:
            return None
        slab, first = found
        starts, matrices = iter(offsets), {}
        for name, matrix in weights.matrices.items():
            parts = tuple(_copy_into(slab.memory[first + next(starts) :], part) for part in matrix.parts)
            matrices[name] = StoredMatrix(matrix.format, parts)
        copied = Weights(matrices, weights.gain)
        # `append` needs no lock, so garbage collection may call it at any time.
        weakref.finalize(copied, slab.free.append, first).atexit = False
        return copied

    def _take(self, slot_bytes: int) -> tuple[_Slab, int] | None:
        """Return a slab with the first byte of a slot, or None if the budget is used up."""
        with self._lock:
            for slab in self._slabs:
                if slab.slot_bytes == slot_bytes and slab.free:
                    return slab, slab.free.popleft()
            unused = (slab for slab in self._slabs if slab.is_unused and len(slab.memory) >= slot_bytes)
            slab_or_none = next(unused, None) or self._new_slab(slot_bytes)
            if slab_or_none is None:
                return None
            slab_or_none.cut(slot_bytes)
            return slab_or_none, slab_or_none.free.popleft()

    def _new_slab(self, slot_bytes: int) -> _Slab | None:
        """Allocate a slab, or return None if the budget has no power of two left that holds a slot.

        A slab has PINNED_SLAB bytes, or more if a slot needs more, or less if the budget has less left.
        """
        left = self.budget - self.allocated_bytes
        largest = (1 << left.bit_length()) // 2  # the largest power of two up to `left`
        num_bytes = min(max(PINNED_SLAB, 1 << (slot_bytes - 1).bit_length()), largest)
        if num_bytes < slot_bytes:
            return None
        slab = _Slab(self._allocate(num_bytes))
        self._slabs.append(slab)
        self.allocated_bytes += num_bytes
        return slab


def _copy_into(memory: Tensor, part: Tensor) -> Tensor:
    """Copy `part` to the first bytes of `memory`, and return the copy."""
    copied = memory[: part.nbytes].view(part.dtype).view(part.shape)
    return copied.copy_(part)


@dataclass
class Standby:
    """A `Standby` records where a standby's weights are, and how often and when the expert was promoted."""

    weights: Weights | None = None  # the copy in host memory, or None if the expert is only on disk
    peer: str = ""  # endpoint of the shard that was named as the source of the expert, if any
    num_promotions: int = 0
    last_promotion: int = 0  # sequence number of the last promotion, counted over all experts


class StandbyStore:
    """A `StandbyStore` knows the standbys of a shard and decides which standbys are kept in host memory.

    Standbys are kept in host memory in the order in which they are added, until the budget is used up. After that, an
    expert that is promoted from disk replaces the experts in host memory that were promoted least recently.

    If the device is a GPU, standbys are in page-locked memory (`is_pinned`).
    """

    def __init__(self, host_budget: int, *, is_pinned: bool = False) -> None:
        self.host_budget, self.used_bytes = host_budget, 0
        self.pinned = PinnedMemory(host_budget) if is_pinned else None
        self._by_key: dict[Key, Standby] = {}
        self._num_promotions = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def get(self, key: Key) -> Standby | None:
        return self._by_key.get(key)

    def is_hot(self, key: Key) -> bool:
        standby = self._by_key.get(key)
        return standby is not None and standby.num_promotions >= HOT_PROMOTIONS

    @property
    def keys(self) -> list[Key]:
        return list(self._by_key)

    @property
    def in_host_memory(self) -> list[Key]:
        return [key for key, standby in list(self._by_key.items()) if standby.weights is not None]

    def nbytes(self, weights: Weights) -> int:
        """Return the bytes of host memory that a standby with `weights` takes."""
        return weights.nbytes if self.pinned is None else pinned_bytes(weights.part_sizes)

    def has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.host_budget

    def copy(self, weights: Weights) -> Weights | None:
        """Return a copy of `weights` for `add` or `note_promotion`; None if no page-locked memory is free for it.

        Any thread may call this method.
        """
        return weights.in_host_memory() if self.pinned is None else self.pinned.copy(weights)

    def make_room(self, num_bytes: int) -> None:
        """Drop the standbys from host memory that were promoted least recently, until `num_bytes` bytes fit.

        Nothing is dropped if the bytes would not fit even without other standbys.
        """
        if num_bytes > self.host_budget:
            return
        for other in self._coldest_first():
            if self.has_room(num_bytes):
                break
            self._drop(other)

    def drop_coldest(self, num_bytes: int) -> bool:
        """Drop the standby of `num_bytes` bytes that was promoted least recently from host memory.

        Returns False if host memory holds no standby of this size. Page-locked memory may need this call although
        `has_room` is true, because the smaller slabs at the end of the budget hold fewer slots than their bytes.
        """
        same_size = (one for one in self._coldest_first() if one.weights and self.nbytes(one.weights) == num_bytes)
        if (coldest := next(same_size, None)) is None:
            return False
        self._drop(coldest)
        return True

    def _coldest_first(self) -> list[Standby]:
        """Return the standbys in host memory, the one that was promoted least recently first."""
        held = (one for one in self._by_key.values() if one.weights)
        return sorted(held, key=lambda one: one.last_promotion)

    def add(self, key: Key, weights: Weights | None, peer: str = "") -> None:
        """Add a standby; if `weights` are given and fit, keep them in host memory, else read them from disk later."""
        self.remove(key)
        standby = self._by_key[key] = Standby(peer=peer)
        if weights is not None and self.has_room(self.nbytes(weights)):
            self._keep(standby, weights)

    def remove(self, key: Key) -> None:
        """Remove the standby `key` if the store has it."""
        if (standby := self._by_key.pop(key, None)) is not None:
            self._drop(standby)

    def note_promotion(self, key: Key, weights: Weights | None) -> None:
        """Count a promotion of `key`, and keep `weights` in host memory.

        If necessary, `weights` replace experts that were promoted less recently. `weights` is None if the promotion
        made no copy for host memory.
        """
        standby = self._by_key[key]
        self._num_promotions += 1
        standby.num_promotions += 1
        standby.last_promotion = self._num_promotions
        if weights is None or standby.weights is not None or self.nbytes(weights) > self.host_budget:
            return
        self.make_room(self.nbytes(weights))
        self._keep(standby, weights)

    def _keep(self, standby: Standby, weights: Weights) -> None:
        standby.weights = weights
        self.used_bytes += self.nbytes(weights)

    def _drop(self, standby: Standby) -> None:
        if standby.weights is not None:
            self.used_bytes -= self.nbytes(standby.weights)
            standby.weights = None
