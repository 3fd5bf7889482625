"""A `Batch` says what one step computes; a `State` keeps the tensors that requests need from one step to the next.

Legend: T tokens of the step, U tokens of requests with drafts, R requests, B pages, S state slots, W pages of the
longest block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.configs.state_spec import BLOCK_SIZE, StateSpec


@dataclass(frozen=True)
class SubBatch:
    """A `SubBatch` selects some of a batch's requests, so that one kernel computes only the selected requests."""

    requests: Tensor  # the selected requests' indices in the batch
    rows: Tensor  # the rows of the selected requests' tokens in the batch
    lens: tuple[int, ...]
    context_lens: tuple[int, ...]


@dataclass(frozen=True)
class BatchArrays:
    """A `BatchArrays` holds the numbers of a `Batch` as numpy arrays for compiled kernels."""

    starts_R: NDArray[np.int64]
    lens_R: NDArray[np.int64]
    contexts_R: NDArray[np.int64]
    slots_R: NDArray[np.int64]
    is_new_R: NDArray[np.bool_]
    keeps_R: NDArray[np.bool_]  # False for a request with drafts, whose recurrent state must not change
    first_keys_R: NDArray[np.int64]
    tables_RW: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """A `Batch` holds the tokens of one step, packed request after request without padding.

    `token_ids_T` is int64. Every tuple has one entry for each request:

    - The step computes `lens[r]` tokens of request r, which follow the request's `context_lens[r]` earlier tokens.
    - The recurrent state of request r is in the state slot `slots[r]`, and its KV is in the pages `block_tables[r]`.
    """

    token_ids_T: Tensor
    lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    slots: tuple[int, ...]
    block_tables: tuple[Sequence[int], ...]
    block_size: int = BLOCK_SIZE
    num_drafts: tuple[int, ...] = ()  # number of drafts at the end of each request's tokens; () for no drafts
    first_keys: tuple[int, ...] = ()  # first position that attention sees, by request; () for position 0 everywhere

    def __post_init__(self) -> None:
        assert sum(self.lens) == self.token_ids_T.numel()
        assert min(self.lens) > 0
        assert len(self.lens) == len(self.context_lens) == len(self.slots) == len(self.block_tables)
        assert len(self.num_drafts) in (0, len(self.lens))
        assert len(self.first_keys) in (0, len(self.lens))
        assert len(set(self.slots)) == len(self.slots), "two requests share a slot"

    @property
    def has_drafts(self) -> bool:
        return any(self.num_drafts)

    @cached_property
    def arrays(self) -> BatchArrays:
        """Return the batch's numbers as numpy arrays for the CPU kernels."""
        num_requests = len(self.lens)
        tables_RW = np.zeros((num_requests, max(map(len, self.block_tables))), np.int64)
        for row, table in zip(tables_RW, self.block_tables, strict=True):
            row[: len(table)] = table
        context_R = np.array(self.context_lens)
        return BatchArrays(
            np.array(self.starts),
            np.array(self.lens),
            context_R,
            np.array(self.slots),
            context_R == 0,
            np.array(self.num_drafts or (0,) * num_requests) == 0,
            np.array(self.first_keys or (0,) * num_requests),
            tables_RW,
        )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Return the row of each request's first token: R entries."""
        return (0, *accumulate(self.lens))[:-1]

    @cached_property
    def slots_R(self) -> Tensor:
        return torch.tensor(self.slots, device=self.token_ids_T.device)

    @cached_property
    def is_new_R(self) -> Tensor:
        """Return True for each new request, whose recurrent state starts from zeros: bool (R,)."""
        return torch.tensor([c == 0 for c in self.context_lens], device=self.token_ids_T.device)

    @cached_property
    def last_rows(self) -> tuple[int, ...]:
        """Return the row of each request's last token: R entries."""
        return tuple(start + length - 1 for start, length in zip(self.starts, self.lens, strict=True))

    @cached_property
    def positions_T(self) -> Tensor:
        """Return the position of each token in its request's sequence: int64 (T,)."""
        pairs = zip(self.context_lens, self.lens, strict=True)
        positions = [torch.arange(context, context + length) for context, length in pairs]
        return torch.cat(positions).to(self.token_ids_T.device)

    @cached_property
    def single_token_requests(self) -> SubBatch | None:
        """Return the requests that compute one token in this step, or None if there is no such request."""
        return self._sub_batch([r for r, length in enumerate(self.lens) if length == 1])

    @cached_property
    def multi_token_requests(self) -> SubBatch | None:
        """Return the requests that compute several tokens in this step, or None if there is no such request."""
        return self._sub_batch([r for r, length in enumerate(self.lens) if length > 1])

    @cached_property
    def draft_rows(self) -> Tensor:
        """Return the rows of all tokens of the requests with drafts: int64 (U,)."""
        spans = [range(self.starts[r], self.starts[r] + self.lens[r]) for r in self._drafting]
        return torch.tensor([row for span in spans for row in span], device=self.token_ids_T.device)

    @property
    def _drafting(self) -> list[int]:
        """Return the requests with drafts, as indices in the batch."""
        return [r for r, drafts in enumerate(self.num_drafts) if drafts]

    def accepted(self, num_accepted: Sequence[int]) -> tuple[Tensor, Batch]:
        """Return the tokens of the requests with drafts, without the rejected drafts, as (places, batch).

        `num_accepted` has the number of accepted drafts of each request. The returned batch has no drafts. The places
        of its tokens are indices in `draft_rows`: int64.
        """
        chosen = self._drafting
        lens = [self.lens[r] - self.num_drafts[r] + num_accepted[r] for r in chosen]
        starts = (0, *accumulate(self.lens[r] for r in chosen))
        spans = [range(start, start + length) for start, length in zip(starts, lens, strict=False)]
        places = torch.tensor([place for span in spans for place in span], device=self.token_ids_T.device)
        batch = Batch(
            self.token_ids_T[self.draft_rows[places]],
            tuple(lens),
            tuple(self.context_lens[r] for r in chosen),
            tuple(self.slots[r] for r in chosen),
            tuple(self.block_tables[r] for r in chosen),
        )
        return places, batch

    def _sub_batch(self, requests: list[int]) -> SubBatch | None:
        if not requests:
            return None
        device = self.token_ids_T.device
        rows = [row for r in requests for row in range(self.starts[r], self.starts[r] + self.lens[r])]
        return SubBatch(
            torch.tensor(requests, device=device),
            torch.tensor(rows, device=device),
            tuple(self.lens[r] for r in requests),
            tuple(self.context_lens[r] for r in requests),
        )

    @cached_property
    def kv_indices(self) -> tuple[Tensor, ...]:
        """Return the indices of each request's keys and values in a layer's pages: R tensors (context_len + len,).

        The indices include the new tokens of this step. An index is page · block_size + offset in the page.
        """
        offsets = torch.arange(self.block_size, device=self.token_ids_T.device)
        kv_indices = []
        for table, context_len, length in zip(self.block_tables, self.context_lens, self.lens, strict=True):
            assert context_len + length <= len(table) * self.block_size, "block table shorter than the request"
            blocks = torch.from_numpy(np.array(table, np.int64)).to(offsets.device)
            kv_indices.append((blocks[:, None] * self.block_size + offsets).flatten()[: context_len + length])
        return tuple(kv_indices)

    @cached_property
    def new_kv_indices_T(self) -> Tensor:
        """Return the index in a layer's pages at which to write the key and value of each row: int64 (T,)."""
        return torch.cat([kv_indices[-length:] for kv_indices, length in zip(self.kv_indices, self.lens, strict=True)])


class State:
    """A `State` holds the tensors that a `StateSpec` describes: pages (B·block_size, *shape) and slots (S, *shape).

    All tensors are allocated once, when the `State` is made.
    """

    def __init__(
        self, spec: StateSpec, num_slots: int, num_blocks: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.spec, self.num_slots, self.num_blocks = spec, num_slots, num_blocks
        self.uncommitted: dict[int, tuple[Any, ...]] = {}  # layer -> inputs of the step's `draft_rows`, until `commit`
        self.pages = {
            p.layer: torch.zeros(num_blocks * spec.block_size, *p.shape, dtype=dtype, device=device) for p in spec.paged
        }
        self.slots = {
            r.layer: tuple(
                torch.zeros(num_slots, *shape, dtype=torch.float32 if own == "float32" else dtype, device=device)
                for shape, own in zip(r.shapes, r.dtypes, strict=True)
            )
            for r in spec.recurrent
        }

    def read(self, layer: int, batch: Batch) -> tuple[Tensor, ...]:
        """Return a copy of the recurrent state of the batch's requests: tensors (R, *shape), zeros for new requests."""
        return tuple(
            slots[batch.slots_R].masked_fill_(batch.is_new_R.view(-1, *[1] * (slots.dim() - 1)), 0)
            for slots in self.slots[layer]
        )

    def write(self, layer: int, batch: Batch, values: Sequence[Tensor]) -> None:
        """Store the new recurrent state (R, *shape) of the batch's requests, except for requests with drafts."""
        for slots, value in zip(self.slots[layer], values, strict=True):
            if batch.has_drafts:
                keeps = [r for r, count in enumerate(batch.num_drafts) if not count]
                slots[batch.slots_R[keeps]] = value[keeps].to(slots.dtype)
            else:
                slots[batch.slots_R] = value.to(slots.dtype)

    def copy_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the recurrent state from slot to slot, one (source, target) pair after another."""
        for source, target in pairs:
            for slots in (tensor for tensors in self.slots.values() for tensor in tensors):
                slots[target] = slots[source]

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages of every attention layer, one (source, target) pair after another."""
        size = self.spec.block_size
        for source, target in pairs:
            for pages in self.pages.values():
                pages[target * size : (target + 1) * size] = pages[source * size : (source + 1) * size]

    @property
    def nbytes(self) -> int:
        tensors = [*self.pages.values(), *(t for slots in self.slots.values() for t in slots)]
        return sum(t.numel() * t.element_size() for t in tensors)
