"""Which home of an expert computes which rows of a batch: one decision per layer and step, so it is compiled.

Legend: E experts of the layer, P picks (one row sent to one expert; the picks of a row stand together), S shards that
are a home of something, H homes; Q picks to send, M messages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


@dataclass(frozen=True)
class CallCost:
    """What makes a shard slow, in microseconds: a queued call, an expert's weights, one row, one more message."""

    queued: float = 200.0
    expert: float = 20.0
    row: float = 1.0
    message: float = 200.0

    @property
    def max_piece(self) -> int:
        """Rows of one expert that are worth keeping together: their arithmetic costs what reading the weights does."""
        return max(1, int(self.expert / self.row))


@dataclass(frozen=True, slots=True)
class ShardCosts:
    """What makes each shard of a table slow, in µs, for experts of one size; `max_piece` as in `CallCost`."""

    busy_S: NDArray[np.float64]  # until it is done with what it has; written to
    expert_S: NDArray[np.float64]
    row_S: NDArray[np.float64]
    message_S: NDArray[np.float64]
    max_piece: int


class NoLiveHome(LookupError):
    """Some experts have no home that may be asked; `experts` lists them."""

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__(f"The experts {list(experts)} have no live home among the shards of the placement.")
        self.experts = tuple(experts)


class HomeTable:
    """The homes of one layer with shards as small numbers: `shard_ids[i]` is shard i. Made once per placement.

    `standby` are homes that are chosen only for experts none of whose `homes` may be asked. `shard_ids` may name more
    shards than those that occur, so that the tables of all layers count alike.
    """

    def __init__(
        self,
        homes: Sequence[Sequence[str]],
        standby: Sequence[Sequence[str]] | None = None,
        shard_ids: Sequence[str] | None = None,
    ) -> None:
        named = {id for ids in (*homes, *(standby or ())) for id in ids}
        self.shard_ids = tuple(sorted(named) if shard_ids is None else shard_ids)
        index = {id: i for i, id in enumerate(self.shard_ids)}
        self.homes = tuple(tuple(index[id] for id in ids) for ids in homes)
        self.standby = tuple(tuple(index[id] for id in ids) for ids in standby or ((),) * len(homes))
        self.homes_EH, self.standby_EH = _as_array(self.homes), _as_array(self.standby)
        self.no_standby_EH = np.empty((len(homes), 0), dtype=np.int64)

    @property
    def has_standby(self) -> bool:
        return bool(self.standby_EH.size)

    def without_home(self, experts: Collection[int], excluded: Collection[str]) -> list[int]:
        """Those of `experts` whose homes are all excluded."""
        both = ((expert, (*self.homes[expert], *self.standby[expert])) for expert in experts)
        return [expert for expert, homes in both if all(self.shard_ids[home] in excluded for home in homes)]


def _as_array(homes: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    homes_EH = np.full((len(homes), max(map(len, homes), default=0)), -1, dtype=np.int64)  # -1: no more
    for expert, ids in enumerate(homes):
        homes_EH[expert, : len(ids)] = ids
    return homes_EH


def choose_homes(
    expert_P: NDArray[np.integer],
    homes: HomeTable,
    queue_depth: Mapping[str, int],
    excluded: Collection[str] = (),
    cost: CallCost = CallCost(),
) -> NDArray[np.int64]:
    """The home of each pick, as an index into `homes.shard_ids`; raises NoLiveHome.

    Experts go to the home that would be done first, those without a choice before the others and big ones before small
    ones. The rows of one expert stay together unless it has more than `cost.max_piece` of them.
    """
    busy_S = np.array([queue_depth.get(id, 0) * cost.queued for id in homes.shard_ids], dtype=np.float64)
    is_excluded_S = np.array([id in excluded for id in homes.shard_ids], dtype=np.bool_)
    expert_S, row_S, message_S = (np.full(len(busy_S), float(us)) for us in (cost.expert, cost.row, cost.message))
    return assign_homes(expert_P, homes, ShardCosts(busy_S, expert_S, row_S, message_S, cost.max_piece), is_excluded_S)


def assign_homes(
    expert_P: NDArray[np.integer],
    homes: HomeTable,
    costs: ShardCosts,
    is_excluded_S: NDArray[np.bool_],
    may_promote: bool = True,
) -> NDArray[np.int64]:
    """`choose_homes` for shards that each have their own costs; without `may_promote` none that stands by is asked."""
    home_P = np.empty(len(expert_P), dtype=np.int64)
    by_shard = (costs.expert_S, costs.row_S, costs.message_S, costs.max_piece)
    standby_EH = homes.standby_EH if may_promote else homes.no_standby_EH
    if not _choose(expert_P, homes.homes_EH, standby_EH, is_excluded_S, costs.busy_S, by_shard, home_P):
        raise _no_live_home(expert_P, homes.homes_EH, standby_EH, is_excluded_S)
    return home_P


def _no_live_home(expert_P: Any, homes_EH: Any, standby_EH: Any, is_excluded_S: Any) -> NoLiveHome:
    experts = np.unique(expert_P)
    options = np.concatenate((homes_EH, standby_EH), axis=1)[experts]
    has_home = ((options >= 0) & ~is_excluded_S[options]).any(axis=1)
    return NoLiveHome(experts[~has_home].tolist())


@njit(cache=True)  # type: ignore[untyped-decorator]
def _choose(
    expert_P: Any, homes_EH: Any, standby_EH: Any, is_excluded_S: Any, busy_S: Any, costs: Any, home_P: Any
) -> bool:
    """Writes `home_P`; False where an expert has no home that may be asked. `tests/cluster/slow_routing.py` is the
    same in plain Python."""
    num_experts, max_homes = homes_EH.shape[0], max(homes_EH.shape[1], standby_EH.shape[1])
    count_E = np.zeros(num_experts, np.int64)
    for expert in expert_P:
        count_E[expert] += 1
    options_EH = np.empty((num_experts, max_homes), np.int64)
    num_options_E = np.zeros(num_experts, np.int64)
    for expert in np.flatnonzero(count_E):
        for home in homes_EH[expert]:
            if home >= 0 and not is_excluded_S[home]:
                options_EH[expert, num_options_E[expert]] = home
                num_options_E[expert] += 1
        if num_options_E[expert] == 0:
            for home in standby_EH[expert]:
                if home >= 0 and not is_excluded_S[home]:
                    options_EH[expert, num_options_E[expert]] = home
                    num_options_E[expert] += 1
        if num_options_E[expert] == 0:
            return False

    experts = np.flatnonzero(count_E)
    has_choice = (num_options_E[experts] > 1).astype(np.int64)
    order = np.argsort((has_choice << 40) - count_E[experts], kind="mergesort")

    max_piece = costs[3]
    is_called_S = np.zeros(len(busy_S), np.bool_)
    holds_S = np.empty(len(busy_S), np.bool_)
    piece_home_P = np.empty(len(expert_P), np.int64)  # an expert has no more pieces than picks
    first_piece_E = np.empty(num_experts, np.int64)
    num_pieces = 0
    for expert in experts[order]:
        options, left = options_EH[expert, : num_options_E[expert]], count_E[expert]
        first_piece_E[expert] = start = num_pieces
        piece = left if len(options) == 1 else max_piece
        holds_S[:] = False
        while left > 0:
            home = _give(options, min(piece, left), holds_S, is_called_S, busy_S, costs)
            piece_home_P[num_pieces] = home
            num_pieces += 1
            left -= piece
        if len(options) == 1:  # however many pieces, they have one home
            num_pieces = start - (-count_E[expert] // max_piece)
            piece_home_P[start:num_pieces] = options[0]
        piece_home_P[start:num_pieces].sort()

    num_seen_E = np.zeros(num_experts, np.int64)
    for pick, expert in enumerate(expert_P):
        home_P[pick] = piece_home_P[first_piece_E[expert] + num_seen_E[expert] // max_piece]
        num_seen_E[expert] += 1
    return True


@njit(cache=True)  # type: ignore[untyped-decorator]
def _give(options: Any, num_rows: Any, holds_S: Any, is_called_S: Any, busy_S: Any, costs: Any) -> int:
    """Gives some rows of one expert to the home that would be done first."""
    expert_S, row_S, message_S, _ = costs
    home, least = options[0], np.inf
    for option in options:
        # A message costs the caller, not the shard: it counts in the choice, not in how busy the shard is.
        extra = (0.0 if is_called_S[option] else message_S[option]) + (0.0 if holds_S[option] else expert_S[option])
        if busy_S[option] + extra < least:
            home, least = option, busy_S[option] + extra
    busy_S[home] += num_rows * row_S[home] + (0.0 if holds_S[home] else expert_S[home])
    is_called_S[home] = holds_S[home] = True
    return int(home)


class Grouped(NamedTuple):
    """Message m takes the picks `pick_Q[first_M[m] : first_M[m + 1]]`, in the order of their rows."""

    pick_Q: NDArray[np.int64]
    first_M: list[int]  # one more than there are messages
    shard_M: list[int]
    num_rows_M: list[int]
    num_experts_M: list[int]  # distinct ones


def group(
    pick_Q: NDArray[np.int64],
    home_Q: NDArray[np.int64],
    expert_P: NDArray[np.int64],
    top_k: int,
    num_shards: int,
    num_experts: int,
    max_rows: int,
) -> Grouped:
    """Messages of at most `max_rows` rows for picks (ascending) that go to the shards `home_Q`."""
    return _grouped(*_group(pick_Q, home_Q, expert_P, top_k, num_shards, num_experts, max_rows))


def _grouped(sorted_Q: NDArray[np.int64], numbers: NDArray[np.int64]) -> Grouped:
    firsts, *columns = numbers.tolist()
    firsts.append(len(sorted_Q))
    return Grouped(sorted_Q, firsts, *columns)


def route(
    pick_Q: NDArray[np.int64],
    expert_P: NDArray[np.int64],
    homes: HomeTable,
    costs_CS: NDArray[np.float64],
    now: float,
    mib: float,
    max_piece: int,
    is_excluded_S: NDArray[np.bool_],
    top_k: int,
    max_rows: int,
    may_promote: bool,
) -> Grouped:
    """`assign_homes` and `group` in one, for picks (ascending) of a call; raises NoLiveHome.

    `costs_CS`: of each shard, in µs per MiB of an expert, that of an expert and of a row, then the µs of a message, and
    the time in seconds when it will be free.
    """
    standby_EH = homes.standby_EH if may_promote else homes.no_standby_EH
    limits = (now, mib, max_piece, top_k, max_rows)
    is_chosen, *grouped = _route(pick_Q, expert_P, homes.homes_EH, standby_EH, is_excluded_S, costs_CS, limits)
    if not is_chosen:
        raise _no_live_home(expert_P[pick_Q], homes.homes_EH, standby_EH, is_excluded_S)
    return _grouped(*grouped)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _route(
    pick_Q: Any, expert_P: Any, homes_EH: Any, standby_EH: Any, is_excluded_S: Any, costs_CS: Any, limits: Any
) -> Any:
    now, mib, max_piece, top_k, max_rows = limits
    expert_Q, home_Q = expert_P[pick_Q], np.empty(len(pick_Q), np.int64)
    busy_S = np.maximum(costs_CS[3] - now, 0.0) * 1e6
    costs = (costs_CS[0] * mib, costs_CS[1] * mib, costs_CS[2].copy(), max_piece)
    is_chosen = _choose(expert_Q, homes_EH, standby_EH, is_excluded_S, busy_S, costs, home_Q)
    if not is_chosen:
        home_Q[:] = 0
    sizes = (len(is_excluded_S), len(homes_EH))
    sorted_Q, numbers = _group(pick_Q, home_Q, expert_P, top_k, sizes[0], sizes[1], max_rows)
    return is_chosen, sorted_Q, numbers


@njit(cache=True)  # type: ignore[untyped-decorator]
def _group(
    pick_Q: Any, home_Q: Any, expert_P: Any, top_k: Any, num_shards: Any, num_experts: Any, max_rows: Any
) -> Any:
    num_picks = len(pick_Q)
    place_S = np.zeros(num_shards + 1, np.int64)
    for q in range(num_picks):
        place_S[home_Q[q] + 1] += 1
    place_S = np.cumsum(place_S)
    sorted_Q, shard_Q = np.empty(num_picks, np.int64), np.empty(num_picks, np.int64)
    for q in range(num_picks):
        place = place_S[home_Q[q]]
        sorted_Q[place], shard_Q[place] = pick_Q[q], home_Q[q]
        place_S[home_Q[q]] += 1
    seen_by_E = np.full(num_experts, -1, np.int64)  # the last message that an expert was seen in
    numbers = np.zeros((4, num_picks), np.int64)  # first pick, shard, rows, experts
    num_messages, last_row = 0, -1
    for q in range(num_picks):
        row, current = sorted_Q[q] // top_k, num_messages - 1
        is_new_row = row != last_row
        if q == 0 or shard_Q[q] != numbers[1, current] or (is_new_row and numbers[2, current] == max_rows):
            current = num_messages
            num_messages += 1
            numbers[0, current], numbers[1, current] = q, shard_Q[q]
            is_new_row = True
        numbers[2, current] += is_new_row
        last_row = row
        expert = expert_P[sorted_Q[q]]
        if seen_by_E[expert] != current:
            seen_by_E[expert] = current
            numbers[3, current] += 1
    return sorted_Q, numbers[:, :num_messages].copy()
