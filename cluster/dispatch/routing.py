"""Routing chooses the home that computes each pick of a layer call; the code runs in every layer and is compiled.

Legend: E experts of the layer, P picks of the call (the picks of a row stand together), Q picks to send, S shards that
are a home or standby of an expert, H homes or standbys of an expert, M messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


class NoLiveHome(LookupError):
    """A `NoLiveHome` error says that the experts in `experts` have no home that may be asked."""

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__(f"The experts {list(experts)} have no live home among the shards of the placement.")
        self.experts = tuple(experts)


class HomeTable:
    """A `HomeTable` holds the homes and standbys of one layer's experts, with each shard as an index into `shard_ids`.

    A table is built once per placement. A standby of an expert is chosen only if none of the expert's homes may be
    asked. `shard_ids` may name shards that hold nothing of this layer, so that the tables of all layers use the same
    indices.
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


def _as_array(homes: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    # -1 where an expert has no further home
    homes_EH = np.full((len(homes), max(map(len, homes), default=0)), -1, dtype=np.int64)
    for expert, ids in enumerate(homes):
        homes_EH[expert, : len(ids)] = ids
    return homes_EH


def no_live_home(expert_P: Any, homes_EH: Any, standby_EH: Any, is_excluded_S: Any) -> NoLiveHome:
    """Return the error that names the experts in `expert_P` for which no home may be asked."""
    experts = np.unique(expert_P)
    options = np.concatenate((homes_EH, standby_EH), axis=1)[experts]
    has_home = ((options >= 0) & ~is_excluded_S[options]).any(axis=1)
    return NoLiveHome(experts[~has_home].tolist())


@njit(cache=True)  # type: ignore[untyped-decorator]
def choose(
    expert_P: Any, homes_EH: Any, standby_EH: Any, is_excluded_S: Any, busy_S: Any, costs: Any, home_P: Any
) -> bool:
    """Write the home of each pick to `home_P`; return False if an expert has no home that may be asked.

    Each expert goes to the home that would finish first. Experts with one possible home are assigned before experts
    with several, and experts with many rows before experts with few. The rows of one expert stay together unless the
    expert has more than `max_piece` rows. `tests/cluster/dispatch/slow_routing.py` contains the same algorithm in plain
    Python.

    busy_S: µs until each shard has finished its work; the function adds the work of this call.
    costs: four costs in this order: µs per expert, µs per row and µs per message, each by shard, and then `max_piece`.
    """
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
    given_EH = np.empty((num_experts, max_homes), np.int64)  # number of rows that each possible home computes
    num_split = 0
    for expert in experts[order]:
        options, given_H = options_EH[expert, : num_options_E[expert]], given_EH[expert]
        given_H[: len(options)] = 0
        left = count_E[expert]
        piece = left if len(options) == 1 else max_piece
        num_split += left > piece
        while left > 0:
            given_H[_give(options, min(piece, left), given_H, is_called_S, busy_S, costs)] += min(piece, left)
            left -= piece
    if num_split > 0:
        is_split_E = (count_E > max_piece) & (num_options_E > 1)
        _relieve(np.flatnonzero(is_split_E), options_EH, num_options_E, given_EH, busy_S, costs)

    option_E = np.zeros(num_experts, np.int64)
    for pick, expert in enumerate(expert_P):
        while given_EH[expert, option_E[expert]] == 0:
            option_E[expert] += 1
        given_EH[expert, option_E[expert]] -= 1
        home_P[pick] = options_EH[expert, option_E[expert]]
    return True


@njit(cache=True)  # type: ignore[untyped-decorator]
def _give(options: Any, num_rows: Any, given_H: Any, is_called_S: Any, busy_S: Any, costs: Any) -> int:
    """Give `num_rows` rows of one expert to the home that would finish first; return the home's index in `options`."""
    expert_S, row_S, message_S, _ = costs
    chosen, least = 0, np.inf
    for i, option in enumerate(options):
        # A message costs time at the caller, not at the shard. So its cost counts here, but is not added to `busy_S`.
        extra = (0.0 if is_called_S[option] else message_S[option]) + (0.0 if given_H[i] > 0 else expert_S[option])
        if busy_S[option] + extra < least:
            chosen, least = i, busy_S[option] + extra
    home = options[chosen]
    busy_S[home] += num_rows * row_S[home] + (0.0 if given_H[chosen] > 0 else expert_S[home])
    is_called_S[home] = True
    return chosen


RELIEF = 0.004  # smallest gain, as a share of the slowest shard's time, that is worth another search


@njit(cache=True)  # type: ignore[untyped-decorator]
def _relieve(experts: Any, options_EH: Any, num_options_E: Any, given_EH: Any, busy_S: Any, costs: Any) -> None:
    """Move rows from the slowest shard along a chain of experts' homes to a shard that finishes earlier, repeatedly.

    `choose` assigns one expert after another. So `choose` does not see that a shard could take rows of one expert and
    pass on rows of another expert. If no chain leads from the slowest shard to a shard that finishes earlier, no split
    of the rows has a smaller maximum time.
    """
    expert_S, row_S = costs[0], costs[1]
    by_S, from_S, to_S = (
        np.empty(len(busy_S), np.int64),
        np.empty(len(busy_S), np.int64),
        np.empty(len(busy_S), np.int64),
    )
    for _ in range(4 * len(busy_S)):
        slowest = np.argmax(busy_S)
        last = _reach(slowest, experts, options_EH, num_options_E, given_EH, busy_S, expert_S, by_S, from_S, to_S)
        if last < 0 or row_S[slowest] <= 0:  # in a fitted cost model, rows may cost nothing
            return
        new = 0.0 if given_EH[by_S[last], to_S[last]] > 0 else expert_S[last]
        num_rows = int((busy_S[slowest] - busy_S[last] - new) / (row_S[slowest] + row_S[last]))
        if num_rows == 0 or num_rows * row_S[slowest] <= RELIEF * busy_S[slowest]:
            return
        shard = last
        while shard != slowest:
            num_rows = min(num_rows, given_EH[by_S[shard], from_S[shard]])
            shard = options_EH[by_S[shard], from_S[shard]]
        busy_S[slowest] -= num_rows * row_S[slowest]
        busy_S[last] += num_rows * row_S[last]
        shard = last
        while shard != slowest:
            expert, giver = by_S[shard], options_EH[by_S[shard], from_S[shard]]
            busy_S[shard] += 0.0 if given_EH[expert, to_S[shard]] > 0 else expert_S[shard]
            given_EH[expert, from_S[shard]] -= num_rows
            given_EH[expert, to_S[shard]] += num_rows
            busy_S[giver] -= 0.0 if given_EH[expert, from_S[shard]] > 0 else expert_S[giver]
            shard = giver


@njit(cache=True)  # type: ignore[untyped-decorator]
def _reach(
    slowest: Any, experts: Any, options_EH: Any, num_options_E: Any, given_EH: Any, busy_S: Any, expert_S: Any,
    by_S: Any, from_S: Any, to_S: Any,
) -> int:  # fmt: skip
    """Return the shard that finishes first of all shards that rows of `slowest` can reach, or -1 if no shard helps.

    Rows may reach a shard through other shards. For each reached shard, `by_S` gets the expert whose rows are passed on
    to this shard, `from_S` the home that gives the rows, and `to_S` the home that takes the rows. The two homes are
    indices into the expert's options.
    """
    by_S[:] = -1
    queue, num_seen, best, least = np.empty(len(busy_S), np.int64), 1, -1, busy_S[slowest]
    queue[0] = slowest
    at = 0
    while at < num_seen:
        shard = queue[at]
        at += 1
        for expert in experts:
            for i in range(num_options_E[expert]):
                if options_EH[expert, i] != shard or given_EH[expert, i] == 0:
                    continue
                for k in range(num_options_E[expert]):
                    to = options_EH[expert, k]
                    # Rows cost nothing here, because a shard within the chain passes on as many rows as it takes.
                    new = 0.0 if given_EH[expert, k] > 0 else expert_S[to]
                    done = busy_S[to] + new
                    if to == slowest or by_S[to] >= 0 or (new > 0 and done >= busy_S[slowest]):
                        continue
                    by_S[to], from_S[to], to_S[to] = expert, i, k
                    queue[num_seen] = to
                    num_seen += 1
                    if done < least:
                        best, least = to, done
    return best


class Grouped(NamedTuple):
    """`Grouped` says which picks travel in which message: message m carries `pick_Q[first_M[m] : first_M[m + 1]]`.

    The picks of a message are in the order of their rows.
    """

    pick_Q: NDArray[np.int64]
    first_M: list[int]  # M + 1 indices into `pick_Q`
    shard_M: list[int]
    num_rows_M: list[int]
    num_experts_M: list[int]  # number of distinct experts in each message


def group(
    pick_Q: NDArray[np.int64],
    home_Q: NDArray[np.int64],
    expert_P: NDArray[np.int64],
    top_k: int,
    num_shards: int,
    num_experts: int,
    max_rows: int,
) -> Grouped:
    """Group the ascending picks `pick_Q`, which go to the shards `home_Q`, into messages of at most `max_rows` rows."""
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
    expert_mib: float,
    max_piece: int,
    is_excluded_S: NDArray[np.bool_],
    top_k: int,
    max_rows: int,
    may_promote: bool,
) -> Grouped:
    """Choose the home of each pick and group the picks into messages; raise NoLiveHome if an expert has no home.

    pick_Q: the picks to send, ascending, as indices into `expert_P`.
    costs_CS: four rows of costs by shard: µs per MiB of an expert for its weights, µs per MiB of an expert for one row,
        µs per message, and the time in seconds at which the shard will be free.
    expert_mib: the size of one expert in MiB.
    max_piece: an expert with more rows than this number may be split between several homes.
    is_excluded_S: True for each shard that may not be asked.
    top_k, max_rows: the number of picks per row, and the maximum number of rows in a message.
    may_promote: whether standbys may be chosen.
    """
    standby_EH = homes.standby_EH if may_promote else homes.no_standby_EH
    limits = (now, expert_mib, max_piece, top_k, max_rows)
    is_chosen, *grouped = _route(pick_Q, expert_P, homes.homes_EH, standby_EH, is_excluded_S, costs_CS, limits)
    if not is_chosen:
        raise no_live_home(expert_P[pick_Q], homes.homes_EH, standby_EH, is_excluded_S)
    return _grouped(*grouped)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _route(
    pick_Q: Any, expert_P: Any, homes_EH: Any, standby_EH: Any, is_excluded_S: Any, costs_CS: Any, limits: Any
) -> Any:
    now, expert_mib, max_piece, top_k, max_rows = limits
    expert_Q, home_Q = expert_P[pick_Q], np.empty(len(pick_Q), np.int64)
    busy_S = np.maximum(costs_CS[3] - now, 0.0) * 1e6
    costs = (costs_CS[0] * expert_mib, costs_CS[1] * expert_mib, costs_CS[2].copy(), max_piece)
    is_chosen = choose(expert_Q, homes_EH, standby_EH, is_excluded_S, busy_S, costs, home_Q)
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
    next_S = np.zeros(num_shards + 1, np.int64)  # index in `sorted_Q` for the next pick of each shard
    for q in range(num_picks):
        next_S[home_Q[q] + 1] += 1
    next_S = np.cumsum(next_S)
    sorted_Q, shard_Q = np.empty(num_picks, np.int64), np.empty(num_picks, np.int64)
    for q in range(num_picks):
        position = next_S[home_Q[q]]
        sorted_Q[position], shard_Q[position] = pick_Q[q], home_Q[q]
        next_S[home_Q[q]] += 1
    seen_by_E = np.full(num_experts, -1, np.int64)  # for each expert, the last message with one of its picks
    # for each message: first pick, shard, number of rows, number of experts
    numbers = np.zeros((4, num_picks), np.int64)
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
