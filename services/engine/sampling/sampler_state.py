"""The `SamplerState` of a request holds what the sampler keeps between steps: token counts and the grammar's state.

The token counts are needed for penalties. Before a row is sampled, the counts and the grammar's state are moved to the
row's tokens. Usually one token is appended, but drafts at the end may also be removed again when they are rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.grammar.compiled_grammar import GrammarState
from services.engine.request import Request
from services.engine.sampling.reasoning_limit import ReasoningLimit


class TokenCounts:
    """A `TokenCounts` counts how often each token was generated, for penalties.

    A token that occurs only in the prompt has the count 0.
    """

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        self._is_in_prompt_V = np.zeros(vocab_size, dtype=np.bool_)
        self._is_in_prompt_V[np.array(prompt, dtype=np.int64)] = True
        self._counts_V = np.zeros(vocab_size, dtype=np.float32)
        # The ids of the prompt, then the ids of generated tokens in the order of their first use; the rest is unused.
        self._ids = np.flatnonzero(self._is_in_prompt_V)
        self._num_ids = len(self._ids)

    def push(self, token_id: int) -> None:
        """Count a token that was generated."""
        if self._is_new(token_id):
            if self._num_ids == len(self._ids):
                self._ids = np.resize(self._ids, max(64, 2 * self._num_ids))
            self._ids[self._num_ids] = token_id
            self._num_ids += 1
        self._counts_V[token_id] += 1

    def pop(self, token_id: int) -> None:
        """Undo the last `push`; `token_id` must be the token of the last `push`."""
        self._counts_V[token_id] -= 1
        if self._is_new(token_id):
            self._num_ids -= 1
            assert self._ids[self._num_ids] == token_id, "pushes must be undone in reverse order"

    def _is_new(self, token_id: int) -> bool:
        return not self._counts_V[token_id] and not self._is_in_prompt_V[token_id]

    def ids_and_counts(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the distinct token ids and the count of each token, as two arrays of the same length."""
        ids = self._ids[: self._num_ids].copy()
        return ids, self._counts_V[ids]


class SamplerState:
    """A `SamplerState` holds what the sampler keeps of one request: counts, grammar state, reasoning limit and bias."""

    def __init__(self, request: Request, vocab_size: int, device: torch.device) -> None:
        params, self._device = request.params, device
        is_repetitive = params.repetition_penalty != 1
        has_penalty = is_repetitive or params.presence_penalty != 0 or params.frequency_penalty != 0
        prompt = request.token_ids[: request.num_prompt_tokens] if is_repetitive else ()
        self.counts = TokenCounts(prompt, vocab_size) if has_penalty else None
        self.grammar: GrammarState | None = None
        if params.grammar is not None:
            assert request.compiled_grammar is not None, "a grammar is compiled before its request reaches the engine"
            self.grammar = request.compiled_grammar.start()
        self.bias, self._stop_ids = params.logit_bias, request.stop_ids
        self.reasoning = ReasoningLimit(params.thinking_budget) if params.thinking_budget else None
        self.is_greedy = params.is_greedy
        self.is_edited = has_penalty or self.grammar is not None or bool(self.bias.ids)
        self._num_followed, self._ahead = request.num_prompt_tokens, list[int]()

    # A tensor of 1,024 numbers takes 100 times as long to make as to use, so each tensor is made only once.

    @cached_property
    def bias_ids(self) -> Tensor:
        """Return the token ids of the request's logit bias."""
        return torch.from_numpy(np.array(self.bias.ids, dtype=np.int64)).to(self._device)

    @cached_property
    def bias_values(self) -> Tensor:
        """Return the numbers that the request's logit bias adds to the logits of `bias_ids`."""
        return torch.from_numpy(np.array(self.bias.values, dtype=np.float32)).to(self._device)

    @cached_property
    def stop_ids(self) -> Tensor:
        """Return the request's stop ids."""
        return torch.tensor(sorted(self._stop_ids), dtype=torch.int64, device=self._device)

    def follow(self, request: Request, ahead: Sequence[int]) -> None:
        """Move the state from the previous tokens to the request's tokens followed by the drafts in `ahead`."""
        if self.counts is None and self.grammar is None:
            return
        tail = [*request.token_ids[self._num_followed :], *ahead]
        num_same = _num_same(tail, self._ahead)
        for token_id in reversed(self._ahead[num_same:]):
            self._pop(token_id)
        for token_id in tail[num_same:]:
            self._push(token_id)
        self._num_followed, self._ahead = request.num_tokens, list(ahead)

    def _push(self, token_id: int) -> None:
        if self.counts is not None:
            self.counts.push(token_id)
        if self.grammar is not None:
            self.grammar.push(token_id)

    def _pop(self, token_id: int) -> None:
        if self.counts is not None:
            self.counts.pop(token_id)
        if self.grammar is not None:
            self.grammar.pop()


def _num_same(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two token sequences."""
    length = min(len(tokens), len(others))
    return next((i for i in range(length) if tokens[i] != others[i]), length)
