"""A `TinyModel` is a real model of a few hundred weights, with recurrent state and KV pages.

The model computes every row separately. So its tokens must not depend on batches, chunks, pages, preemption, drafts or
reuse. The draft module guesses well, because it has the same recurrence as the model. Its attention reads its own KV
pages. `TinyModel.naive_greedy` generates the same tokens without an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.configs.state_spec import PagedSpec, RecurrentSpec, StateSpec
from model.state import Batch, State
from services.engine.contract.sampling_params import Grammar
from services.engine.engine import Engine
from services.engine.runner import Runner
from services.engine.scheduling.scheduler import Scheduler, SchedulerConfig

VOCAB_SIZE, DIM, BLOCK_SIZE = 50, 8, 4
EOS = 0
SPEC = StateSpec((PagedSpec(1, (DIM,)), PagedSpec(2, (DIM,))), (RecurrentSpec(0, ((DIM,),), ("float32",)),), BLOCK_SIZE)


class TinyModel(nn.Module):
    has_drafts = True

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB_SIZE, DIM, generator=generator)
        self.recurrence = torch.randn(DIM, DIM, generator=generator) / 2
        self.head = torch.randn(VOCAB_SIZE, 2 * DIM, generator=generator)
        self.num_tokens: list[int] = []  # number of tokens that each call of `forward` computed

    def recur(self, h: Tensor, token_id: int) -> Tensor:
        return torch.tanh(self.recurrence @ h + self.embedding[token_id])

    def attend(self, past_ND: Tensor) -> Tensor:
        return torch.softmax(past_ND @ past_ND[-1], dim=0) @ past_ND

    def forward(self, batch: Batch, state: State) -> Tensor:
        self.num_tokens.append(len(batch.token_ids_T))
        return torch.cat([self._forward_one(batch, state, r) for r in range(len(batch.lens))])

    def _forward_one(self, batch: Batch, state: State, r: int) -> Tensor:
        context, start, rows = batch.context_lens[r], batch.starts[r], []
        table = torch.tensor(batch.block_tables[r])
        [h_SD], pages = state.slots[0], state.pages[1].view(-1, BLOCK_SIZE, DIM)
        h = h_SD[batch.slots[r]] if context else torch.zeros(DIM)
        for position in range(context, context + batch.lens[r]):
            h = self.recur(h, int(batch.token_ids_T[start + position - context]))
            pages[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = h
            past = pages[table].reshape(-1, DIM)[: position + 1].clone()
            rows.append(torch.cat([h, self.attend(past)]))
        if not batch.num_drafts or not batch.num_drafts[r]:
            h_SD[batch.slots[r]] = h
        return torch.stack(rows)

    def commit(self, batch: Batch, num_accepted: Sequence[int], state: State) -> None:
        [h_SD] = state.slots[0]
        for r, num_drafts in enumerate(batch.num_drafts):
            if num_drafts:
                h = h_SD[batch.slots[r]] if batch.context_lens[r] else torch.zeros(DIM)
                start = batch.starts[r]
                for token_id in batch.token_ids_T[start : start + batch.lens[r] - num_drafts + num_accepted[r]]:
                    h = self.recur(h, int(token_id))
                h_SD[batch.slots[r]] = h

    def draft(self, batch: Batch, hidden_TD: Tensor, state: State) -> Tensor:
        rows, pages = [], state.pages[2].view(-1, BLOCK_SIZE, DIM)
        for r, length in enumerate(batch.lens):
            table, first = torch.tensor(batch.block_tables[r]), batch.first_keys[r] if batch.first_keys else 0
            for i in range(batch.starts[r], batch.starts[r] + length):
                position = batch.context_lens[r] + i - batch.starts[r]
                h = self.recur(hidden_TD[i, :DIM], int(batch.token_ids_T[i]))
                pages[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = h
                rows.append(torch.cat([h, self.attend(pages[table].reshape(-1, DIM)[first : position + 1])]))
        return torch.stack(rows)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        return torch.stack([self.head @ hidden for hidden in hidden_SD])

    def naive_greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Return up to `num_tokens` tokens of a greedy answer; the result includes EOS if the answer reaches EOS."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + num_tokens and (len(tokens) == len(prompt) or tokens[-1] != EOS):
            h, past = torch.zeros(DIM), []
            for token in tokens:
                h = self.recur(h, token)
                past.append(h)
            hidden = torch.cat([h, self.attend(torch.stack(past))])
            tokens.append(int((self.head @ hidden).argmax()))
        return tokens[len(prompt) :]


def tiny_engine(
    model: TinyModel | None = None,
    outages: tuple[type[Exception], ...] = (),
    compile_grammar: Callable[[Grammar], Any] | None = None,
    **limits: Any,
) -> Engine:
    defaults = {
        "num_slots": 8,
        "num_checkpoint_slots": 8,
        "num_blocks": 128,
        "max_model_len": 256,
        "max_batch_tokens": 64,
        "max_draft_tokens": 3,
        "turn_end_ids": frozenset({EOS}),
    }
    config = SchedulerConfig(block_size=BLOCK_SIZE, **(defaults | limits))
    state = State(SPEC, config.num_slots + config.num_checkpoint_slots, config.num_blocks, torch.float32)
    return Engine(Runner(model or TinyModel(), state), Scheduler(config), VOCAB_SIZE, [EOS], outages, compile_grammar)
