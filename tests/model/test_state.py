"""The tests check what a `Batch` says of its tokens."""

from __future__ import annotations

import torch

from model.state import Batch


def test_positions_continue_after_each_request_s_earlier_tokens() -> None:
    batch = Batch(torch.arange(6), (3, 1, 2), (0, 40, 7), (2, 0, 1), ((0,), (1, 2, 3), (4,)))
    assert batch.positions_T.tolist() == [0, 1, 2, 40, 7, 8]


def test_accepted_drafts_are_the_first_of_each_request() -> None:
    batch = Batch(torch.arange(10, 17), (3, 1, 3), (5, 40, 7), (2, 0, 1), ((0,), (1, 2, 3), (4,)), num_drafts=(2, 0, 2))
    places, accepted = batch.accepted((1, 0, 0))
    assert batch.draft_rows.tolist() == [0, 1, 2, 4, 5, 6]
    assert places.tolist() == [0, 1, 3]
    assert accepted.token_ids_T.tolist() == [10, 11, 14]
    assert (accepted.lens, accepted.context_lens, accepted.slots) == ((2, 1), (5, 7), (2, 1))
