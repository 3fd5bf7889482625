"""`Steps` takes the engine's place in tests and runs a model step by step over paged state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.families.checkpoint_family import BackboneModule
from model.state import Batch, State

NUM_SLOTS, BLOCKS_PER_SLOT = 6, 6


class Steps:
    """A `Steps` runs one request per slot; a slot owns every NUM_SLOTS-th page, so its pages are not contiguous."""

    def __init__(self, model: BackboneModule) -> None:
        self.model = model
        dtype = model.embeddings.weight.dtype
        self.state = State(model.config.state_spec, NUM_SLOTS, NUM_SLOTS * BLOCKS_PER_SLOT, dtype)
        for tensor in [*self.state.pages.values(), *(t for slots in self.state.slots.values() for t in slots)]:
            tensor.fill_(float("nan"))  # makes a step that reads unwritten state return NaN

    def batch(self, parts: Sequence[tuple[int, Sequence[int], int]]) -> Batch:
        """Return a batch with one request for each part, which is (slot, token ids, context length)."""
        slots, token_ids, context_lens = zip(*parts, strict=True)
        return Batch(
            torch.tensor([token for ids in token_ids for token in ids]),
            tuple(map(len, token_ids)),
            context_lens,
            slots,
            tuple(tuple(range(slot, NUM_SLOTS * BLOCKS_PER_SLOT, NUM_SLOTS)) for slot in slots),
        )

    @torch.no_grad()
    def forward(self, *parts: tuple[int, Sequence[int], int]) -> list[Tensor]:
        """Run one step and return the hidden vectors of each part: a list of tensors (len, D)."""
        batch = self.batch(parts)
        return list(self.model(batch, self.state).split(list(batch.lens)))

    @torch.no_grad()
    def draft(self, hidden: Tensor, token_ids: Sequence[int], context_len: int, slot: int = 0) -> Tensor:
        """Run the MTP module over positions of one request and return the module's output: (len, D).

        The positions start at `context_len`; `hidden` (len, D) belongs to the positions, and `token_ids` are the tokens
        that follow each position.
        """
        return self.model.draft(self.batch([(slot, token_ids, context_len)]), hidden, self.state)

    def logits(self, *parts: tuple[int, Sequence[int], int]) -> list[Tensor]:
        return [self.model.logits(hidden) for hidden in self.forward(*parts)]


def full_logits(model: BackboneModule, token_ids: Sequence[int]) -> Tensor:
    return Steps(model).logits((0, token_ids, 0))[0]


def split_logits(model: BackboneModule, token_ids: Sequence[int], cuts: Sequence[int]) -> Tensor:
    """Return the logits of one request, computed in several steps; a step ends at each token position in `cuts`."""
    steps, ends = Steps(model), [*cuts, len(token_ids)]
    starts = [0, *cuts]
    parts = [steps.logits((0, token_ids[a:b], a))[0] for a, b in zip(starts, ends, strict=True)]
    return torch.cat(parts)


def greedy(model: BackboneModule, token_ids: Sequence[int], num_tokens: int) -> list[int]:
    steps, tokens = Steps(model), list(token_ids)
    num_computed = 0
    while len(tokens) < len(token_ids) + num_tokens:
        logits = steps.logits((0, tokens[num_computed:], num_computed))[0]
        num_computed = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(token_ids) :]


def random_tokens(num_tokens: int, seed: int = 0) -> list[int]:
    tokens = torch.randint(3, 256, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    return tokens.tolist()


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference divided by the largest absolute expected value."""
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


def seeded(seed: int) -> Callable[..., Tensor]:
    """Return a function like `torch.randn` that draws from its own generator, seeded with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)
