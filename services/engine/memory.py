"""How much state fits, and who has it: numbers only, the tensors live in `model.state.State`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.state import StateSpec


class IdPool:
    """Hands out the ids 0 .. size-1, each to one owner at a time."""

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
        assert 0 <= count <= self.num_free
        ids = [self._free.pop() for _ in range(count)]
        self._taken.update(ids)
        assert self.num_free + self.num_taken == self.size
        return ids

    def give_back(self, ids: Sequence[int]) -> None:
        assert self._taken.issuperset(ids), "an id came back that nobody had"
        self._taken.difference_update(ids)
        self._free.extend(reversed(ids))
        assert self.num_free + self.num_taken == self.size, "an id came back twice"


@dataclass(frozen=True)
class MemoryPlan:
    """What fits a byte budget: `num_slots` requests at once, sharing `num_blocks` pages of KV."""

    num_slots: int
    num_blocks: int
    block_size: int
    nbytes: int

    def __str__(self) -> str:
        tokens = self.num_blocks * self.block_size
        return f"{self.num_slots} requests at once, {tokens:,} tokens of context between them, {self.nbytes:,} bytes"


def plan_memory(
    spec: StateSpec,
    dtype: torch.dtype,
    budget: int,
    max_model_len: int,
    max_requests: int,
    expected_len: int = 1024,
) -> MemoryPlan:
    """Divides `budget` bytes between slots and pages before anything is allocated.

    As many requests as fit with `expected_len` tokens each, up to `max_requests`; the pages take what is left, up to
    `max_model_len` tokens for each. ValueError if not even one request of `max_model_len` tokens fits.
    """
    slot, block = spec.bytes_per_slot(dtype), spec.bytes_per_block(dtype)
    full = spec.num_blocks(max_model_len)
    needed = slot + full * block
    if budget < needed:
        raise ValueError(
            f"The state of one request of max_model_len {max_model_len} takes {needed:,} bytes, but the state budget "
            f"is {budget:,} bytes; raise the budget or lower max_model_len."
        )
    expected = slot + spec.num_blocks(min(expected_len, max_model_len)) * block
    num_slots = min(max_requests, budget // max(expected, 1))
    if slot:
        num_slots = min(num_slots, (budget - full * block) // slot)
    num_blocks = num_slots * full
    if block:
        num_blocks = min(num_blocks, (budget - num_slots * slot) // block)
    assert num_slots >= 1
    assert num_blocks >= full
    return MemoryPlan(num_slots, num_blocks, spec.block_size, num_slots * slot + num_blocks * block)
