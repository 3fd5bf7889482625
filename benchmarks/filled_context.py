"""A `FilledContext` is a long context that no model has read: its keys, values and recurrent state are just written.

Reading a million tokens on a CPU takes hours. To measure what happens *at* a million tokens, `fill` writes the state of
a long prefix into the memory of an engine, and hands the state to the prefix cache as that of a request that has ended.
Every later request with this prefix starts after it, as after any cached prefix. The engine has no code for this.

The written numbers are plausible: the model reads SOURCE_LEN tokens, and each position of the context gets the keys and
values of one of them, with another scale. So no two positions are equal, and a kernel that reads a wrong position gives
a wrong answer. A `Reference` computes the right answer without an engine, pages in another order, and local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.family import ModelFamily
from model.state import Batch, State
from services.engine.contract.sampling_params import SamplingParams
from services.engine.engine import Engine
from services.engine.request import Request
from services.engine.scheduling.prefix_cache import CachedPrefix
from services.engine.scheduling.scheduled_batch import BatchBuilder

SOURCE_LEN = 512  # tokens that the model really reads
POSITIONS_AT_ONCE = 1 << 16  # positions that are written at a time, which bounds the memory for indices
FIRST_ORDINARY_ID = 16  # lower token ids are special tokens


@dataclass(frozen=True)
class FilledContext:
    """A `FilledContext` has the tokens of a long prefix and, for each position, a row of `source` and a scale.

    `source` is the state of a request whose pages are the first pages, in order, and whose slot is slot 0.
    """

    token_ids: list[int]
    source: State
    rows_L: Tensor
    scales_L: Tensor

    def write(self, state: State, block_table: Sequence[int], slot: int) -> None:
        """Write the context's keys and values to the pages of `block_table`, and its recurrent state to `slot`."""
        size, table = state.spec.block_size, torch.tensor(block_table)
        for first in range(0, len(self.token_ids), POSITIONS_AT_ONCE):
            positions = torch.arange(first, min(first + POSITIONS_AT_ONCE, len(self.token_ids)))
            places = table[positions // size] * size + positions % size
            for layer, pages in state.pages.items():
                scales = self.scales_L[positions].view(-1, *[1] * (pages.dim() - 1))
                pages[places] = (self.source.pages[layer][self.rows_L[positions]] * scales).to(pages.dtype)
        for layer, tensors in state.slots.items():
            for target, source in zip(tensors, self.source.slots[layer], strict=True):
                target[slot] = source[0]


class Reference:
    """A `Reference` computes contexts and answers with the model alone, for contexts of up to `max_len` tokens."""

    def __init__(self, family: ModelFamily, dtype: torch.dtype, max_len: int) -> None:
        spec = family.config.state_spec
        self._family, self._dtype = family, dtype
        self._model = family.load_backbone(family.load_local_experts(dtype), dtype)
        self._state = State(spec, 1, spec.num_blocks(max_len), dtype)
        self._table = tuple(reversed(range(self._state.num_blocks)))

    def context(self, seed: int, length: int) -> FilledContext:
        """Return a context of `length` random tokens; its state derives from SOURCE_LEN tokens that the model reads."""
        spec, rng = self._family.config.state_spec, np.random.default_rng(seed)
        ids = rng.integers(FIRST_ORDINARY_ID, self._family.config.vocab_size, length)
        num_blocks = spec.num_blocks(SOURCE_LEN)
        source = State(spec, 1, num_blocks, self._dtype)
        self._run(ids[:SOURCE_LEN].tolist(), 0, source, tuple(range(num_blocks)))
        scales = torch.from_numpy(rng.uniform(0.5, 1.5, length).astype(np.float32))
        return FilledContext(ids.tolist(), source, torch.from_numpy(rng.integers(0, SOURCE_LEN, length)), scales)

    def answer(self, context: FilledContext, tail_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Return the `num_tokens` tokens that greedily follow the context and `tail_ids`."""
        context.write(self._state, self._table, 0)
        length, newest, answer = len(context.token_ids), list(tail_ids), list[int]()
        while len(answer) < num_tokens:
            answer.append(self._run(newest, length, self._state, self._table))
            length, newest = length + len(newest), answer[-1:]
        return answer

    @torch.inference_mode()
    def _run(self, token_ids: list[int], context_len: int, state: State, table: tuple[int, ...]) -> int:
        """Compute the next tokens of a sequence and return the most probable token after them."""
        batch = Batch(torch.tensor(token_ids), (len(token_ids),), (context_len,), (0,), (table,))
        return int(self._model.logits(self._model.forward(batch, state)[-1:]).argmax())


def fill(engine: Engine, context: FilledContext) -> None:
    """Put a context into the prefix cache of an engine that has no request, so that its thread touches no memory."""
    assert not engine.scheduler.has_work
    memory, num_tokens = engine.scheduler.memory, len(context.token_ids)
    request = Request("fill", context.token_ids, SamplingParams(), seed=0, max_len=num_tokens + 1)
    memory.admit(request, CachedPrefix(), BatchBuilder(0))
    context.write(engine.runner.state, request.block_table, request.slot_id)
    request.num_computed_tokens = num_tokens
    memory.release(request)
