"""These tests check which standbys a `StandbyStore` keeps in host memory when its budget is too small for all."""

from __future__ import annotations

import torch

from model.stored_matrix import StoredMatrix
from services.expert.standbys import StandbyStore
from services.expert.weights import Weights


def make_weights(num_rows: int = 2) -> Weights:
    up, down = (StoredMatrix.plain(torch.ones(size)) for size in ((num_rows, 4), (4, num_rows)))
    return Weights({"up": up, "down": down})


ONE = make_weights().nbytes


def in_memory(standbys: StandbyStore) -> list[int]:
    return sorted(expert for _, expert in standbys.in_host_memory)


def test_who_comes_first_stands_by_in_host_memory() -> None:
    standbys = StandbyStore(2 * ONE)
    for expert in range(4):
        standbys.add((1, expert), make_weights())
    assert (in_memory(standbys), len(standbys.keys), standbys.used_bytes) == ([0, 1], 4, 2 * ONE)


def test_what_was_promoted_last_replaces_what_was_promoted_longest_ago() -> None:
    standbys = StandbyStore(2 * ONE)
    for expert in range(4):
        standbys.add((1, expert), make_weights())
    standbys.note_promotion((1, 0), None)
    standbys.note_promotion((1, 3), make_weights())
    assert in_memory(standbys) == [0, 3]
    standbys.note_promotion((1, 2), make_weights())
    assert in_memory(standbys) == [2, 3]
    standbys.note_promotion((1, 1), make_weights(4))  # these weights have the size of two other standbys
    assert (in_memory(standbys), standbys.used_bytes) == ([1], 2 * ONE)


def test_what_is_larger_than_the_budget_stays_on_disk_and_harms_nobody() -> None:
    standbys = StandbyStore(2 * ONE)
    standbys.add((1, 0), make_weights())
    standbys.add((1, 1), None)
    standbys.note_promotion((1, 1), make_weights(5))
    assert in_memory(standbys) == [0]


def test_what_leaves_gives_its_memory_back() -> None:
    standbys = StandbyStore(2 * ONE)
    standbys.add((1, 0), make_weights())
    standbys.add((1, 0), make_weights())
    assert standbys.used_bytes == ONE
    standbys.remove((1, 0))
    standbys.remove((1, 0))
    assert (standbys.keys, standbys.used_bytes) == ([], 0)
